"""Grammar backends.

What it is: the built-in backends, registered for text and the engine: llguidance, and xgrammar where it is installed. A library is imported when the first
request needs it, in the process that compiles and in the engine.
What it does not know: requests, masks' ways to a device.
"""

from __future__ import annotations

import importlib.util

from penstock.core.contract.grammars import Grammars
from penstock.core.contract.hookspecs import GrammarSpec, hookimpl


def _llguidance(tokens: list[bytes], special: list[int]) -> Grammars:
    from penstock.plugins.grammars.llguidance import LlGuidance

    return LlGuidance(tokens, special)


def _xgrammar(tokens: list[bytes], special: list[int]) -> Grammars:
    from penstock.plugins.grammars.xgrammar import XGrammar

    return XGrammar(tokens, special)


KINDS = ["json", "compact_json", "regex", "choice", "grammar", "layout"]


@hookimpl
def register_grammars() -> list[GrammarSpec]:
    specs = [
        GrammarSpec(
            name="llguidance",
            api_level=1,
            doc="JSON schemas, expressions, choices, Lark and GBNF grammars, by llguidance.",
            kinds=KINDS,
            factory=_llguidance,
        )
    ]
    if importlib.util.find_spec("xgrammar") is not None:
        specs.append(
            GrammarSpec(
                name="xgrammar",
                api_level=1,
                doc="What xgrammar expresses exactly by it, all else by llguidance. Needs penstock[xgrammar].",
                kinds=KINDS,
                factory=_xgrammar,
                priority=-1,
            )
        )
    return specs
