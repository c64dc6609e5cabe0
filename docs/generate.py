"""Writes the pages that are made from code: configuration, hooks, actors and messages.

What it is: `python docs/generate.py` rewrites docs/{configuration,hooks,actors,metrics}.md; a test fails when they are stale.
What it does not know: mkdocs.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from penstock.core import config, device_api, errors, hookspecs, messages, plugin_guard, plugin_host, policy, sampling, text_api
from penstock.core import telemetry_metrics as telemetry
from penstock.core.cli import GROUP_TITLES
from penstock.core.foreign import FOREIGN

HERE = Path(__file__).parent
LINK_ONLY = {messages.Hello, messages.Extension}
NOTE = "<!-- Made by docs/generate.py; edit the code, then run it. -->\n"


def configuration() -> str:
    out = [
        "# Configuration",
        NOTE,
        "Every option has one name in four places: the flag (`--max-num-seqs`), the environment (`PENSTOCK_MAX_NUM_SEQS`), a TOML file"
        " (`max_num_seqs`, at the top or in a table named like its group; `--config FILE` or `PENSTOCK_CONFIG`), and the Python API"
        " (`LLM(max_num_seqs=...)`). The flag wins over the environment, the environment over the file, the file over the default."
        " Unknown names are errors that name the nearest known one. Sizes take `k m g` (thousands) and `K M G` (1024s)."
        " A list option takes one value a time: given again it adds, and commas split (`--api-key A --api-key B,C` is three keys)."
        " `--no-NAME`, `--NAME=false` and `--NAME false` turn a switch off. A JSON option may be given in parts:"
        " `--hf-overrides.rope_theta 1000000` (Python and TOML may give a dictionary).",
        "",
        "The command line can be read by other users of the machine. API keys are better kept in a file (`--api-key-file`: one a line, `#`"
        " begins a comment) or in the environment (`PENSTOCK_API_KEY`, commas split; or `VLLM_API_KEY`, one key, where the former is not set).",
        "",
        "The standard `OTEL_*` variables configure tracing. `PENSTOCK_CACHE` is the folder of compiled CPU kernels, `PENSTOCK_CC` their compiler,"
        " and `PENSTOCK_KERNELS=reference` takes torch instead of them;"
        " `PENSTOCK_TRACE_HOOKS=1` prints every hook call.",
    ]
    for group, title in GROUP_TITLES.items():
        rows = [o for o in config.OPTIONS.values() if o.group == group]
        out += ["", f"## {title}", "", "| flag | other spellings | default | meaning |", "|---|---|---|---|"]
        for o in rows:
            names = [f"--{name}" for name in (*o.aliases, *([o.extra["no"]] if o.extra.get("no") else []))]
            aliases = ", ".join(f"`{name}`" for name in (*names, *([o.extra["short"]] if "short" in o.extra else [])))
            doc = o.doc.replace("|", "\\|")
            if o.choices:
                doc += " (" + ", ".join(f"`{c}`" for c in o.choices) + ")"
            default = "" if o.default in (None, []) else f"`{o.default}`"
            out.append(f"| `{o.flag}` | {aliases} | {default} | {doc} |")
    return "\n".join([*out, *foreign()]) + "\n"


def foreign() -> list[str]:
    """Options of others, by what becomes of them and why."""
    out = [
        "",
        "## Options of vLLM and SGLang that Penstock does not have",
        "",
        "They are known, on the command line and in the Python API. Those of the first table cannot change an answer: they are taken, with a"
        " warning that says why they have no effect (without one where they ask for what Penstock does anyway). Those of the second are"
        " refused, unless their value asks for what Penstock does anyway.",
    ]
    for refused, title in ((False, "no effect, because"), (True, "refused, because")):
        reasons: dict[str, list[str]] = {}
        for row in FOREIGN.values():
            if row.refused is refused:
                reasons.setdefault(row.reason, []).append(", ".join(f"`{flag}`" for flag in (row.flag, *row.shorts)))
        out += ["", f"| option | {title} |", "|---|---|"]
        out += [f"| {', '.join(flags)} | {reason} |" for reason, flags in reasons.items()]
    return out


# ------------------------------------------------------------------ hooks

CHOSEN = {
    "models": "config.json's `architectures`",
    "tokenizers": "`matches(folder)`",
    "chat_renderers": "`matches(folder)`",
    "commands": "always there",
}
"""How one of a family is chosen, where no option does."""

GATEWAY = ("soon_ready", "enter", "leave", "submit", "cancel", "park", "unpark", "query", "readiness", "accepts", "ages")
"""What a transport uses of it; the rest is for whoever dials."""

WORDS = {
    "I32, I64, F32, U8": "one-dimensional numpy arrays of int32, int64, float32, uint8 (`penstock.core.columns`, which has `i32(values)` and so on)",
    "Column": "any of these; the text says which",
    "Tensor": "torch.Tensor",
    "Progress": "`Callable[[float], None]`, called with the loaded fraction, 0 to 1",
    "Config": "every option by its name (docs/configuration.md, underscores for hyphens), from `penstock.core.config`",
    "RopeType": ", ".join(f'"{name}"' for name in get_args(device_api.RopeType)),
    "CancelCause": '"disconnect", "slow_client", "timeout", "drain" or "client"',
    "Scope, Receive, Send, Header": "ASGI's; a header is a pair of bytes",
    "Any, Callable, Sequence, Iterable, Literal, Annotated, AbstractContextManager": "Python's own (typing, collections.abc, contextlib)",
}
"""What stands in types and is no class of this page."""


def objects() -> dict[str, tuple[Any, ...]]:
    """What the objects of each family look like: (a class or a function, or a class with the names of it that count)."""
    from penstock.kernels.attention import api as attention_api
    from penstock.kernels.attention import layout
    from penstock.plugins.devices import cuda_model, cuda_ops
    from penstock.plugins.models import api
    from penstock.transports import gateway, request

    return {
        "devices": (
            *(device_api.Device, device_api.DeviceCapabilities, device_api.RunnerConfig, device_api.Runner, device_api.MemoryTable),
            *(
                messages.Forward,
                messages.Sample,
                messages.SlotSampling,
                sampling.SamplingParams,
                messages.StepDone,
                messages.LogprobColumns,
            ),
        ),
        "models": (api.Model, api.Program, cuda_model.DeviceDecoder),
        "attention_backends": (
            *(api.Attention, layout, layout.read_kv, layout.write_kv, attention_api.paged_attention),
            *(cuda_ops.Ops, cuda_ops.Columns, cuda_ops.Settings),
        ),
        "weight_sources": (api.Weights,),
        "schedule_policies": (policy.SchedulePolicy, policy.Waiting, policy.Running),
        "tokenizers": (text_api.Tokenizer,),
        "chat_renderers": (text_api.ChatRenderer,),
        "transports": (
            *((gateway.Gateway, GATEWAY), gateway.Sink, gateway.Batch, messages.Submit, messages.TextDelta, messages.RowExtra),
            *(messages.TokenLogprobs, messages.Finished, messages.Limits, messages.Query, messages.Answer),
            *(
                (request.RequestContext, ()),
                (request.JsonReply, ("__init__", "add_headers")),
                request.context_of,
                request.check_json,
                request.read_body,
                request.error_reply,
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
    node.args.args = [argument for argument in node.args.args if argument.arg != "self"]
    node.args.defaults = [plain(value, where) for value in node.args.defaults]
    node.args.kw_defaults = [value and plain(value, where) for value in node.args.kw_defaults]
    awaited = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{awaited}{name}({ast.unparse(node.args)}){result}"


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


def hooks() -> str:
    out = [
        "# Hooks",
        NOTE,
        "The whole plugin contract. [Plugins](plugins.md) says how a plugin is packaged, installed, chosen and tested, and has a minimal one of"
        " each family; begin there.",
        "",
        "A plugin is a module or an object whose functions carry `@hookimpl` (from `penstock.core.hookspecs`). It is found through an entry"
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
    families = {name: (role, hook) for name, (role, hook, _) in plugin_host.FAMILIES.items()} | {"commands": ("root", "register_commands")}
    for name, level in hookspecs.API_LEVEL.items():
        role, hook = families[name]
        chosen = CHOSEN.get(name) or f"`{plugin_guard.FLAGS[name]}`"
        out.append(f"| {name} | `{hook}` | `penstock.{role}` | {level} | {chosen} |")
    out += ["", "## Hooks"]
    source = inspect.getsource(hookspecs)
    for name in re.findall(r"@hookspec(?:\([^)]*\))?\ndef (\w+)\(", source):
        function = getattr(hookspecs, name)
        first = "firstresult=True" in source.split(f"def {name}(")[0].rsplit("@hookspec", 1)[1]
        out += ["", f"### `{name}{inspect.signature(function)}`".replace("'", ""), "", inspect.cleandoc(function.__doc__ or "")]
        if first:
            out.append("The first answer that is not None wins; later plugins are asked before earlier and built-in ones.")
    out += described(hookspecs.RequestSummary)
    shared = (hookspecs.Spec, device_api.ModelFacts, device_api.RopeFacts)
    out += ["", "## What several families share", *(line for one in shared for line in described(one))]
    for name, found in objects().items():
        spec = plugin_host.FAMILIES[name][2]
        out += ["", f"## {name.replace('_', ' ').capitalize()}", *(line for one in (spec, *found) for line in described(one))]
    out += ["", "## Errors", "", "All from `penstock.core.errors`.", *described((errors.PenstockError, ("__init__",)))]
    out += ["", "| class | base | status | code | retryable | meaning |", "|---|---|---|---|---|---|"]
    for one in vars(errors).values():
        if isinstance(one, type) and issubclass(one, errors.PenstockError) and one is not errors.PenstockError:
            doc = " ".join((one.__doc__ or "").split()) if one.__doc__ != one.__mro__[1].__doc__ else ""
            out.append(f"| `{one.__name__}` | `{one.__mro__[1].__name__}` | {one.status} | {one.default_code} | {one.retryable} | {doc} |")
    out += ["", "## Words in types", "", "| word | what it is |", "|---|---|", *(f"| {word} | {text} |" for word, text in WORDS.items())]
    return "\n".join(out) + "\n"


def actor_table() -> list[tuple[str, str, list[str], list[str]]]:
    """Name, process and default host, takes, gives. The gateway is an asyncio object: its row comes from the links' unions."""
    from penstock.core.actors import executor, kv, sampler, scheduler, text
    from penstock.core.supervisor import Supervisor

    def names(kinds: Iterable[type]) -> list[str]:
        return sorted(kind.__name__ for kind in kinds)

    rows = [
        ("root (`core/supervisor.py`)", "root, task", names(Supervisor.takes), names(Supervisor.gives)),
        (
            "gateway (`transports/gateway.py`)",
            "edge, asyncio",
            names(set(get_args(messages.TextToEdge)) - LINK_ONLY),
            names(set(get_args(messages.EdgeToText)) - LINK_ONLY),
        ),
        ("text (`core/actors/text/`)", "text, task", names(text.TextActor.takes), names(text.TextActor.gives)),
    ]
    for kind in (scheduler.Scheduler, kv.KvManager, executor.Executor, sampler.Sampler):
        module = kind.__module__.rsplit(".", 1)[1]
        rows.append((f"{module} (`core/actors/{module}.py`)", "engine, cell", names(kind.takes), names(kind.gives)))
    return rows


def actors() -> str:
    out = [
        "# Actors and messages",
        NOTE,
        "An actor is a pure handler: `handle(message)` yields messages, owns its state, does no I/O and knows no loop. Where it needs an answer it"
        " writes `reply = yield Ask(question, ReplyType)`. Where it runs is a separate choice: in a *cell* several actors share one FIFO and"
        " run to completion; with `--wiring tasks` each has its own task and bounded mailbox. The same tests pass in both.",
        "",
        "| actor | process | takes | gives |",
        "|---|---|---|---|",
    ]
    for name, process, takes, gives in actor_table():
        out.append(f"| {name} | {process} | {', '.join(sorted(takes))} | {', '.join(sorted(gives))} |")
    out += ["", "## Messages", "", "Columns are one-dimensional numpy arrays; on a link they are one msgpack extension value each.", ""]
    for kind in messages.message_types():
        fields = ", ".join(f"`{f}`" for f in kind.__struct_fields__)
        out += [f"### {kind.__name__}", "", inspect.cleandoc(kind.__doc__ or ""), "", f"Fields: {fields or 'none'}.", ""]
    return "\n".join(out).rstrip() + "\n"


def metrics() -> str:
    out = [
        "# Metrics",
        NOTE,
        "`GET /metrics` is Prometheus text for the whole server, whichever edge answers: text keeps the numbers and adds up what the edges and"
        " engines send. Each event is counted in one place. With `--metrics-compat vllm` (the default) the same numbers are there under vLLM's"
        " names too.",
        "",
        "| name | kind | labels | meaning | vLLM's name |",
        "|---|---|---|---|---|",
    ]
    rows: list[tuple[str, str, Iterable[str], str, str]] = []
    rows += [(f"penstock_{name}_total", "counter", labels, text, "") for name, (labels, text) in telemetry.COUNTERS.items()]
    rows += [(f"penstock_{name}_total", "counter", ("engine",), text, "") for name, (_, text) in telemetry.ENGINE_COUNTERS.items()]
    rows += [(f"penstock_{name}", "gauge", labels, text, "") for name, (labels, text) in telemetry.GAUGES.items()]
    for own, _, theirs, _, text in telemetry.HISTOGRAMS.values():
        rows.append((f"penstock_{own}", "histogram", ("model",), text, f"`vllm:{theirs}`" if theirs else ""))
    for name, (kind, edge_labels, text) in telemetry.EDGE_METRICS.items():
        rows.append((name, kind, edge_labels, text, ""))
    for name, kind, labels, text, theirs in sorted(rows):
        out.append(f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text} | {theirs} |")
    return "\n".join(out) + "\n"


PAGES = {"configuration.md": configuration, "hooks.md": hooks, "actors.md": actors, "metrics.md": metrics}


def main() -> int:
    for name, make in PAGES.items():
        (HERE / name).write_text(make(), encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
