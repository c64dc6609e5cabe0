"""What a chat template takes, found out by letting it render.

What it is: `shape_of` gives a template small conversations in every shape that a client's may have, and looks at which of them the words come
out whole: neither left out, nor as a Python object's repr, nor as JSON within JSON. Templates differ by role, demand that turns alternate, refuse
roles, or fail on one shape; so each question is asked in several conversations. Those in which no shape comes out say nothing; of the others a
shape must come out in all.
What it does not know: Jinja (it is given a function that renders), requests, how messages are brought into shape (core/actors/text/chat.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from penstock.core.actors.text.chat import Empty, Form, Shape, formed, with_empty

Message = dict[str, Any]
Render = Callable[[list[Message], list[Message] | None], str | None]
"""Messages and tools to the prompt; None if the template refuses, fails or takes too long."""

FORMS: tuple[Form, ...] = get_args(Form)
# Words that no template has, in letters that survive a filter for case, and that hold nothing to escape.
FIRST, SECOND, OTHER = "qzfirstprobe", "secondprobeqz", "qzotherprobe"
PART_KEY = "qzpartprobe"
"""In every part: if it comes out, the part was printed whole."""
NAME, KEY, VALUE = "qzname", "qzkeyprobe", "qzvalueprobe"
SPELLED, CUT = "qzspelledout" * 4, 6
"""So much of it is enough: a template may cut what it prints."""


class _Object(dict[str, str]):
    """Arguments as an object. Wherever a template makes a text of it as Python does (prints it, escapes it, joins it), that text is told from
    any other, whatever becomes of it. `asked`: what was asked of it."""

    def __init__(self) -> None:
        super().__init__({KEY: VALUE})
        self.asked: set[Literal["field", "place", "walk"]] = set()
        """A field, as objects have them; a place in a text; what both have: length, items in turn, what is in it."""

    def __repr__(self) -> str:
        return SPELLED

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> str:
        self.asked.add("field" if isinstance(key, str) else "place")
        return super().__getitem__(key)

    def __eq__(self, other: object) -> bool:
        self.asked.add("place" if isinstance(other, str) else "field")
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __contains__(self, key: object) -> bool:
        self.asked.add("walk")
        return super().__contains__(key)

    def __len__(self) -> int:
        self.asked.add("walk")
        return super().__len__()

    def __iter__(self) -> Iterator[str]:
        self.asked.add("walk")
        return super().__iter__()

    def __reversed__(self) -> _Reversed:
        self.asked.add("walk")
        return _Reversed(self)

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add("field")
        return super().get(key, default)

    def keys(self) -> Any:
        self.asked.add("field")
        return super().keys()

    def values(self) -> Any:
        self.asked.add("field")
        return super().values()

    def items(self) -> Any:
        self.asked.add("field")
        return super().items()


class _Reversed:
    """What `| reverse` makes of it, which a template may print too."""

    def __init__(self, what: dict[str, str]) -> None:
        self._items = iter([*dict.keys(what)][::-1])

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._items)

    def __repr__(self) -> str:
        return SPELLED


TEXT = f'{{"{KEY}":  "{VALUE}"}}'
"""With a spacing that no serialiser writes: it comes out only if it is the text itself."""
BROKEN = f'{{"{KEY}": "{VALUE}'
CALL_ID = "qzcall001"
TOOLS: list[Message] = [
    {"type": "function", "function": {"name": NAME, "description": "", "parameters": {"type": "object", "properties": {}}}},
]


def shape_of(render: Render, source: str) -> Shape:
    """The shape of the template that `render` renders and whose text is `source`."""
    return _Probe(render).shape("content" in source)


class _Probe:
    def __init__(self, render: Render) -> None:
        self._render = render
        self._good: dict[str, frozenset[Form]] = {}
        self._lost: set[str] = set()
        self._lost_later: set[str] = set()
        self._shown_empties: tuple[Empty, ...] = ()
        self._object = _Object()
        self._arguments: Any = self._object
        self._spells = False
        """The template makes a text of an object."""
        self._unclear = False
        self._looked = False
        """It asks about the arguments of tool calls, though it does not show them."""

    def shape(self, reads_content: bool) -> Shape:
        for role in ("user", "system", "developer", "assistant"):
            self._ask_role(role)
        self._ask_later()
        self._ask_calls()
        for role in ("tool", "function"):
            self._ask_role(role)
        good = self._good
        instead = {"developer": "system"} if good["system"] and not good["developer"] else {}
        legacy = self._reads_function_call()
        if good["tool"] and not legacy and (self._shown_empties or not good["function"]):
            instead["function"] = "tool"  # its call becomes a tool call too
        text_only = self._arguments is TEXT
        return Shape(
            content={role: forms for role, forms in good.items() if forms},
            # A template that shows nobody's text and never speaks of content is not about it.
            lost=frozenset(self._lost - instead.keys()) if any(good.values()) or reads_content else frozenset(),
            lost_later=frozenset(self._lost_later),
            instead=instead,
            arguments="text" if text_only else "object",
            loose=text_only or self._is_loose(legacy),
            unclear=self._unclear,
            places=not text_only and "place" in self._object.asked,
            empty=self._shown_empties,
            calls_alone=self._calls_alone(),
            function_call=legacy,
        )

    # --- content

    def _ask_role(self, role: str) -> None:
        shown: dict[Form, set[int]] = {}
        for form in FORMS:
            answers = [self._comes_out(form, messages, tools) for messages, tools in self._talks(role, _saying(role, form))]
            shown[form] = {number for number, answer in enumerate(answers) if answer}
        most = max(len(talks) for talks in shown.values())
        everywhere = set().union(*shown.values())
        good = {form for form, talks in shown.items() if talks and talks == everywhere}
        # A template may want one form here and another there (no known one does): then the one that loses least.
        self._good[role] = frozenset(good or [form for form, talks in shown.items() if talks and len(talks) == most][:1])
        if not everywhere and self._is_lost(role):
            self._lost.add(role)

    def _is_lost(self, role: str) -> bool:
        """Nothing in any prompt depends on what the role says. (It may be that it only comes out changed: cut, or letters replaced.)"""
        prompts = [
            [self._render(messages, tools) for messages, tools in self._talks(role, {**_saying(role, "text"), "content": content})]
            for content in (FIRST, SECOND)
        ]
        return prompts[0] == prompts[1] and any(prompt is not None for prompt in prompts[0])

    def _ask_later(self) -> None:
        """Some templates look for the system in the first message, and nowhere else."""
        user, assistant = self._other("user"), self._other("assistant")
        for role in ("system", "developer"):
            answers: list[bool | None] = []
            for form in sorted(self._good[role]):
                message = _saying(role, form)
                for start in ([self._other("system")], [self._other("system"), user, assistant], [user, assistant]):
                    answers.append(self._comes_out(form, [*start, message, user], None))
            if False in answers and True not in answers:
                self._lost_later.add(role)

    def _comes_out(self, form: Form, messages: list[Message], tools: list[Message] | None) -> bool | None:
        """Is what `_saying` says in the prompt? None: there is no prompt."""
        out = self._render(messages, tools)
        if out is None:
            return None
        seen = out.lower()
        return FIRST in seen and (form != "parts" or SECOND in seen) and PART_KEY not in seen

    def _talks(self, role: str, message: Message) -> Iterator[tuple[list[Message], list[Message] | None]]:
        """Conversations with the message in them: as many, and alike, whatever its form."""
        user, assistant = self._other("user"), self._other("assistant")
        systems = [self._other("system")] if "system" in self._good else [_other("system", "text"), _other("system", "part")]
        match role:
            case "user":
                yield [message], None
                yield [message], TOOLS
                for system in systems:
                    yield [system, message], None
                    yield [system, message], TOOLS
                for form in ("text", "part"):
                    yield [_other("user", form), _other("assistant", form), message], None
                    yield [message, _other("assistant", form), _other("user", form)], None
            case "system" | "developer":
                for tools in (None, TOOLS):
                    yield [message, user], tools
                    yield [message, user, assistant, user], tools
            case "assistant":
                for start in ([user], *([system, user] for system in systems)):
                    yield [*start, message], None
                    yield [*start, message, user], None
            case _:
                for tools in (None, TOOLS):
                    for empty in self._shown_empties or ("text",):
                        for start in ([user], *([system, user] for system in systems)):
                            start = [*start, self._call(empty, self._arguments)]
                            yield [*start, message], tools
                            yield [*start, message, assistant], tools
                            yield [*start, message, user], tools
                    yield [user, message], tools

    def _other(self, role: str) -> Message:
        """A message of somebody else, in a form that works as far as is known."""
        good = self._good.get(role)
        return _other(role, "part" if good and "text" not in good else "text")

    # --- tool calls

    def _ask_calls(self) -> None:
        for arguments in (self._object, TEXT):
            self._arguments = arguments
            shown: list[Empty] = []
            for empty in get_args(Empty):
                if empty in ("part", "absent") and shown:
                    break  # what no client sends, unless nothing else will do
                if self._shown(self._call(empty, arguments)):
                    shown.append(empty)
            self._shown_empties = tuple(shown)
            if shown:
                return
        self._looked = self._judge(lambda arguments: self._call("text", arguments))

    def _judge(self, saying: Callable[[Any], Message]) -> bool:
        """Neither comes out whole: cut, or only asked about. What an object is refused for, or is spelled out in, takes texts. Was there anything
        to go by?"""
        user = self._other("user")

        def refused(arguments: Any) -> bool:
            return all(self._render([user, saying(arguments)], tools) is None for tools in (None, TOOLS))

        only_object_is = refused(self._object) and not refused(TEXT)
        asked = self._object.asked
        places = "place" in asked and "field" not in asked
        self._arguments = TEXT if self._spells or places or only_object_is else self._object
        self._unclear = self._arguments is not TEXT and "walk" in asked and "field" not in asked
        return self._spells or only_object_is or bool(asked)

    def _is_loose(self, legacy: bool) -> bool:
        """Does a text come out where the template takes an object? Not if it asks for fields by their names, as if it had none of ours."""
        if self._shown_empties:
            return self._shown(self._call(self._shown_empties[0], BROKEN), whole=False)
        return legacy and self._shown(_legacy(BROKEN), whole=False)

    def _calls_alone(self) -> bool:
        if not self._shown_empties:
            return False
        with_text = {**self._call("absent", self._arguments), "content": self._other("assistant")["content"]}
        if self._shown(with_text):
            return False
        return self._shown(self._call(self._shown_empties[0], self._arguments), before=[self._other("assistant")])

    def _reads_function_call(self) -> bool:
        """If it reads only that, what arguments it takes is asked here."""
        before = self._arguments
        for arguments in (before,) if self._shown_empties else (self._object, TEXT):
            self._arguments = arguments
            if self._shown(_legacy(arguments)):
                return True
        self._arguments = before
        return not self._shown_empties and not self._looked and self._judge(_legacy)

    def _shown(self, message: Message, *, whole: bool = True, before: list[Message] | None = None) -> bool:
        """Does the message's call come out in some conversation? `whole`: as it should; else at least its words."""
        user = self._other("user")
        results = [_result("text"), _result("part")]
        for tools in (None, TOOLS):
            for start in ([user], [self._other("system"), user]):
                for rest in ([], *([result] for result in results), *([result, self._other("assistant")] for result in results)):
                    out = self._render([*start, *(before or []), message, *rest], tools)
                    if out is None or not self._has_call(out, whole) or (before and OTHER not in out.lower().split(KEY)[0]):
                        continue
                    if message.get("content", "") is None:
                        blank = self._render([*start, *(before or []), {**message, "content": ""}, *rest], tools) or ""
                        if out.count("None") > blank.count("None"):
                            continue  # printed
                    return True
        return False

    def _has_call(self, out: str, whole: bool) -> bool:
        seen = out.lower()
        if SPELLED[:CUT] in seen:
            self._spells = True
            return False
        words = KEY in seen and VALUE in seen
        if not whole or self._arguments is self._object:
            return words
        return TEXT in out or TEXT[::-1] in out or (self._spells and words)  # changed on the way: escaped, in capitals

    def _call(self, empty: Empty, arguments: Any) -> Message:
        call = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": arguments}}
        return {**with_empty({"role": "assistant"}, empty), "tool_calls": [call]}


def _saying(role: str, form: Form) -> Message:
    content = formed([FIRST, SECOND] if form == "parts" else [FIRST], frozenset({form}))
    if not isinstance(content, str):
        content = [{**part, PART_KEY: PART_KEY} for part in content]
    extra = {"name": NAME, "tool_call_id": CALL_ID} if role in ("tool", "function") else {}
    return {"role": role, "content": content, **extra}


def _legacy(arguments: Any) -> Message:
    return {"role": "assistant", "content": "", "function_call": {"name": NAME, "arguments": arguments}}


def _other(role: str, form: Form) -> Message:
    return {"role": role, "content": formed([OTHER], frozenset({form}))}


def _result(form: Form) -> Message:
    return {**_other("tool", form), "name": NAME, "tool_call_id": CALL_ID}
