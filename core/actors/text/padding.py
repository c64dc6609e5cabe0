"""Encodings of texts, cut and filled up as Hugging Face's tokenizers do it.

What it is: the arguments of a call with their names (`shape_of`), the cut (`cut`) and the filling up (`filled`), over plain lists of ids.
What it does not know: texts, tokenizers, requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature, shown

UNBOUNDED = int(1e30)
"""transformers' `model_max_length` of a tokenizer that names none."""
FILLERS = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
"""What is filled up, and with what; None: with the padding token."""
SIDES = ("right", "left")
CUTS = {True: True, False: False, None: None, "longest_first": True, "only_first": True, "do_not_truncate": False}
FILLS = {True: "longest", False: "", None: "", "longest": "longest", "max_length": "max_length", "do_not_pad": ""}


class Encoding(dict[str, Any]):
    """What calling the tokenizer gives: "input_ids" and "attention_mask", as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a call asks for. `most` None: nothing is cut. `fill` "": nothing is filled up."""

    most: int | None = None
    cut_side: str = "right"
    fill: str = ""
    to: int | None = None
    multiple: int = 1
    fill_side: str = "right"
    mask: bool = True
    kinds: bool = False
    lengths: bool = False


def refuse(others: Mapping[str, Any]) -> None:
    """Arguments of transformers that are not here. Those that ask for nothing may be there."""
    asked = sorted(name for name, value in others.items() if value is not None and value is not False and name != "verbose")
    if asked:
        raise UnsupportedFeature(
            f"{', '.join(asked)}: not supported here, plain lists of all ids are returned. Leave it out.", param=asked[0]
        )


def shape_of(given: Mapping[str, Any], *, longest: int, fill_side: str, cut_side: str, cuts_alone: bool = True) -> Shape:
    """`longest`, `fill_side` and `cut_side` are the tokenizer's own. `cuts_alone`: max_length cuts without `truncation`, too. Raises InvalidRequest
    naming an argument that cannot be meant, UnsupportedFeature for one that is not here."""
    rest = {name: value for name, value in given.items() if not (name == "stride" and value == 0)}
    cut = _one_of(rest, "truncation", CUTS)
    fill = _one_of(rest, "padding", FILLS)
    length = _count(rest, "max_length", 0)
    multiple = _count(rest, "pad_to_multiple_of", 1)
    fill_side, cut_side = _side(rest, "padding_side", fill_side), _side(rest, "truncation_side", cut_side)
    mask = rest.pop("return_attention_mask", None)
    kinds, lengths = rest.pop("return_token_type_ids", None), rest.pop("return_length", None)
    refuse(rest)
    if cut is None:
        cut = cuts_alone and length is not None and fill != "max_length"
    if length is not None and not cut and fill != "max_length":
        raise InvalidRequest('max_length does nothing without truncation=True or padding="max_length".', param="max_length")
    bound = longest if length is None else length
    if fill == "max_length" and bound >= UNBOUNDED:
        raise InvalidRequest('padding="max_length" needs max_length: this tokenizer names no longest text.', param="max_length")
    return Shape(
        most=bound if cut and bound < UNBOUNDED else None,
        cut_side=cut_side,
        fill=fill,
        to=bound if fill == "max_length" else None,
        multiple=multiple or 1,
        fill_side=fill_side,
        mask=mask is None or bool(mask),
        kinds=bool(kinds),
        lengths=bool(lengths),
    )


def _one_of(given: dict[str, Any], name: str, known: Mapping[Any, Any]) -> Any:
    value = given.pop(name, None)
    value = getattr(value, "value", value)  # transformers' PaddingStrategy and TruncationStrategy
    if not isinstance(value, (str, bool, type(None))) or value not in known:
        raise InvalidRequest(f"{name} must be one of {', '.join(repr(one) for one in known)}, but is {shown(value)}.", param=name)
    return known[value]


def _count(given: dict[str, Any], name: str, least: int) -> int | None:
    value = given.pop(name, None)
    if value is not None and (type(value) is not int or value < least):
        raise InvalidRequest(f"{name} must be a whole number of at least {least}, but is {shown(value)}.", param=name)
    return value


def _side(given: dict[str, Any], name: str, own: str) -> str:
    value = given.pop(name, None)
    side = own if value is None else value
    if side not in SIDES:
        raise InvalidRequest(f"{name} must be 'right' or 'left', but is {shown(side)}.", param=name)
    return str(side)


def cut(ids: list[int], content: list[int], shape: Shape) -> list[int]:
    """At most `shape.most` of a text's `ids`. Those of its `content` go: what the tokenizer put around it stays. Raises UnsupportedFeature where it put
    something into it."""
    most = shape.most
    if most is None or len(ids) <= most:
        return ids
    extra = len(ids) - len(content)
    at = next((at for at in range(extra + 1) if ids[at : at + len(content)] == content), None)
    if at is None:
        raise UnsupportedFeature("truncation: this tokenizer changes a text's own tokens when it adds special ones.", param="truncation")
    keep = most - extra
    if keep < 0:
        raise InvalidRequest(f"max_length is {most}, but the special tokens alone are {extra}.", param="max_length")
    left = content[len(content) - keep :] if shape.cut_side == "left" else content[:keep]
    return [*ids[:at], *left, *ids[at + len(content) :]]


def encoding(rows: list[list[int]], shape: Shape, pad: int | None, *, many: bool) -> Encoding:
    """What a call returns for these ids; not in a list of one where `many` is false."""
    out: dict[str, list[Any]] = {"input_ids": rows}
    if shape.kinds:
        out["token_type_ids"] = [[0] * len(row) for row in rows]
    if shape.mask:
        out["attention_mask"] = [[1] * len(row) for row in rows]
    found = filled(out, shape, pad)
    if shape.lengths:
        found["length"] = [len(row) for row in found["input_ids"]]
    return Encoding(found if many else {name: value if name == "length" else value[0] for name, value in found.items()})


def filled(rows: Mapping[str, Sequence[Any]], shape: Shape, pad: int | None) -> dict[str, list[Any]]:
    """`rows`: a list for each text under each name. Those of FILLERS are filled up with `pad` and its like, others stay. Raises InvalidRequest."""
    ids = rows["input_ids"]
    longest = max(map(len, ids), default=0)
    to = 0 if not shape.fill else longest if shape.to is None else shape.to
    to = -(-to // shape.multiple) * shape.multiple
    if to and pad is None and any(len(row) < to for row in ids):
        raise InvalidRequest(
            "padding: this tokenizer has no padding token. Name one: tokenizer.pad_token = tokenizer.eos_token.", param="padding"
        )
    out: dict[str, list[Any]] = {}
    for name, values in rows.items():
        if name not in FILLERS:
            out[name] = list(values)
            continue
        fill = pad if name == "input_ids" else FILLERS[name]
        if len(values) != len(ids) or any(len(value) != len(row) for value, row in zip(values, ids, strict=False)):
            raise InvalidRequest(f"{name} must have as many entries as input_ids.", param=name)
        missing = [[fill] * max(0, to - len(value)) for value in values]
        out[name] = [[*more, *value] if shape.fill_side == "left" else [*value, *more] for value, more in zip(values, missing, strict=True)]
    return out
