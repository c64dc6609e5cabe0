"""Drafters, as plugins of the engine: what guesses the next tokens, which the device then computes along and keeps where it would have drawn them anyway.

What it is: the registering hook. Nothing heavy is imported before a factory is called.
What it does not know: how drafts are verified (the runner), how many a step has (the scheduler).
"""

from __future__ import annotations

from typing import Any

from penstock.core.contract.hookspecs import DrafterSpec, hookimpl

ALWAYS = ("method", "num_speculative_tokens")
"""Fields of --speculative-config that every drafter reads."""


def _reads(config: Any, *fields: str) -> None:
    """Raises ConfigError for a field that this drafter would pass over."""
    from penstock.core.protocol.errors import ConfigError
    from penstock.core.protocol.speculation import FIELDS

    for name in FIELDS:
        if name not in (*ALWAYS, *fields) and getattr(config, name) not in (None, {}):
            raise ConfigError(
                f"--speculative-config: {name!r} says nothing to the method {config.method!r}, which reads {', '.join((*ALWAYS, *fields))}. Leave it out.",
                param="speculative_config",
            )


def _ngram(*, config: Any, parts: Any, **options: Any) -> Any:
    from penstock.plugins.drafters.ngram import NgramDrafter

    _reads(config, "prompt_lookup_max", "prompt_lookup_min")
    return NgramDrafter(config, parts)


def _draft_model(*, config: Any, parts: Any, **options: Any) -> Any:
    from penstock.plugins.drafters.draft_model import draft_model

    _reads(config, "model", "quantization", "options")
    return draft_model(config, parts)


def _medusa(*, config: Any, parts: Any, **options: Any) -> Any:
    from penstock.plugins.drafters.medusa import MedusaDrafter

    _reads(config, "model", "speculative_token_tree")
    return MedusaDrafter(config, parts)


def _head(*, config: Any, parts: Any, **options: Any) -> Any:
    from penstock.plugins.drafters.heads import HeadDrafter

    _reads(config, "model", "speculative_token_tree")
    return HeadDrafter(config, parts)


_DRAFTERS: dict[str, tuple[Any, str]] = {
    "ngram": (_ngram, "What followed when the last tokens stood in the text before."),
    "draft_model": (_draft_model, "A smaller model, with the same vocabulary or another one."),
    "medusa": (_medusa, "Medusa heads on the model's last hidden state, as a chain or a tree."),
    "eagle": (_head, "An EAGLE layer on the model's last hidden state, as a chain or a tree."),
    "eagle3": (_head, "An EAGLE-3 layer on three of the model's hidden states, as a chain or a tree."),
    "mtp": (_head, "A multi-token-prediction layer beside the model, as a chain or a tree."),
}


def _suffix(*, config: Any, **options: Any) -> Any:
    from penstock.plugins.drafters.suffix import suffix

    _reads(config, "prompt_lookup_min", "options")
    return suffix(config=config, **options)


@hookimpl
def register_drafters() -> list[DrafterSpec]:
    """The built-in drafters, by their method."""
    return [
        *(
            DrafterSpec(name=name, api_level=1, doc=doc, methods=[name], where="device", factory=factory)
            for name, (factory, doc) in _DRAFTERS.items()
        ),
        DrafterSpec(
            name="suffix",
            api_level=1,
            doc="What followed the longest run of tokens that was there before, in the request or in past answers of its tenant.",
            methods=["suffix"],
            where="host",
            factory=_suffix,
        ),
    ]
