"""The page that is the plugin contract: hooks, specs, protocols, structs and errors, as their sources have them.

What it is: `page()`, made from signatures, types, defaults and docstrings, so that it cannot be out of date; docs/generate.py writes it. `objects()` is
the one list to be kept by hand: which classes a plugin author of each family meets. Tests hold that every field has its meaning, and that
every name in a type is explained.
What it does not know: how plugins are packaged and chosen (docs/plugins.md).
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any, NamedTuple, get_args

import msgspec

from penstock.core.contract import actors, devices, drafters, formats, grammars, hookspecs, policy, transports
from penstock.core.contract import text as text_api
from penstock.core.contract.families import FAMILIES
from penstock.core.protocol import calling, errors, messages, sampling, speculation

NOTE = "<!-- Made by docs/generate.py; edit the code, then run it. -->\n"

CHOSEN = {
    "models": "config.json's `architectures`",
    "quantizers": "config.json's `quantization_config`, or `--quantization`",
    "drafters": "`--speculative-config '{\"method\": WORD}'`",
    "tokenizers": "`matches(folder)`",
    "chat_renderers": "`matches(folder)`",
    "output_formats": "`--tool-call-parser NAME` and `--reasoning-parser NAME`, else `matches(template)`",
    "actors": "all are used",
    "commands": "always there",
}
"""How one of a family is chosen, where no option does."""

GATEWAY = ("soon_ready", "enter", "leave", "submit", "cancel", "park", "unpark", "query", "readiness", "accepts", "ages")
"""What a transport uses of it; the rest is for whoever dials."""

WORDS = {
    "I32, I64, F32, U8": "one-dimensional numpy arrays of int32, int64, float32, uint8 (`penstock.core.protocol.columns`, which has `i32(values)` and so on)",
    "Column": "any of these; the text says which",
    "Tensor": "torch.Tensor",
    "Progress": "`Callable[[float], None]`, called with the loaded fraction, 0 to 1",
    "Message": "any message of the [actors page](actors.md), from `penstock.core.protocol.messages`",
    "Config": "every option by its name (docs/configuration.md, underscores for hyphens), from `penstock.core.protocol.config`",
    "RopeType": ", ".join(f'"{name}"' for name in get_args(devices.RopeType)),
    "OnDisconnect": ", ".join(f'"{name}"' for name in get_args(messages.OnDisconnect)),
    "CancelCause": '"disconnect", "slow_client", "timeout", "drain" or "client"',
    "Scope, Receive, Send, Header": "ASGI's; a header is a pair of bytes",
    "Request, ASGIApp": "Litestar's",
    "Any, Callable, Mapping, Sequence, Iterable, Literal, Annotated, AbstractContextManager": "Python's own (typing, collections.abc, contextlib)",
}
"""What stands in types and is no class of this page."""


def objects() -> dict[str, tuple[Any, ...]]:
    """What the objects of each family look like: (a class or a function, or a class with the names of it that count)."""
    from penstock.core.runtime import actor
    from penstock.kernels.attention import api as attention_api
    from penstock.kernels.attention import layout
    from penstock.kernels.linear import scheme
    from penstock.plugins.attention import pages
    from penstock.plugins.drafters import api as drafting
    from penstock.plugins.models import api, builder
    from penstock.transports import frame, gateway, generation, request, surface, voice

    return {
        "devices": (
            *(
                devices.Device,
                devices.DeviceCapabilities,
                devices.RunnerConfig,
                devices.Runner,
                devices.MemoryTable,
                devices.refuse_columns,
            ),
            *(
                messages.Forward,
                messages.Sample,
                messages.SlotSampling,
                sampling.SamplingParams,
                sampling.StructuredOutputsParams,
                sampling.Beam,
                messages.StepDone,
                messages.LogprobColumns,
            ),
        ),
        "models": (
            api.Model,
            api.Stream,
            api.Program,
            api.Ops,
            builder.Builder,
            builder.Part,
            api.Stacked,
            api.Linear,
            api.Plain,
            api.Block,
        ),
        "attention_backends": (
            *(api.Attention, api.Columns, api.AttnCall, pages.Pages, pages.Cache),
            *(layout, layout.Scales, layout.read_kv, layout.write_kv, attention_api.paged_attention),
        ),
        "weight_sources": (api.Weights,),
        "quantizers": (api.Quantizer, scheme.Scheme, scheme.Quantised),
        "drafters": (
            drafting.Drafter,
            drafting.Parts,
            drafting.Seen,
            drafting.Proposal,
            drafters.HostDrafter,
            speculation.SpeculationConfig,
            speculation.DraftConfig,
        ),
        "schedule_policies": (policy.SchedulePolicy, policy.Waiting, policy.Running),
        "tokenizers": (text_api.Tokenizer,),
        "chat_renderers": (text_api.ChatRenderer, text_api.TemplatedRenderer),
        "grammars": (grammars.Grammars, grammars.Matcher),
        "output_formats": (formats.Splitter, formats.Fragment, formats.Opening, formats.Spelling, formats.Thinking),
        "transports": (
            *(transports.Transport, transports.Listener, transports.Application),
            *(
                (gateway.Gateway, GATEWAY),
                gateway.Sink,
                gateway.Batch,
                messages.Submit,
                messages.Grammar,
                calling.Calling,
                calling.Function,
                messages.TextDelta,
                messages.RowExtra,
            ),
            *(messages.TokenLogprobs, messages.Finished, messages.Limits, messages.Query, messages.Answer),
            *(
                (request.RequestContext, ()),
                (request.JsonReply, ("__init__", "add_headers")),
                request.context_of,
                request.check_json,
                request.read_body,
                request.error_reply,
                request.error_headers,
            ),
            *((surface.Surface, ("__init__", "body", "answer")), generation.Generation, voice.Voice, voice.Head, voice.Usage, voice.Prompt),
            *(voice.Pieces, voice.Choice, voice.ToolCall, frame.Frame, frame.Sse, frame.Carrier),
        ),
        "actors": (
            *(actors.Seat, actors.ActorContext, actors.Actor, actors.ActorPort, (actor.Ask, ("__init__",)), (actor.To, ("__init__",))),
            *(
                messages.Extension,
                messages.DeviceWork,
                messages.Move,
                messages.Control,
                messages.WorkDone,
                messages.EngineFacts,
                messages.Quality,
            ),
        ),
    }


class Member(NamedTuple):
    """A field, attribute or method, as its source has it."""

    name: str
    text: str
    doc: str
    is_method: bool


def members(kind: type) -> list[Member]:
    """Public fields and methods with their types, inherited ones of Penstock's first."""
    out: list[Member] = []
    for one in reversed(kind.__mro__):
        if not one.__module__.startswith("penstock."):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "ClassVar" not in ast.unparse(node.annotation):
                doc = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
                node.value = node.value and plain(node.value, one)
                text = f"{node.target.id}: {ast.unparse(node.annotation)}" + (f" = {ast.unparse(node.value)}" if node.value else "")
                out.append(Member(node.target.id, text, " ".join(str(doc).split()), False))
            elif isinstance(node, ast.FunctionDef) and any(ast.unparse(one) == "property" for one in node.decorator_list):
                text = f"{node.name}: {ast.unparse(node.returns)}" if node.returns else node.name
                out.append(Member(node.name, text, " ".join((ast.get_docstring(node) or "").split()), False))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                out.append(Member(node.name, signature(node, one), ast.get_docstring(node) or "", True))
    return out


def plain(value: ast.expr, where: Any) -> ast.expr:
    """A default as a reader needs it: constants of the module of `where` by their values, lists and dictionaries as such."""
    text = ast.unparse(value)
    if text.startswith("EMPTY_"):
        return ast.Name("empty")
    if isinstance(value, ast.Name) and text.isupper():
        return ast.Constant(getattr(inspect.getmodule(where), text))
    made = {"msgspec.field(default_factory=list)": ast.List([]), "msgspec.field(default_factory=dict)": ast.Dict([], [])}
    return made.get(text, value)


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, where: Any) -> str:
    name, result = node.name, f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if name == "__init__":
        name, result = where.__name__, ""
    node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
    node.args.defaults = [plain(value, where) for value in node.args.defaults]
    node.args.kw_defaults = [value and plain(value, where) for value in node.args.kw_defaults]
    awaited = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    called = "".join(f"@{kind} " for kind in map(ast.unparse, node.decorator_list) if kind in ("staticmethod", "classmethod"))
    return f"{called}{awaited}{name}({ast.unparse(node.args)}){result}"


def described(what: Any) -> list[str]:
    """A class or function with all that it has."""
    what, names = what if isinstance(what, tuple) else (what, None)
    doc = inspect.cleandoc(what.__doc__ or "")
    if inspect.ismodule(what):
        return ["", f"### `{what.__name__}`", "", doc]
    if not isinstance(what, type):
        (node,) = ast.parse(inspect.getsource(what)).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if doc.endswith("see the module."):
            doc = inspect.cleandoc(inspect.getmodule(what).__doc__ or "")
        return ["", f"### `{what.__name__}`", "", f"`{signature(node, what)}`, from `{what.__module__}`.", "", doc]
    kind = "protocol" if getattr(what, "_is_protocol", False) else "struct" if issubclass(what, msgspec.Struct) else "class"
    out = ["", f"### `{what.__name__}`", "", f"A {kind} of `{what.__module__}`.", "", doc]
    found = [member for member in members(what) if names or member.name == "__call__" or not member.name.startswith("_")]
    if names is not None:
        found = sorted((member for member in found if member.name in names), key=lambda member: names.index(member.name))
    fields = [member for member in found if not member.is_method]
    if fields:
        out += ["", *(f"- `{field.text}`" + (f": {field.doc}" if field.doc else "") for field in fields)]
    for method in found:
        if method.is_method:
            out += ["", f"**`{method.text}`**", *(["", method.doc] if method.doc else [])]
    return out


def page() -> str:
    out = [
        "# Hooks",
        NOTE,
        "The whole plugin contract. [Plugins](plugins.md) says how a plugin is packaged, installed, chosen and tested, and has a minimal one of"
        " each family; begin there.",
        "",
        "A plugin is a module or an object whose functions carry `@hookimpl` (from `penstock.core.contract.hookspecs`). It is found through an entry"
        " point in one of the groups `penstock.root`, `penstock.edge`, `penstock.text`, `penstock.engine`: it loads only in the processes"
        " that it names. Hooks run at start-up and at request boundaries, never in the step loop. What they register carries an `api_level`"
        " per family; this build accepts the current level and the one before. A hook takes its arguments by name, and may leave out those"
        " that it does not need. Objects need not inherit from the protocols: having their members is enough.",
        "",
        "## Levels",
        "",
        "| family | hook | entry-point group | api_level | chosen by |",
        "|---|---|---|---|---|",
    ]
    families = {one.name: (one.roles, one.hook) for one in FAMILIES.values()} | {"commands": (("root",), "register_commands")}
    for name, level in hookspecs.API_LEVEL.items():
        roles, hook = families[name]
        chosen = CHOSEN.get(name) or f"`{FAMILIES[name].flag}`"
        out.append(f"| {name} | `{hook}` | {', '.join(f'`penstock.{role}`' for role in roles)} | {level} | {chosen} |")
    out += ["", "## Hooks"]
    source = inspect.getsource(hookspecs)
    for name in re.findall(r"@hookspec(?:\([^)]*\))?\ndef (\w+)\(", source):
        function = getattr(hookspecs, name)
        first = "firstresult=True" in source.split(f"def {name}(")[0].rsplit("@hookspec", 1)[1]
        out += ["", f"### `{name}{inspect.signature(function)}`".replace("'", ""), "", inspect.cleandoc(function.__doc__ or "")]
        if first:
            out.append("The first answer that is not None wins; later plugins are asked before earlier and built-in ones.")
    out += described(hookspecs.RequestSummary)
    shared = (hookspecs.Spec, devices.ModelFacts, devices.RopeFacts)
    out += ["", "## What several families share", *(line for one in shared for line in described(one))]
    for name, found in objects().items():
        spec = FAMILIES[name].spec
        out += ["", f"## {name.replace('_', ' ').capitalize()}", *(line for one in (spec, *found) for line in described(one))]
    out += ["", "## Errors", "", "All from `penstock.core.protocol.errors`.", *described((errors.PenstockError, ("__init__",)))]
    out += ["", "| class | base | status | code | retryable | meaning |", "|---|---|---|---|---|---|"]
    for one in vars(errors).values():
        if isinstance(one, type) and issubclass(one, errors.PenstockError) and one is not errors.PenstockError:
            doc = " ".join((one.__doc__ or "").split()) if one.__doc__ != one.__mro__[1].__doc__ else ""
            out.append(f"| `{one.__name__}` | `{one.__mro__[1].__name__}` | {one.status} | {one.default_code} | {one.retryable} | {doc} |")
    out += ["", "## Words in types", "", "| word | what it is |", "|---|---|", *(f"| {word} | {text} |" for word, text in WORDS.items())]
    return "\n".join(out) + "\n"
