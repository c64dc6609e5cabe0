"""Which output formats a model's answers are taken apart by.

What it is: `Formats`, a pool's choice of one format for reasoning and one for calls, by option or by the chat template, and the splitter of each
request: calls are only looked for where the request has tools. Where its answers must obey something, `grammar` is what they obey as a whole.
What it does not know: how formats look (plugins/formats), tokens, rows.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Callable, Mapping

from penstock.core.actors.text.answers import laid_out, object_of, one_object
from penstock.core.actors.text.ledger import Request
from penstock.core.contract.formats import ARGUMENTS, CONTENT, NAME, REASONING, Fragment, Opening, Spelling, Splitter
from penstock.core.contract.hookspecs import FormatSpec
from penstock.core.contract.layouts import encode
from penstock.core.protocol.calling import Calling
from penstock.core.protocol.config import Config, nearest
from penstock.core.protocol.errors import ConfigError, UnsupportedFeature, sendable
from penstock.core.protocol.messages import Grammar, Submit

OFF = "none"
"""The name of no format."""
_SHORT = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class Formats:
    """`tools` and `reasoning`: the formats in use, if there are any; one spec may be both."""

    def __init__(self, tools: FormatSpec | None = None, reasoning: FormatSpec | None = None, template: str = "") -> None:
        self.tools = tools
        self.reasoning = reasoning
        self.spelling = tools.spelling(template) if tools is not None and tools.spelling is not None else None
        """How calls are asked for; None: they cannot be."""
        self.marks = frozenset(mark for spec in (tools, reasoning) if spec is not None for mark in spec.marks)

    @classmethod
    def choose(cls, specs: Mapping[str, FormatSpec], template: str, config: Config) -> Formats:
        """Those that the options name, else those that match the template (sources of all of the model's). Raises ConfigError."""
        return cls(
            _chosen(specs, "tools", config.tool_call_parser, "tool_call_parser", template),
            _chosen(specs, "reasoning", config.reasoning_parser, "reasoning_parser", template),
            template,
        )

    def check(self, submit: Submit) -> None:
        """Raises UnsupportedFeature if calls are to be taken out of answers, or asked for, and nothing here can."""
        if submit.split and submit.tools and self.tools is None:
            raise UnsupportedFeature(
                "How this model writes calls of tools is not known here. Leave tools out, set tool_choice to 'none', or start the server with"
                " --tool-call-parser.",
                param="tools",
            )
        if submit.calling is not None:
            self._check_calling(submit, submit.calling)

    def _check_calling(self, submit: Submit, calling: Calling) -> None:
        tools, reasoning = self.tools, self.reasoning
        assert tools is not None
        unspelt = tools if self.spelling is None else reasoning if reasoning is not None and reasoning.thinking is None else None
        if unspelt is not None:
            raise UnsupportedFeature(
                f"{calling.field} needs a grammar of the model's answers, and what the parser {unspelt.name!r} reads has none here. Leave it out.",
                param=calling.field,
            )
        spelling = self.spelling
        assert spelling is not None
        for function in calling.functions:
            if re.fullmatch(spelling.names, function.name) is None:
                field = function.field.replace(".parameters", ".name")
                raise UnsupportedFeature(
                    f"{field}: {calling.field} cannot be obeyed with a function of the name {function.name[:80]!r}.", param=field
                )
            if spelling.arguments is not None:
                spelling.arguments(function)
        grammar = submit.grammar
        if grammar is None or calling.must:
            return
        why = _untold(spelling, grammar)
        if why:
            raise UnsupportedFeature(
                f"{grammar.field} beside tools is not supported for this model: {why}, as the parser {tools.name!r} reads it."
                " Leave one of them out.",
                param=grammar.field,
            )
        if one_object(spelling):
            for function in calling.functions:
                object_of(spelling, function)

    def _whole(self, submit: Submit) -> bool:
        """Does a grammar govern all of the answer, as it is not known how reasoning is written?"""
        return submit.grammar is not None and self.reasoning is not None and self.reasoning.thinking is None

    def grammar(self, request: Request) -> Grammar:
        """What an answer obeys from its first token on, of a request that `obeys`."""
        submit = request.submit
        given, calling = submit.grammar, submit.calling
        thinking = self.reasoning.thinking if self.reasoning is not None and submit.split else None
        if given is not None and calling is None and thinking is None:
            return given
        part = laid_out(
            Opening(request.prompt_text, submit.continue_final_message),
            marks=sorted(self.marks),
            thinking=thinking,
            spelling=self.spelling,
            calling=calling,
            parallel=submit.parallel_calls,
            answer=given,
        )
        return Grammar(kind="layout", source=encode(part), field=calling.field if calling is not None else given.field if given else "")

    def splitter(self, request: Request) -> Splitter | None:
        """For one of its answers; None where there is nothing to take apart."""
        submit = request.submit
        if not submit.split or self._whole(submit):
            return None
        tools = self.tools if submit.tools else None
        opening = Opening(request.prompt_text, submit.continue_final_message, submit.tools)
        if self.reasoning is None:
            return tools.factory(opening) if tools is not None else None
        first = self.reasoning.factory(opening)
        if self.reasoning.role == "both":
            return first if tools is self.reasoning else _Then(first, tools.factory(opening) if tools is not None else None)
        return first if tools is None else _Then(first, tools.factory(opening))

    def call_id(self, splitter: Splitter | None, call: int, name: str) -> str:
        """A new call's."""
        own: Callable[[int, str], str] | None = getattr(splitter, "call_id", None)
        if own is not None:
            with contextlib.suppress(Exception):  # a plugin's; an id of ours will do
                return sendable(str(own(call, name)))
        if self.tools is not None and self.tools.short_ids:
            return "".join(secrets.choice(_SHORT) for _ in range(9))
        return "call_" + secrets.token_hex(12)


def _untold(spelling: Spelling, answer: Grammar) -> str:
    """Why an answer that obeys could be read as a call; "": it could not."""
    if answer.kind == "layout":
        return "the text around and in structural tags could not be told from a call"
    if not spelling.first:
        return ""
    if spelling.told is None or answer.kind != "json":
        return "an answer could not be told from a call"
    try:
        return spelling.told(json.loads(answer.source))
    except (ValueError, RecursionError):
        return ""  # it is no schema, which is said when it is compiled


def _chosen(specs: Mapping[str, FormatSpec], role: str, wanted: str | None, option: str, template: str) -> FormatSpec | None:
    able = {name: spec for name, spec in specs.items() if spec.role in (role, "both")}
    if wanted is None:
        return next((spec for spec in reversed(list(able.values())) if spec.matches(template)), None) if template else None
    if wanted == OFF:
        return None
    names = {alias: spec for spec in able.values() for alias in (spec.name, *spec.aliases)}
    if wanted not in names:
        raise ConfigError(
            f"--{option.replace('_', '-')} {wanted}: no such format.{nearest(wanted, names)} Known: {', '.join(sorted(able))}, {OFF}.",
            param=option,
        )
    return names[wanted]


class _Then:
    """Content of one splitter goes through another, or its calls, which nobody asked for, go back to being content."""

    def __init__(self, first: Splitter, second: Splitter | None) -> None:
        self._first = first
        self._second = second
        if second is not None and hasattr(second, "call_id"):
            self.call_id = second.call_id

    @property
    def channel(self) -> int:
        return REASONING if self._first.channel == REASONING else CONTENT

    def feed(self, text: str) -> list[Fragment]:
        return self._pass(self._first.feed(text))

    def _pass(self, fragments: list[Fragment]) -> list[Fragment]:
        out: list[Fragment] = []
        for fragment in fragments:
            if fragment.channel == REASONING:
                out.append(fragment)
            elif self._second is not None:
                if fragment.channel == CONTENT:
                    out += self._second.feed(fragment.text)
            elif fragment.channel in (CONTENT, NAME, ARGUMENTS):
                out.append(Fragment(CONTENT, -1, fragment.text))
        return out

    def flush(self, cut: bool) -> list[Fragment]:
        out = self._pass(self._first.flush(cut))
        return out + self._second.flush(cut) if self._second is not None else out
