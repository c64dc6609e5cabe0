"""Calls written as Python, as Llama 4 and others write them: [get_weather(city="Oslo"), now()].

What it is: the spec `pythonic`, the reader of such a list, and the layout of a function's keyword arguments. A call goes out when its closing bracket is there, its keyword arguments as JSON; what
is no list of calls with literals is content, as it was.
What it does not know: other formats.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from typing import Any

from penstock.core.contract.formats import Fragment, Opening, Spelling
from penstock.core.contract.hookspecs import API_LEVEL, FormatSpec
from penstock.core.contract.layouts import Chain, Either, Obey, Part, Repeat, Text
from penstock.core.protocol.calling import Function
from penstock.plugins.formats.named import named, unstrict
from penstock.plugins.formats.scanner import FUNCTION, State, TableSplitter, probe, read_text, table

_NAME = re.compile(r"[A-Za-z_][\w.]*")
_WITHIN = re.compile(r"""["'()\[\]{}]""")
_CONSTANTS = {"true": True, "false": False, "null": None}
_FAILURES = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError)
"""What Python's parser and JSON's writer may raise."""


class _List:
    """`depth`: brackets open, the list's own not counted. `quote`: that of the string it is in."""

    __slots__ = ("depth", "escaped", "quote", "source")

    def __init__(self) -> None:
        self.depth = -1
        self.quote = ""
        self.escaped = False
        self.source: list[str] = []
        """The present call."""


def read_list(splitter: TableSplitter, buf: str, at: int, out: list[Fragment]) -> int:
    """The list, up to its closing bracket."""
    mine: _List = splitter.memory
    if mine is None:
        mine = splitter.memory = _List()
    while at < len(buf):
        if mine.depth > 0:
            end = _within(mine, buf, at)
            mine.source.append(buf[at:end])
            splitter.raw.append(buf[at:end])
            at = end
            if not mine.depth and not _call(splitter, mine, out):
                return at
            continue
        char = buf[at]
        if mine.depth < 0 and char == "[":
            mine.depth = 0
        elif mine.depth == 0 and mine.source and char == "(":
            mine.source.append(char)
            mine.depth = 1
        elif mine.depth == 0 and char == "]" and not mine.source:
            if splitter.raw and splitter.raw[0] and not _blank(splitter.raw):
                splitter.fail("", out)
                return at
            splitter.raw.clear()
            splitter.enter(splitter.place.state.after)
            return at + 1
        elif mine.depth == 0 and (char.isidentifier() or (mine.source and (char.isdigit() or char == "."))):
            mine.source.append(char)
        elif char not in (" \t\r\n" if mine.source else " \t\r\n,"):
            splitter.fail("", out)
            return at
        splitter.raw.append(char)
        at += 1
    return at


def _blank(raw: list[str]) -> bool:
    """Has nothing been read since the last call?"""
    return not "".join(raw).strip(" \t\r\n,")


def _within(mine: _List, buf: str, at: int) -> int:
    """After the bracket that ends the call, or the text's end."""
    while at < len(buf):
        if mine.quote:
            if mine.escaped:
                mine.escaped = False
            elif buf[at] == "\\":
                mine.escaped = True
            elif buf[at] == mine.quote:
                mine.quote = ""
            at += 1
            continue
        hit = _WITHIN.search(buf, at)
        if hit is None:
            return len(buf)
        at = hit.end()
        char = hit.group()
        if char in "\"'":
            mine.quote = char
        elif char in "([{":
            mine.depth += 1
        else:
            mine.depth -= 1
            if not mine.depth:
                return at
    return at


def _call(splitter: TableSplitter, mine: _List, out: list[Fragment]) -> bool:
    """Tell of the call that is complete. False: it is none."""
    found = parsed("".join(mine.source))
    mine.source.clear()
    if found is None or not splitter.callable(found[0]):
        splitter.fail("", out)
        return False
    name, arguments = found
    splitter.begin(name, out)
    splitter.argue(arguments, out)
    splitter.close(out, complete=True)
    return True


def parsed(source: str) -> tuple[str, str] | None:
    """The name and the arguments (as JSON) of `name(key=literal, ...)`."""
    try:
        call = ast.parse(source.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        name = ast.unparse(call.func)
        if _NAME.fullmatch(name) is None or FUNCTION.fullmatch(name) is None or any(keyword.arg is None for keyword in call.keywords):
            return None
        values = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        return name, _whole(json.dumps(values, ensure_ascii=False, allow_nan=False))
    except _FAILURES:
        return None


def _whole(text: str) -> str:
    """Two halves of a surrogate pair, which Python's \\u escapes may spell, are a character."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _literal(node: ast.expr) -> Any:
    """As ast.literal_eval, with JSON's words besides."""
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    json.dumps(value, allow_nan=False)
    return value


def _key(node: ast.expr | None) -> str:
    value = ast.literal_eval(node) if node is not None else None
    if not isinstance(value, str):
        raise ValueError("JSON's keys are strings")
    return value


TABLE = table(
    start=State(probe, {"<|python_start|>": "list"}, skip=" \t\r\n", chars={"[": "list"}),
    list=State(read_list, after="tail"),
    tail=State(read_text, {"<|python_end|>": "content", "<|python_start|>": "list"}),
    content=State(read_text, {"<|python_start|>": "list"}),
)


def matches(template: str) -> bool:
    return "<|python_start|>" in template or "[func_name1(params_name1" in template or "[func1(params_name1" in template


def _make(opening: Opening) -> TableSplitter:
    return TableSplitter(TABLE, "start", opening.tools)


# ------------------------------------------------------------------ the other way round

_WORD = rf"(?!(?:{'|'.join(keyword.kwlist)})\b)[A-Za-z_][A-Za-z_0-9]*"


def arguments(function: Function) -> Part:
    """Keyword arguments, those that are required first, whose values are JSON: what JSON's words and escapes mean, the reader knows."""
    if function.hint:
        return _keywords([(name, "{}") for name, _, _ in unstrict(function, _WORD)], 0, function.field)
    found = named(function, _WORD, "keyword arguments of Python")
    order = sorted(found.arguments, key=lambda argument: not argument.required)
    sources = [(argument.name, found.whole(argument.schema)) for argument in order]
    return _keywords(sources, sum(argument.required for argument in order), function.field)


def _keywords(sources: list[tuple[str, str]], required: int, field: str) -> Part:
    """Arguments (name, schema), of which the first `required` must be there."""

    def one(at: int, before: str) -> Part:
        name, source = sources[at]
        return Chain([Text(f"{before}{name}="), Obey("json", source, field)])

    def more(start: int) -> list[Part]:
        return [one(at, ", ") if at < required else Repeat(one(at, ", "), 1) for at in range(start, len(sources))]

    if required:
        return Chain([one(0, ""), *more(1)])
    return Repeat(Either([Chain([one(at, ""), *more(at + 1)]) for at in range(len(sources))]), 1) if sources else Text("")


def _spelling(template: str) -> Spelling:
    begin, end = ("<|python_start|>[", "]<|python_end|>") if "<|python_start|>" in template else ("[", "]")
    return Spelling(
        begin=begin,
        before="",
        between="(",
        after=")",
        separator=", ",
        end=end,
        hides=["<|python_start|>"],
        first="[",
        told=lambda schema: "",  # in JSON no name stands before a bracket
        arguments=arguments,
        names=rf"{_WORD}(\.{_WORD})*",
    )


PYTHONIC = FormatSpec(
    name="pythonic",
    api_level=API_LEVEL["output_formats"],
    doc="A list of Python calls (Llama 4 and others).",
    role="tools",
    aliases=["llama4_pythonic", "llama4"],
    marks=["<|python_start|>", "<|python_end|>"],
    matches=matches,
    factory=_make,
    spelling=_spelling,
)
