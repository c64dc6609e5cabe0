"""The `penstock bench` commands: serve (a client load over HTTP), throughput and latency (the engine in process), footprint, grammars, speculation, machinery, streams, compare.

What it is: options, the run, the output. What it does not know: percentiles (report.py), sockets (client.py), lengths (workload.py).
It is long because each command stands here with its options.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.plugins.commands.bench.compare.command import compare

if TYPE_CHECKING:
    from penstock.plugins.commands.bench.client import Client, Record
    from penstock.plugins.commands.bench.workload import Workload

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@click.group()
def bench() -> None:
    """Measure a server or the engine. Lengths come from a fixed seed; figures are printed and, with --json, kept."""


bench.add_command(compare)

COUNT = click.IntRange(min=1)
AMOUNT = click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)


def length_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How many requests, and how long: of benchmarks that draw lengths."""
    options: list[Decorator] = [
        click.option("--requests", type=COUNT, default=64, show_default=True, help="How many requests."),
        click.option("--input-len", type=COUNT, help="Fixed prompt length; default: ShareGPT-like lengths."),
        click.option("--output-len", type=COUNT, help="Fixed output length; default: ShareGPT-like lengths."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def shape_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every load shares."""
    options: list[Decorator] = [
        click.option("--prefix-len", type=AMOUNT, default=0, show_default=True, help="Tokens of a shared prefix before each prompt."),
        click.option("--prefixes", type=COUNT, default=1, show_default=True, help="How many distinct shared prefixes."),
        click.option("--seed", default=0, show_default=True, help="Seed of lengths, ids and arrivals."),
        click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Append the figures here, one JSON object a line."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def make_load(**settings: Any) -> Workload:
    """workload.make, whose refusals become those of the command line."""
    from penstock.plugins.commands.bench import workload

    try:
        return workload.make(**settings)
    except workload.DoesNotFit as error:
        raise click.UsageError(f"{error}. Lower --prefix-len, --input-len or --output-len.") from None


def write_json(path: str | None, kind: str, settings: dict[str, Any], result: dict[str, Any]) -> None:
    if path is None:
        return
    import datetime

    from penstock.version import __version__

    row = {
        "bench": kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "penstock": __version__,
        "cores": os.cpu_count(),
        "settings": settings,
        **result,
    }
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


async def run_load(client: Client, load: Workload, concurrency: int | None, on_done: Callable[[], None]) -> tuple[list[Record], float]:
    """Send every request at its time, at most `concurrency` at once. Returns records and wall seconds."""
    import asyncio
    import time

    from penstock.plugins.commands.bench.client import Record

    gate = asyncio.Semaphore(concurrency) if concurrency else None
    start = time.perf_counter()

    async def one(index: int) -> Record:
        request = load.requests[index]
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - start)))
        record = Record(scheduled=request.at)
        if gate is None:
            await client.complete(record, request.prompt, request.output, start)
        else:
            async with gate:
                await client.complete(record, request.prompt, request.output, start)
        on_done()
        return record

    records = await asyncio.gather(*(one(i) for i in range(len(load.requests))))
    return list(records), time.perf_counter() - start


def _address(context: click.Context, option: click.Parameter, url: str) -> str:
    from penstock.plugins.commands.bench.client import Client

    try:
        url.encode()
        Client(url)
    except ValueError as error:  # UnicodeError among them
        raise click.BadParameter(f"{error}.") from None
    return url


@bench.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, callback=_address, help="Base URL of an OpenAI server.")
@click.option("--start", is_flag=True, help="Start a Penstock server for this run (words after -- go to `penstock serve`).")
@click.option(
    "--naive", is_flag=True, help="Also measure naive serving (one request at a time, no prefix cache) and print the ratio; needs --start."
)
@click.option("--model", help="Model name; default: the server's first.")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Key for the server; others can read a command line.")
@click.option(
    "--vocab", type=click.IntRange(min=17), help="Prompt ids are drawn below this; default: what the server's tokenizer says, else 4096."
)
@click.option(
    "--request-rate", type=POSITIVE, default=math.inf, show_default=True, help="Mean arrivals a second (Poisson); inf: all at once."
)
@click.option("--burstiness", type=POSITIVE, default=1.0, show_default=True, help="1: Poisson; larger: more regular arrivals.")
@click.option("--concurrency", type=COUNT, help="Most requests at once.")
@click.option("--slo", multiple=True, help="Objective in ms for goodput: ttft:500, itl:50, e2e:3000 (repeatable).")
@click.option("--plain", is_flag=True, help="Ask for text alone, no token ids or usage in each chunk: what most programs do, and cheaper.")
@click.option("--warmup", type=AMOUNT, default=2, show_default=True, help="Requests sent first, not counted.")
@length_options
@shape_options
@click.argument("serve_args", nargs=-1, type=click.UNPROCESSED)
def serve(
    url: str,
    start: bool,
    naive: bool,
    model: str | None,
    api_key: str | None,
    vocab: int | None,
    request_rate: float,
    burstiness: float,
    concurrency: int | None,
    slo: tuple[str, ...],
    plain: bool,
    warmup: int,
    requests: int,
    input_len: int | None,
    output_len: int | None,
    prefix_len: int,
    prefixes: int,
    seed: int,
    json_file: str | None,
    serve_args: tuple[str, ...],
) -> None:
    """Client load over HTTP against any OpenAI server: TTFT, ITL, E2E, goodput."""
    from rich.progress import Progress

    from penstock.plugins.commands.bench import report
    from penstock.plugins.commands.bench.client import Client
    from penstock.plugins.commands.bench.client import run as on_loop
    from penstock.plugins.commands.bench.server import started

    if naive and not start:
        raise click.UsageError("--naive starts two servers in turn, so it needs --start.")
    if serve_args and not start:
        raise click.UsageError("The words after -- go to `penstock serve`, so they need --start.")
    try:
        objectives = report.parse_slo(slo)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--slo") from None

    async def measure(base: str, limit: int | None) -> dict[str, Any]:
        client = Client(base, key=api_key, plain=plain)
        name, context = await client.first_model()
        client.model = model or name
        size = vocab or await vocabulary(client)
        settings: dict[str, Any] = {"input_len": input_len, "output_len": output_len, "prefix_len": prefix_len, "prefixes": prefixes}
        if warmup:
            first = make_load(count=warmup, vocab=size, seed=seed + 1000, max_len=context, **settings)
            await run_load(client, first, limit, lambda: None)
        load = make_load(count=requests, vocab=size, seed=seed, rate=request_rate, burstiness=burstiness, max_len=context, **settings)
        with Progress(transient=True) as bar:
            task = bar.add_task("requests", total=requests)
            records, wall = await run_load(client, load, limit, lambda: bar.advance(task))
        return report.summarise(records, wall, objectives)

    settings = {
        "url": None if start else url,
        "serve_args": list(serve_args),
        "requests": requests,
        "request_rate": None if math.isinf(request_rate) else request_rate,
        "concurrency": concurrency,
        "plain": plain,
        "input_len": input_len,
        "output_len": output_len,
        "prefix_len": prefix_len,
        "prefixes": prefixes,
        "seed": seed,
    }
    try:
        if start:
            with started([*serve_args]) as base:
                result = on_loop(measure(base, concurrency))
            report.show("tuned" if naive else "penstock", result)
            write_json(json_file, "serve", settings, result)
            if naive:
                with started([*serve_args, "--no-enable-prefix-caching", "--max-num-seqs", "1"]) as base:
                    slow = on_loop(measure(base, 1))
                report.show("naive: one request at a time, no prefix cache", slow)
                ratio = result["output_tokens_per_s"] / slow["output_tokens_per_s"]
                click.echo(f"tuned / naive: {ratio:.2f}x output tokens/s")
                write_json(json_file, "serve-naive", settings, {**slow, "tuned_over_naive": ratio})
        else:
            result = on_loop(measure(url, concurrency))
            report.show(url, result)
            write_json(json_file, "serve", settings, result)
    except OSError as error:
        raise click.ClickException(f"No OpenAI server answers at {url} ({error}). Start one, or use --start.") from None
    if result["failed"]:
        raise SystemExit(1)


async def vocabulary(client: Client) -> int:
    """The server's vocabulary size, where it says so."""
    status, info = await client.get("/tokenizer_info")
    if status == 200 and isinstance(info, dict) and isinstance(info.get("vocab_size"), int):
        return int(info["vocab_size"])
    return 4096


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.argument("serve_args", nargs=-1, type=click.UNPROCESSED)(function)
    return click.option("--model", help="Model folder; default: the demo model.")(function)


def make_llm(model: str | None, serve_args: tuple[str, ...]) -> Any:
    """An in-process engine from the same flags that `penstock serve` takes."""
    from penstock.core.cli import parse_serve_args
    from penstock.core.llm import LLM

    return LLM(config=parse_serve_args([*([model] if model else []), *serve_args]))


@bench.command()
@engine_options
@length_options
@shape_options
def throughput(
    model: str | None,
    requests: int,
    input_len: int | None,
    output_len: int | None,
    prefix_len: int,
    prefixes: int,
    seed: int,
    json_file: str | None,
    serve_args: tuple[str, ...],
) -> None:
    """All requests at once through the engine in process: tokens/s."""
    import time

    from penstock.core.protocol.sampling import SamplingParams

    with make_llm(model, serve_args) as llm:
        facts = llm.facts
        load = make_load(
            count=requests,
            vocab=facts.vocab_size,
            seed=seed,
            input_len=input_len,
            output_len=output_len,
            prefix_len=prefix_len,
            prefixes=prefixes,
            max_len=facts.max_model_len,
        )
        params = [SamplingParams(temperature=0, max_tokens=r.output, ignore_eos=True) for r in load.requests]
        llm.generate(prompt_token_ids=[load.requests[0].prompt[:16]], sampling_params=SamplingParams(temperature=0, max_tokens=4))
        start = time.perf_counter()
        outputs = llm.generate(prompt_token_ids=[r.prompt for r in load.requests], sampling_params=params, use_tqdm=True)
        wall = time.perf_counter() - start
    made = sum(len(o.outputs[0].token_ids) for o in outputs)
    result = {
        "requests": requests,
        "wall_s": wall,
        "prompt_tokens": load.input_tokens,
        "output_tokens": made,
        "output_tokens_per_s": made / wall,
        "total_tokens_per_s": (made + load.input_tokens) / wall,
        "requests_per_s": requests / wall,
    }
    click.echo(
        f"{requests} requests in {wall:.2f} s: {result['requests_per_s']:.2f} requests/s, {result['output_tokens_per_s']:.1f} output tokens/s,"
        f" {result['total_tokens_per_s']:.1f} tokens/s in all"
    )
    lengths = {"input_len": input_len, "output_len": output_len, "prefix_len": prefix_len, "prefixes": prefixes}
    write_json(json_file, "throughput", {"model": model, "serve_args": list(serve_args), "seed": seed, **lengths}, result)


@bench.command()
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Sequences at once.")
@click.option("--repeats", type=COUNT, default=5, show_default=True, help="Counted repeats, after one warm-up.")
@click.option("--input-len", type=COUNT, default=32, show_default=True, help="Prompt length.")
@click.option("--output-len", type=COUNT, default=128, show_default=True, help="Output length.")
@engine_options
@shape_options
def latency(
    batch_size: int,
    repeats: int,
    input_len: int,
    output_len: int,
    model: str | None,
    prefix_len: int,
    prefixes: int,
    seed: int,
    json_file: str | None,
    serve_args: tuple[str, ...],
) -> None:
    """One batch at a time through the engine in process: seconds a batch, tokens/s a sequence."""
    import time

    from penstock.core.protocol.sampling import SamplingParams
    from penstock.plugins.commands.bench import report

    walls = []
    with make_llm(model, serve_args) as llm:
        facts = llm.facts
        for repeat in range(repeats + 1):
            load = make_load(
                count=batch_size,
                vocab=facts.vocab_size,
                seed=seed + repeat,
                input_len=input_len,
                output_len=output_len,
                prefix_len=prefix_len,
                prefixes=prefixes,
                max_len=facts.max_model_len,
            )
            params = [SamplingParams(temperature=0, max_tokens=r.output, ignore_eos=True) for r in load.requests]
            start = time.perf_counter()
            llm.generate(prompt_token_ids=[r.prompt for r in load.requests], sampling_params=params)
            if repeat:
                walls.append(time.perf_counter() - start)
    result: dict[str, Any] = {
        "batch_size": batch_size,
        "batch_ms": report.spread(walls),
        "tokens_per_s_each": output_len / report.percentile(walls, 0.5),
    }
    shown = result["batch_ms"]
    click.echo(
        f"batch {batch_size}, {prefix_len + input_len} in, {output_len} out: p50 {shown['p50']:.1f} ms, p95 {shown['p95']:.1f} ms;"
        f" {result['tokens_per_s_each']:.1f} tokens/s each"
    )
    lengths = {"input_len": input_len, "output_len": output_len, "prefix_len": prefix_len, "prefixes": prefixes}
    write_json(json_file, "latency", {"model": model, "serve_args": list(serve_args), "seed": seed, **lengths}, result)


@bench.command()
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Starts that are counted, after one that warms the caches.")
@click.option(
    "--idle",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds of idling whose CPU time is measured (last repeat only).",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Append the figures here, one JSON object a line.")
@click.argument("serve_args", nargs=-1, type=click.UNPROCESSED)
def footprint(repeats: int, idle: float, json_file: str | None, serve_args: tuple[str, ...]) -> None:
    """Start a server (words after -- go to `penstock serve`): seconds to the first token, memory, idle CPU."""
    from penstock.plugins.commands.bench import report
    from penstock.plugins.commands.bench.footprint import measure

    runs = []
    for repeat in range(repeats + 1):
        try:
            run = measure([*serve_args], idle_s=idle if repeat == repeats else 0.0)
        except OSError as error:
            raise click.ClickException(str(error)) from None
        kind = "warming" if repeat == 0 else f"start {repeat}"
        click.echo(f"{kind}: ready {run['ready_s']:.2f} s, first token {run['first_token_s']:.2f} s, {run['pss_bytes'] / 2**20:.0f} MiB")
        if repeat:
            runs.append(run)
    result: dict[str, Any] = {
        "ready_s": report.percentile([r["ready_s"] for r in runs], 0.5),
        "first_token_s": report.percentile([r["first_token_s"] for r in runs], 0.5),
        "pss_mib": report.percentile([r["pss_bytes"] / 2**20 for r in runs], 0.5),
        "processes": runs[-1]["processes"],
        "idle_cpu_share": runs[-1]["idle_cpu_share"] or 0.0,
        "exit_status": runs[-1]["exit_status"],
        "runs": runs,
    }
    click.echo(
        f"median: ready {result['ready_s']:.2f} s, first token {result['first_token_s']:.2f} s, {result['pss_mib']:.0f} MiB PSS in"
        f" {result['processes']} processes, idle {result['idle_cpu_share']:.2%} of a core"
    )
    write_json(json_file, "footprint", {"serve_args": list(serve_args)}, result)


@bench.command()
@click.option("--schemas", type=COUNT, default=400, show_default=True, help="How many schemas are made.")
@click.option(
    "--suite", "suite_folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="`tests` of JSON-Schema-Test-Suite."
)
@click.option(
    "--tokenizer", "tokenizer_file", type=click.Path(exists=True, dir_okay=False), help="A tokenizer.json; default: the demo model's."
)
@click.option("--train", type=COUNT, help="Learn a vocabulary of so many tokens from the Python files that are installed here instead.")
@click.option(
    "--turns", type=click.IntRange(min=0), default=0, show_default=True, help="Pairs of bursts, free and with a schema, against a server."
)
@click.option("--rows", type=COUNT, default=16, show_default=True, help="Requests of a burst.")
@click.option("--output-len", type=COUNT, default=256, show_default=True, help="Tokens of each.")
@click.option("--seed", default=0, show_default=True, help="Seed of the schemas.")
@click.option(
    "--backend", "backends", multiple=True, default=["llguidance"], show_default=True, help="One after the other (several times)."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Append the figures here, one JSON object a line.")
@click.argument("serve_args", nargs=-1, type=click.UNPROCESSED)
def grammars(
    schemas: int,
    suite_folder: Path | None,
    tokenizer_file: str | None,
    train: int | None,
    turns: int,
    rows: int,
    output_len: int,
    seed: int,
    backends: tuple[str, ...],
    json_file: str | None,
    serve_args: tuple[str, ...],
) -> None:
    """Masks over many schemas; with --turns also a batch that obeys one against a batch that is free (words after -- go to `penstock serve`)."""
    import sysconfig

    from tokenizers import Tokenizer

    from penstock.core.protocol.model_folder import demo_folder
    from penstock.plugins.commands.bench.grammars import in_turns, masks, trained
    from penstock.plugins.commands.bench.schemas import generated, suite
    from penstock.plugins.commands.bench.server import started

    if train is not None:
        tokenizer = trained(train, [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))])
    else:
        tokenizer = Tokenizer.from_file(tokenizer_file or str(Path(demo_folder()) / "tokenizer.json"))
    pairs = [*generated(schemas, seed), *(suite(suite_folder) if suite_folder is not None else ())]
    result: dict[str, Any] = {}
    for backend in backends:
        result = masks(tokenizer, pairs, backend)
        mask, cpu, first, busy = (result[name] for name in ("mask_us", "mask_cpu_us", "first_mask_ms", "first_mask_cpu_ms"))
        click.echo(f"{backend}: {result['vocabulary']} tokens, {result['schemas']} schemas ({result['kinds']}), {result['masks']} masks")
        if result["by_xgrammar"]:
            click.echo(f"{result['by_xgrammar']} of the schemas by xgrammar itself, the others by llguidance")
        click.echo(
            f"a mask: p50 {mask['p50']:.1f} us, p99 {mask['p99']:.1f} us (CPU time {cpu['p50']:.1f}, {cpu['p99']:.1f}; longest {cpu['max']:.0f})"
        )
        click.echo(
            f"until the first mask: p50 {first['p50']:.2f} ms, p99 {first['p99']:.2f} ms (CPU time {busy['p50']:.2f}, {busy['p99']:.2f}),"
            f" of which the compiling process p50 {result['compile_ms']['p50']:.2f}"
        )
        if backend != backends[-1]:
            write_json(json_file, "grammars", {"schemas": schemas, "seed": seed, "train": train, "serve_args": []}, result)
    if turns:
        with started([*serve_args]) as base:
            result["turns"] = found = in_turns(base, rows=rows, tokens=output_len, turns=turns)
        pairs_said = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
        click.echo(f"batch {rows}: a schema's tokens/s over free ones: {found['schema_over_free']:.3f} (pairs: {pairs_said})")
        cpu_said = ", ".join(f"{kind} {used:.2f}" for kind, used in found["cpu_ms_a_step"].items())
        click.echo(f"CPU time of the server's processes, ms a step: {cpu_said}")
    write_json(json_file, "grammars", {"schemas": schemas, "seed": seed, "train": train, "serve_args": list(serve_args)}, result)


@bench.command()
@click.option(
    "--config",
    "configs",
    multiple=True,
    default=['{"method": "ngram"}'],
    show_default=True,
    help="A value of --speculative-config (several times); {} is another engine without, which tells how rough the figures are.",
)
@click.option("--model", help="Folder of a model; the demo model without.")
@click.option("--shape", type=click.Choice(("small",)), help="A model of this size whose answers are known, instead: written for the run.")
@click.option("--rows", type=COUNT, multiple=True, default=(1,), show_default=True, help="--shape: requests at once (several times).")
@click.option("--case", "cases", multiple=True, help="--shape: what is asked (several times); default: every case.")
@click.option("--output-len", type=COUNT, default=120, show_default=True, help="Tokens of an answer.")
@click.option("--turns", type=COUNT, default=7, show_default=True, help="How often each engine answers every prompt.")
@click.option("--max-num-seqs", type=COUNT, default=4, show_default=True, help="Of the engines, one of which answers at a time.")
@click.option("--threads", type=COUNT, help="Of each engine, on a CPU.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Append the figures here, one JSON object a line.")
def speculation(
    configs: tuple[str, ...],
    model: str | None,
    shape: str | None,
    rows: tuple[int, ...],
    cases: tuple[str, ...],
    output_len: int,
    turns: int,
    max_num_seqs: int,
    threads: int | None,
    json_file: str | None,
) -> None:
    """Answers with drafts against answers without, in turns. They must be the same. With --shape a --config whose "model" is "known" has a drafter that is right but behind one token in 5."""
    import contextlib
    import tempfile

    from penstock.plugins.commands.bench import known
    from penstock.plugins.commands.bench.speculation import chats, known_answers, measured

    try:
        parsed = [json.loads(config) for config in configs]
    except ValueError as error:
        raise click.BadParameter(f"--config takes a JSON object: {error}") from None
    if unknown := [case for case in cases if case not in known.CASES]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known.CASES)}.", param_hint="--case")
    options: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": max(max_num_seqs, *rows)}
    options |= {"threads": threads} if threads else {}
    settings = {"configs": parsed, "model": model, "output_len": output_len, "turns": turns, "threads": threads}

    def told(result: dict[str, Any], **more: Any) -> None:
        for name, kinds in result.items():
            for kind, one in kinds.items():
                click.echo(
                    f"{name}: {kind}: {one['tokens_s']:.0f} tokens/s ({one['over_off']:.2f}x), CPU {one['cpu_ms_a_token']:.3f} ms a token ({one['cpu_over_off']:.2f}x)"
                )
        write_json(json_file, "speculation", {**settings, **more}, result)

    if shape is None:
        common, asks = chats(model, output_len)
        told(measured(parsed, {**common, **options}, asks, turns=turns))
        return
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        its = known.shape_of(shape)
        folder = known.known_model(root, its)
        for config in parsed:
            for one in config.get("methods", [config]):
                if one.get("model") == "known":
                    one["model"] = known.known_drafter(root, its, one.get("method", "draft_model"))
        options["kv_cache_memory_bytes"] = 512 << 20
        for count in rows:
            click.echo(f"{count} at once:")
            common, asks = known_answers(folder, its, count, output_len, cases or list(known.CASES))
            told(measured(parsed, {**common, **options}, asks, turns=turns), shape=shape, rows=count)


@bench.command()
@click.option("--rows", type=COUNT, multiple=True, default=(256,), show_default=True, help="Sequences that decode at once (several times).")
@click.option(
    "--drafts", type=AMOUNT, multiple=True, default=(0, 4), show_default=True, help="Drafts of each; 0: without drafters (several times)."
)
@click.option("--block-size", type=COUNT, default=16, show_default=True, help="Tokens of a KV block.")
@click.option("--depth", type=COUNT, default=1, show_default=True, help="Steps in flight.")
@click.option("--gaps", is_flag=True, help="Every second slot is free: sequences do not lie side by side.")
@click.option("--steps", type=COUNT, default=100, show_default=True, help="Of each run.")
@click.option("--repeats", type=COUNT, default=15, show_default=True, help="Runs, of which the lowest and the median are told.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Append the figures here, one JSON object a line.")
def machinery(
    rows: tuple[int, ...], drafts: tuple[int, ...], block_size: int, depth: int, gaps: bool, steps: int, repeats: int, json_file: str | None
) -> None:
    """What the scheduler computes a step, with a device that computes nothing, and where it goes, as a Markdown table."""
    from penstock.plugins.commands.bench.machinery import measured, table

    settings = {"block_size": block_size, "depth": depth, "gaps": gaps, "steps": steps, "repeats": repeats}
    load = os.getloadavg()[0]
    found = [
        measured(count, each, block=block_size, depth=depth, steps=steps, repeats=repeats, gaps=gaps) for count in rows for each in drafts
    ]
    for line in table(found):
        click.echo(line)
    click.echo(f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    write_json(json_file, "machinery", settings, {"results": found})


CASES = ("latency", "events", "retained", "stalled")


@bench.command()
@click.option(
    "--case", "cases", type=click.Choice(CASES), multiple=True, default=CASES, show_default=True, help="What is measured (several times)."
)
@click.option(
    "--streams",
    "counts",
    type=COUNT,
    multiple=True,
    default=(1, 64, 256),
    show_default=True,
    help="latency: streams at once (several times).",
)
@click.option("--edges", type=COUNT, multiple=True, default=(1, 2), show_default=True, help="events: HTTP processes (several times).")
@click.option("--kept", type=COUNT, default=200, show_default=True, help="retained: streams of 500 events, and how often one is resumed.")
@click.option("--stalled", "many", type=COUNT, default=1000, show_default=True, help="stalled: clients that read nothing.")
@click.option("--readers", type=COUNT, default=8, show_default=True, help="stalled: streams that are read beside them.")
@click.option("--seconds", type=POSITIVE, default=10.0, show_default=True, help="Of each row.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Append the figures here, one JSON object a line.")
@click.argument("serve_args", nargs=-1, type=click.UNPROCESSED)
def streams(
    cases: tuple[str, ...],
    counts: tuple[int, ...],
    edges: tuple[int, ...],
    kept: int,
    many: int,
    readers: int,
    seconds: float,
    json_file: str | None,
    serve_args: tuple[str, ...],
) -> None:
    """Streams beside the model: servers of its own (words after -- go to `penstock serve`) with a device that computes nothing."""
    from penstock.plugins.commands.bench import report
    from penstock.plugins.commands.bench import streams as measured
    from penstock.plugins.commands.bench.client import run as on_loop

    given = [*serve_args]
    settings = {"seconds": seconds, "serve_args": given}
    click.echo(f"load {os.getloadavg()[0]:.1f} before the start")

    def once(work: Any) -> Any:
        return on_loop(measured.bounded(work))

    def told(case: str, rows: list[dict[str, Any]], title: str) -> None:
        report.show_rows(title, rows)
        write_json(json_file, f"streams-{case}", settings, {"rows": rows})

    try:
        if "latency" in cases:
            with measured.clocked(given, step_s=measured.STEP_S, streams=max(counts)) as url:
                rows = [once(measured.latency(measured.Server(url), count, seconds)) for count in counts]
            told("latency", rows, "ms from the device to the client")
        if "events" in cases:
            rows = []
            for number in edges:
                with measured.clocked([*given, "--edge-workers", str(number)], step_s=0.0, streams=64) as url:
                    server = measured.Server(url)
                    rows += [{"edges": number, **once(measured.events(server, 64, seconds, carrier))} for carrier in ("sse", "websocket")]
            told("events", rows, "events a second, 64 streams")
        if "retained" in cases:
            with measured.clocked([*given, "--retained-bytes", "4G"], step_s=0.0, streams=50) as url:
                rows = [once(measured.retained(measured.Server(url), kept, kept))]
            told("retained", rows, "streams of 500 events that are kept")
        if "stalled" in cases:
            with measured.clocked([*measured.STALLED_FLAGS, *given], step_s=0.002, streams=256) as url:
                rows = once(measured.stalled(measured.Server(url), many, readers, seconds))
            told("stalled", rows, f"{readers} streams that are read, beside {many} that are not")
    except OSError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"load {os.getloadavg()[0]:.1f} at the end")
