"""Layers of a checkpoint that are quantised otherwise than the rest: bits, groups and the like by layer, as configurations of several formats say them.

What it is: `Rules`, the first of which that matches a layer's name holds for it; `gptq_rules` reads GPTQModel's `dynamic`, `auto_round_rules` AutoRound's
`extra_config`. A rule's fields stand before those of the configuration; `None` in place of them says that the layer is wide.
What it does not know: how a format stores a layer, which bits it can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from penstock.core.protocol.errors import CheckpointError
from penstock.plugins.quantizers.fields import Fields

WIDE = 16
"""From so many bits on a layer is not quantised."""
SIGNS = frozenset("*+?^$()[]{}|\\")
"""One of these makes a regular expression of a name of `extra_config`; a dot does not, as all names have some."""

FORMATS = ("checkpoint_format", "format", "quant_method")


class Rule(NamedTuple):
    """Of some layers."""

    matches: Callable[[str], object]
    fields: Fields | None
    """What differs, over what holds for all; None: nothing is quantised."""


Rules = tuple[Rule, ...]


def gptq_rules(fields: Fields) -> Rules:
    """`dynamic`: regular expressions that fit a name's beginning, in order; "-:" before one says that its layers stay wide, "+:" nothing. Raises CheckpointError or UnsupportedFeature."""
    dynamic = fields.inner("dynamic")
    return () if dynamic is None else tuple(_gptq_rule(fields, dynamic, text) for text in dynamic.config)


def _gptq_rule(fields: Fields, dynamic: Fields, text: str) -> Rule:
    matches = _pattern(dynamic, text, text.removeprefix("-:").removeprefix("+:")).match
    own = dynamic.inner(text)
    for name in FORMATS if own is not None else ():
        if own is not None and own.config.get(name, fields.config.get(name)) != fields.config.get(name):
            raise own.refuse(name, "a layer of its own format is not supported.")
    return Rule(matches, None if text.startswith("-:") or own is None else _over(fields, own))


def auto_round_rules(fields: Fields) -> Rules:
    """`extra_config`: names first, then regular expressions that fit anywhere in a name. Raises CheckpointError."""
    extra = fields.inner("extra_config")
    if extra is None:
        return ()
    named, fitted = [], []
    for text in extra.config:
        own = extra.inner(text)
        if own is None:
            continue
        bits = own.integer("bits", WIDE if fields.config.get("bits") is None else fields.integer("bits"))
        over = None if bits >= WIDE else _over(fields, own)
        if over is not None:
            over.word("data_type", "int", "int")
        if SIGNS & set(text):
            fitted.append(Rule(_pattern(extra, text, text).search, over))
        else:
            named.append(Rule(text.__eq__, over))
    return (*named, *fitted)


def _over(fields: Fields, own: Fields) -> Fields:
    return Fields({**fields.config, **{name: value for name, value in own.config.items() if value is not None}}, own.where)


def _pattern(within: Fields, text: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise CheckpointError(
            f"config.json: '{within.where}' has {text!r:.80}, which is no regular expression ({error}).", param=text
        ) from None


def contradicted(layer: str) -> CheckpointError:
    """To be raised for a layer that is wide by the rules, and quantised by the files."""
    return CheckpointError(
        f"config.json says that {layer} is not quantised, but the files hold its 'qweight': are they those of this config.json?",
        param=f"{layer}.qweight",
    )


def said(method: str, others: Sequence[str]) -> str:
    """A reader's method with how some layers differ."""
    return f"{method}; some layers {' or '.join(sorted(set(others)))}" if others else method
