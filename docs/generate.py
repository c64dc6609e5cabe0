"""Writes the pages that are made from code: configuration, hooks, actors and messages.

What it is: `python docs/generate.py` rewrites docs/{configuration,hooks,actors,metrics,rooms}.md; a test fails when they are stale.
What it does not know: mkdocs.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from penstock.core.cli import GROUP_TITLES
from penstock.core.contract.hookspecs import FormatSpec
from penstock.core.protocol import config, messages
from penstock.core.protocol import speculation as speculative
from penstock.core.protocol.foreign import FOREIGN
from penstock.core.protocol.wording import type_words
from penstock.core.telemetry import names as telemetry
from penstock.plugins.drafters import ALWAYS, register_drafters
from penstock.plugins.formats import BUILT_IN

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import make_hooks  # noqa: E402  # beside this file, which is no package
import make_http  # noqa: E402
import make_rooms  # noqa: E402

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
        "The standard `OTEL_*` variables configure tracing. `PENSTOCK_CACHE` is the folder of compiled CPU kernels and of tuned tiles, `PENSTOCK_CC` the former's compiler,"
        " and `PENSTOCK_KERNELS` chooses among them: `native` (the default) has all instructions of the processor, `avx2`, `avx512` and `avx512bf16`"
        " (x86-64) have those alone, and `reference` takes torch instead;"
        " `PENSTOCK_TILES` names the GPU's [table of tiles](tuning.md), or says `shipped`;"
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
    return "\n".join([*out, *formats(), *speculation(), *foreign()]) + "\n"


def formats() -> list[str]:
    """Built-in output formats."""
    out = [
        "",
        "## Output formats",
        "",
        "What `--tool-call-parser` and `--reasoning-parser` may name. Without them, the format is found from the chat template; `none` is no"
        " format. A plugin may add others ([hooks](hooks.md)). Where a format writes arguments without quotes, a value has the types that the"
        " tool's own schema gives it: a string stays one whatever it looks like, and what cannot be of these types is a string. The last column"
        " says in which formats calls may be asked for (`tool_choice`, `strict`: [tools](http.md#tools-and-reasoning)); with `properties by name`"
        " a function's `parameters` must be properties by name.",
    ]
    for title, roles in (("Calls of tools", ("tools", "both")), ("Reasoning", ("reasoning", "both"))):
        calls = title == "Calls of tools"
        out += ["", f"| {title} | other names | what it is |{' asked for |' if calls else ''}", "|---|---|---|" + ("---|" if calls else "")]
        for spec in sorted((spec for spec in BUILT_IN if spec.role in roles), key=lambda spec: spec.name):
            aliases = ", ".join(f"`{alias}`" for alias in spec.aliases)
            doc = spec.doc.replace("|", "\\|").replace("<", "&lt;")
            out.append(f"| `{spec.name}` | {aliases} | {doc} |" + (f" {asked(spec)} |" if calls else ""))
    return out


def asked(spec: FormatSpec) -> str:
    """May calls be asked for in this format (tool_choice, strict), and what is to be known of it?"""
    if spec.spelling is None:
        return "no"
    spelling = spec.spelling("")
    notes = ["yes"]
    if spelling.most is not None:
        notes.append(f"{spelling.most} call" if spelling.most == 1 else f"{spelling.most} calls")
    if spelling.arguments is not None:
        notes.append("properties by name")
    return "; ".join(notes)


def speculation() -> list[str]:
    """Fields of --speculative-config: which method reads which, found out by asking; and those of others."""
    methods = sorted({method for spec in register_drafters() for method in spec.methods})
    out = [
        "",
        "## Fields of `--speculative-config`",
        "",
        "What they mean is on the [page on speculation](speculation.md#options). A field that says nothing to the method it stands beside is refused by name. `methods` stands alone: it holds"
        " objects of these fields. A plugin's drafter reads what it likes; `options` is free for it.",
        "",
        f"| field | type | {' | '.join(f'`{method}`' for method in methods)} |",
        "|---|---|" + "---|" * len(methods),
    ]
    for name, kind in speculative.FIELDS.items():
        reads = " | ".join("reads" if reads_field(method, name) else "" for method in methods)
        out.append(f"| `{name}` | {type_words(kind).removeprefix('a ').removeprefix('an ')} | {reads} |")
    out += ["", "| vLLM's field | |", "|---|---|"]
    for name, (fine, why) in speculative.NEUTRAL.items():
        words = ", ".join(f"`{json.dumps(value)}`" for value in fine)
        out.append(f"| `{name}` | only {words}: {why} |")
    out += [f"| `{name}` | no effect: {why} |" for name, why in speculative.IDLE.items()]
    return out


def reads_field(method: str, name: str) -> bool:
    """Does its factory look at it?"""
    if name in ALWAYS:
        return True
    value: Any = {"options": {"x": 1}, "model": "x", "quantization": "int8"}.get(name, 1)
    asked = speculative.DraftConfig(**{"method": method, name: value})
    (spec,) = [spec for spec in register_drafters() if method in spec.methods]
    try:
        spec.factory(config=asked, parts=None, vocab=9, longest=9)
    except Exception as error:  # without parts most cannot go on
        return "says nothing to the method" not in str(error)
    return True


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


def actor_table() -> list[tuple[str, str, list[str], list[str]]]:
    """Name, process and default host, takes, gives. The gateway is an asyncio object: its row comes from the links' unions."""
    from penstock.core.actors import executor, kv, masks, sampler, scheduler, text
    from penstock.core.processes.supervisor import Supervisor
    from penstock.core.runtime.clock import FakeClock
    from penstock.plugins.policies.fcfs import FirstComeFirstServed

    def names(kinds: Iterable[type]) -> list[str]:
        return sorted(kind.__name__ for kind in kinds)

    rows = [
        ("root (`core/processes/supervisor.py`)", "root, task", names(Supervisor.takes), names(Supervisor.gives)),
        (
            "gateway (`transports/gateway.py`)",
            "edge, asyncio",
            names(set(get_args(messages.TextToEdge)) - LINK_ONLY),
            names(set(get_args(messages.EdgeToText)) - LINK_ONLY),
        ),
        ("text (`core/actors/text/`)", "text, task", names(text.TextActor.takes), names(text.TextActor.gives)),
    ]
    settings = scheduler.SchedulerSettings(
        engine=0, epoch=1, max_num_seqs=1, max_num_batched_tokens=1, max_model_len=1, block_size=1, num_blocks=1, grammars=True
    )
    cell = (
        scheduler.Scheduler(settings, FirstComeFirstServed(), FakeClock()),
        *(kv.KvManager, executor.Executor, sampler.Sampler(engine=0, epoch=1, masks=True), masks.Masks),
    )
    for party in cell:
        module = (party if isinstance(party, type) else type(party)).__module__.rsplit(".", 1)[1]
        where = "engine, thread" if party is masks.Masks else "engine, cell"
        rows.append((f"{module} (`core/actors/{module}.py`)", where, names(party.takes), names(party.gives)))
    return rows


def actors() -> str:
    out = [
        "# Actors and messages",
        NOTE,
        "An actor is a pure handler: `handle(message)` yields messages, owns its state, does no I/O and knows no loop. Where it needs an answer it"
        " writes `reply = yield Ask(question, ReplyType)`. Where it runs is a separate choice: in a *cell* several actors share one FIFO and"
        " run to completion; with `--wiring tasks` each has its own task and bounded mailbox. The same tests pass in both. An `Ask` reaches only actors of"
        " the same host. Plugins' actors (`register_actors`) have seats beside these; an Extension goes to the one that takes its kind, a WorkDone to its"
        " owner.",
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
    rows.append((f"penstock_{telemetry.PLACES[0]}_total", "counter", ("engine", "position"), telemetry.PLACES[1], ""))
    rows += [(f"penstock_{name}", "gauge", labels, text, "") for name, (labels, text) in telemetry.GAUGES.items()]
    for kept, (own, _, theirs, _, text) in telemetry.HISTOGRAMS.items():
        of = ("model",) if kept == telemetry.STEP_TOKENS else ("model", "class")
        rows.append((f"penstock_{own}", "histogram", of, text, f"`vllm:{theirs}`" if theirs else ""))
    for name, (kind, edge_labels, text) in telemetry.EDGE_METRICS.items():
        rows.append((name, kind, edge_labels, text, ""))
    for name, kind, labels, text, theirs in sorted(rows):
        out.append(f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text} | {theirs} |")
    return "\n".join(out) + "\n"


PAGES = {
    "configuration.md": configuration,
    "hooks.md": make_hooks.page,
    "actors.md": actors,
    "metrics.md": metrics,
    "rooms.md": make_rooms.page,
    "http.md": make_http.page,
}


def main() -> int:
    for name, make in PAGES.items():
        (HERE / name).write_text(make(), encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
