"""Grammar backends.

What it is: the built-in backend, registered for text and the engine. Its library is imported when the first request needs it.
What it does not know: requests, masks' ways to a device.
"""

from __future__ import annotations

from penstock.core.contract.grammars import Grammars
from penstock.core.contract.hookspecs import GrammarSpec, hookimpl


def _llguidance(tokens: list[bytes], special: list[int]) -> Grammars:
    from penstock.plugins.grammars.llguidance import LlGuidance

    return LlGuidance(tokens, special)


@hookimpl
def register_grammars() -> list[GrammarSpec]:
    return [
        GrammarSpec(
            name="llguidance",
            api_level=1,
            doc="JSON schemas, expressions, choices, Lark and GBNF grammars, by llguidance.",
            kinds=["json", "compact_json", "regex", "choice", "grammar", "layout"],
            factory=_llguidance,
        )
    ]
