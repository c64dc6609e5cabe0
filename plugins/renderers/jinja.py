"""Hugging Face chat templates.

What it is: a Jinja renderer in an immutable sandbox, with the environment that chat templates are written for (trim_blocks, lstrip_blocks,
loop controls, `generation` blocks, tojson that keeps HTML characters, raise_exception, strftime_now, the tokenizer's special tokens as
globals); plain data only; bounded in output size and, as far as Jinja lets us, in time: the clock is looked at on every call, attribute,
item and output of the template, and products of strings are bounded. That is enough for templates that come with a model; a request's may
mean ill, and is rendered where it can do no harm (core/processes/templates.py).
What it does not know: tokenizers, requests, which messages are sensible.
Source of the environment: the "Chat templates" chapter of the Transformers documentation.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from penstock.core.actors.text.chat import Shape, cut_at_mark, mark_final, prepare
from penstock.core.protocol.errors import CheckpointError, ConfigError, InvalidRequest, PenstockError, described
from penstock.core.protocol.model_files import optional_object, read_text
from penstock.plugins.renderers.probe import shape_of

MAX_RENDERED_CHARS = 32 << 20
RENDER_TIMEOUT_S = 5.0
REMEMBERED = 16
"""Templates of requests that stay compiled."""
MAX_PRODUCT = 1 << 22
"""Largest string or list that `*` may make in a template."""


FAILURES = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, MemoryError)
"""What a template's code may raise of its own."""


class Refused(jinja2.TemplateError):
    """The template's own raise_exception."""


class TooSlow(jinja2.TemplateError):
    pass


class TooLong(jinja2.TemplateError):
    pass


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; for inference it is only its body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class SafeNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not store {name!r} in a namespace")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a deadline. `deadline` belongs to the rendering thread."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self._local = threading.local()
        self.filters["tojson"] = tojson
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now
        self.globals["namespace"] = SafeNamespace

    def start(self, timeout_s: float) -> None:
        self._local.deadline = time.monotonic() + timeout_s

    def tick(self) -> None:
        if time.monotonic() > getattr(self._local, "deadline", float("inf")):
            raise TooSlow("the chat template ran out of time")

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.tick()
        return super().getattr(obj, attribute)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as in Jinja: templates may pass self=
        __self.tick()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "**" and not (isinstance(left, (int, float)) and isinstance(right, (int, float)) and abs(right) <= 64):
            raise SecurityError("this power is too large for a chat template")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int) and len(many) * times > MAX_PRODUCT:
                    raise SecurityError("this product is too large for a chat template")
        return super().call_binop(context, operator, left, right)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise Refused(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class JinjaRenderer:
    """`templates` by name: "default", and "tool_use" for conversations with tools. `special` are the tokenizer's special tokens by name.
    `whose`: given by the checkpoint, by --chat-template, or by a request."""

    def __init__(
        self,
        templates: dict[str, str],
        special: dict[str, str],
        *,
        max_chars: int = MAX_RENDERED_CHARS,
        timeout_s: float = RENDER_TIMEOUT_S,
        whose: Literal["model", "option", "request"] = "model",
        origins: Mapping[str, Path] | None = None,
    ) -> None:
        self._environment = ChatEnvironment()
        self._special = special
        self._max_chars = max_chars
        self._timeout_s = timeout_s
        self._at_fault = "chat_template" if whose == "request" else "messages"
        self.templates = templates
        self._compiled: dict[str, tuple[jinja2.Template, Shape]] = {}
        for name, source in templates.items():
            try:
                compiled = self._environment.from_string(source)
            except (jinja2.TemplateSyntaxError, *FAILURES) as error:
                raise _not_jinja(error, name, whose, (origins or {}).get(name)) from None
            self._compiled[name] = (compiled, self._shape_of(compiled, source))
        self._others = functools.lru_cache(maxsize=REMEMBERED)(self._other)

    @classmethod
    def load(cls, model_path: str, template: str | None) -> JinjaRenderer:
        """From a checkpoint folder; `template` (a file, or the text itself) replaces the model's."""
        from penstock.plugins.tokenizers.folder import special_texts  # late: it brings the tokenizers library

        folder = Path(model_path)
        config = optional_object(folder / "tokenizer_config.json")
        found, origins = ({"default": given_template(template)}, {}) if template else _own(folder, config)
        return cls(
            found,
            special_texts(folder),
            whose="option" if template else "model",
            origins={name: origins.get(name, folder / "tokenizer_config.json") for name in found},
        )

    def with_template(self, template: str) -> JinjaRenderer:
        return self._others(template)

    def _other(self, template: str) -> JinjaRenderer:
        return JinjaRenderer({"default": template}, self._special, max_chars=self._max_chars, timeout_s=self._timeout_s, whose="request")

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: dict[str, Any],
    ) -> str:
        if not self._compiled:
            raise InvalidRequest(
                "This model has no chat template. Use /v1/completions, or start the server with --chat-template.", param="messages"
            )
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest("add_generation_prompt and continue_final_message exclude each other.", param="continue_final_message")
        reserved = kwargs.keys() & {"messages", "tools", "add_generation_prompt", "continue_final_message"}
        if reserved:
            raise InvalidRequest(f"chat_template_kwargs may not set {sorted(reserved)[0]!r}.", param="chat_template_kwargs")
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        template, shape = self._compiled.get(name) or next(iter(self._compiled.values()))
        plain = prepare(messages, shape)
        values = {"documents": None, **self._special, **kwargs, "tools": tools, "add_generation_prompt": add_generation_prompt}
        self._environment.start(self._timeout_s)
        try:
            rendered = self._run(template, plain, values, continue_final_message)
        except InvalidRequest:
            # Past arguments that are no object are in a form that its probes liked. It may like the other one here.
            other = prepare(messages, msgspec.structs.replace(shape, loose=not shape.loose))
            if other == plain:
                raise
            rendered = self._run(template, other, values, continue_final_message)
        if shape.unclear:
            self._check_clear(rendered, lambda other: self._run(template, other, values, continue_final_message), messages, shape)
        return cut_at_mark(rendered) if continue_final_message else rendered

    @staticmethod
    def _check_clear(rendered: str, run: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]], shape: Shape) -> None:
        """Would arguments as a text give another prompt? Then nobody knows which the template means."""
        as_text = prepare(messages, msgspec.structs.replace(shape, arguments="text"))
        if as_text == prepare(messages, shape):
            return
        try:
            same = run(as_text) == rendered
        except InvalidRequest:
            same = False
        if not same:
            raise InvalidRequest(
                "This model's chat template looks into the arguments of earlier tool calls so that it may mean their text or the object in it,"
                " which differ. Leave those calls out, or start the server with another --chat-template.",
                param="messages",
            )

    def _run(self, template: jinja2.Template, messages: list[dict[str, Any]], values: dict[str, Any], continues: bool) -> str:
        try:
            return self._generate(template, {**values, "messages": mark_final(messages) if continues else messages})
        except Refused as error:
            raise InvalidRequest(f"The chat template refused the conversation: {error}", param="messages") from None
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"The chat template refused the conversation: {error}", param=self._at_fault) from None
        except MemoryError:
            raise InvalidRequest("The chat template takes too much memory.", param=self._at_fault) from None
        except FAILURES as error:
            raise InvalidRequest(f"The chat template failed on the conversation: {described(error)}"[:500], param=self._at_fault) from None

    def _generate(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        out: list[str] = []
        size = 0
        for piece in template.generate(**values):
            self._environment.tick()
            size += len(piece)
            if size > self._max_chars:
                raise TooLong(f"the rendered prompt is longer than {self._max_chars} characters")
            out.append(piece)
        return "".join(out)

    def _shape_of(self, template: jinja2.Template, source: str) -> Shape:
        """What the template takes. All that is rendered to find out has the time of one rendering; what was not asked by then is as usual."""
        self._environment.start(self._timeout_s)
        slow = False

        def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
            nonlocal slow
            if slow:
                return None
            generate = messages[-1]["role"] != "assistant"
            try:
                return self._generate(
                    template, {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generate, **self._special}
                )
            except TooSlow:
                slow = True
            except Exception:  # whatever it does, it does not take this shape
                pass
            return None

        return shape_of(render, source)


def _not_jinja(error: Exception, name: str, whose: Literal["model", "option", "request"], origin: Path | None = None) -> PenstockError:
    """What is wrong with a template that cannot be compiled. (Jinja works out what is constant in it.)"""
    if isinstance(error, jinja2.TemplateSyntaxError):
        why = f"is not valid Jinja: line {error.lineno}: {(error.message or '').rstrip('.')}."
    else:
        why = f"cannot be compiled: {type(error).__name__}: {error}"[:500]
    if whose == "request":
        return InvalidRequest(f"chat_template {why}", param="chat_template")
    if whose == "option":
        return ConfigError(f"--chat-template {why}", param="chat_template")
    source = f" in {origin}" if origin is not None else ""
    return CheckpointError(f"The chat template {name!r}{source} {why} Mend it there, or give another with --chat-template.", param="model")


def given_template(template: str) -> str:
    """--chat-template: a readable file's content, or the text itself."""
    if "{" not in template and "\n" not in template:
        path = Path(template)
        if not path.is_file():
            raise ConfigError(f"--chat-template {template} is neither a file nor a template.", param="chat_template")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"--chat-template {template} cannot be read: {why}.", param="chat_template") from None
    return template


def _own(folder: Path, config: dict[str, Any]) -> tuple[dict[str, str], dict[str, Path]]:
    """Templates, and the files that they come from where that is not tokenizer_config.json. chat_template.jinja wins over it, as in Transformers; named
    templates come as a list."""
    found: dict[str, str] = {}
    origins: dict[str, Path] = {}
    listed = config.get("chat_template")
    if not isinstance(listed, (str, list, NoneType)):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text or a list of named ones, but is {listed!r:.80}.",
            param="model",
        )
    if isinstance(listed, str):
        found["default"] = listed
    elif isinstance(listed, list):
        found.update(
            {item["name"]: item["template"] for item in listed if isinstance(item, dict) and "name" in item and "template" in item}
        )
    else:
        legacy = optional_object(folder / "chat_template.json").get("chat_template")
        if isinstance(legacy, str):
            found["default"], origins["default"] = legacy, folder / "chat_template.json"
    more = folder / "additional_chat_templates"
    if more.is_dir():
        for path in sorted(more.glob("*.jinja")):
            found[path.stem], origins[path.stem] = read_text(path), path
    own = folder / "chat_template.jinja"
    if own.is_file():
        found["default"], origins["default"] = read_text(own), own
    return found, origins
