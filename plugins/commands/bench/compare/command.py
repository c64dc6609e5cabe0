"""`penstock bench compare`: Penstock beside other servers and engines on this machine.

What it is: options, what they must fit, the run, the output. What it does not know: how peers are started (peers.py), turns (turns.py), figures (cases.py), ratios (ratios.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from penstock.plugins.commands.bench.compare.peers import Peer

COUNT = click.IntRange(min=1)
POSITIVE = click.FloatRange(min=0, min_open=True)


def _peers(context: click.Context, option: click.Parameter, words: tuple[str, ...]) -> list[Peer]:
    from penstock.plugins.commands.bench.compare.peers import parse

    found: dict[str, Peer] = {}
    for word in words:
        try:
            peer = parse(word)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from None
        if peer.name in found:
            raise click.BadParameter(f"two peers are called {peer.name!r}: give each a name of its own.")
        found[peer.name] = peer
    return list(found.values())


def _models(context: click.Context, option: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not sign or not Path(path).exists():
            raise click.BadParameter(f"{word!r} is not NAME=PATH of something that exists.")
        found[name] = path
    return found


def _cases(context: click.Context, option: click.Parameter, words: tuple[str, ...]) -> list[Any]:
    from penstock.plugins.commands.bench.compare.cases import CASES, USUAL

    if unknown := [word for word in words if word not in CASES]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(CASES)}.")
    return [CASES[word] for word in dict.fromkeys(words or USUAL)]


@click.command()
@click.option("--model", type=click.Path(exists=True, file_okay=False), help="Hugging Face folder; default: the demo model.")
@click.option("--shape", type=click.Choice(("tiny", "small")), help="Random weights instead: 15 or 164 million parameters.")
@click.option("--peer", "peers", multiple=True, required=True, callback=_peers, help="Whom to compare with (several times), see above.")
@click.option(
    "--peer-model", "models", multiple=True, callback=_models, help="NAME=PATH: what a peer reads instead of --model (several times)."
)
@click.option(
    "--case",
    "cases",
    multiple=True,
    callback=_cases,
    help="offline, decode, prefill, prefix, poisson or burst (several times); default: the first four.",
)
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Rounds that are counted, after one that warms up.")
@click.option("--requests", type=COUNT, help="Of a round of offline (64), prefix (32), poisson (64) and burst (256).")
@click.option("--rate", type=POSITIVE, default=4.0, show_default=True, help="poisson: mean arrivals a second.")
@click.option("--threads", type=COUNT, help="Of each engine on a CPU; default: the cores that may be used, for Penstock its own choice.")
@click.option("--one-at-a-time", is_flag=True, help="Stop each server before the next starts (where memory does not hold all of them).")
@click.option("--start-timeout", type=POSITIVE, default=600.0, show_default=True, help="Seconds until a server must be ready.")
@click.option("--turn-timeout", type=POSITIVE, default=600.0, show_default=True, help="Seconds that a turn may take.")
@click.option("--limit", type=POSITIVE, default=3600.0, show_default=True, help="Seconds after which no further turn begins.")
@click.option("--seed", default=0, show_default=True, help="Of lengths, ids and arrivals.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Append the figures here, one JSON object a line.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False), help="Write the table here as Markdown (-: print it).")
@click.argument("serve_args", nargs=-1, type=click.UNPROCESSED)
def compare(
    model: str | None,
    shape: str | None,
    peers: list[Peer],
    models: dict[str, str],
    cases: list[Any],
    rounds: int,
    requests: int | None,
    rate: float,
    threads: int | None,
    one_at_a_time: bool,
    start_timeout: float,
    turn_timeout: float,
    limit: float,
    seed: int,
    json_file: str | None,
    markdown_file: str | None,
    serve_args: tuple[str, ...],
) -> None:
    """Penstock beside other servers on this machine, in turns (words after -- go to `penstock serve`).

    \b
    --peer NAME=URL                        a server that runs already
    --peer NAME="COMMAND {model} {port}"   started here; {threads} is known, too
    --peer openvino=PYTHON                 OpenVINO GenAI, in its process, without HTTP
    --peer vllm=PYTHON                     its server, from its virtual environment
    --peer llama-server=PATH               llama.cpp's server (reads a .gguf of the model)

    All servers are up, one works at a time, each round in the opposite order of the one before; figures are compared round by round. What was started is stopped at the end,
    whatever ends it. A peer that fails is told and left out; the exit status is 1 then.
    """
    import tempfile

    from penstock.core.protocol.model_folder import demo_folder
    from penstock.plugins.commands.bench import workload
    from penstock.plugins.commands.bench.command import write_json
    from penstock.plugins.commands.bench.compare import machine, tables
    from penstock.plugins.commands.bench.compare.cases import Asked
    from penstock.plugins.commands.bench.compare.peers import OURS, Peer, Wanted, start
    from penstock.plugins.commands.bench.compare.processes import stoppable
    from penstock.plugins.commands.bench.compare.shapes import written
    from penstock.plugins.commands.bench.compare.turns import Turns
    from penstock.plugins.devices.host_limits import cores

    if strange := [name for name in models if name not in {peer.name for peer in peers}]:
        raise click.BadParameter(f"no --peer is called {strange[0]!r}.", param_hint="--peer-model")
    if model is not None and shape is not None:
        raise click.UsageError("--shape makes a model, so it cannot hold beside --model.")
    for file in (json_file, None if markdown_file == "-" else markdown_file):
        writable(file)
    ours = (*serve_args, *(("--threads", str(threads)) if threads and "--threads" not in serve_args else ()))
    facts = machine.facts()
    settings = {
        "model": f"{shape} (random weights)" if shape else Path(model or demo_folder()).absolute().name,
        "rounds": str(rounds),
        "seed": str(seed),
    }
    settings |= {"requests": str(requests)} if requests else {}
    settings |= {"arrivals a second": f"{rate:g}"} if any(case.paced for case in cases) else {}
    settings |= {"serve": " ".join(ours)} if ours else {}
    settings |= {"servers": "one at a time"} if one_at_a_time else {}
    with tempfile.TemporaryDirectory(prefix="penstock-compare-") as scratch, stoppable():
        folder = written(Path(scratch), shape) if shape else str(Path(model or demo_folder()).absolute())
        vocab, context = shape_of(folder)
        asked = Asked(vocab=vocab, context=context, seed=seed, requests=requests, rate=rate)
        try:
            longest = asked.longest(cases)
        except workload.DoesNotFit as error:
            raise click.UsageError(f"{error}. Leave that case out: name others with --case.") from None
        for name, value in facts.items():
            _say(f"{name}: {value}")
        wanted = Wanted(
            model=folder,
            models=models,
            threads=threads or cores(),
            longest=longest,
            serve_args=ours,
            folder=Path(scratch),
            start_s=start_timeout,
            turn_s=turn_timeout,
            say=_say,
        )
        turns = Turns(
            [Peer(name=OURS, kind=OURS, spec=""), *peers],
            cases,
            asked,
            rounds=rounds,
            start=lambda peer: start(peer, wanted),
            say=_say,
            one_at_a_time=one_at_a_time,
            limit_s=limit,
        )
        interrupted = False
        try:
            turns.run()
        except KeyboardInterrupt:
            interrupted = True
    facts["load after"] = machine.load()
    result = turns.result
    tables.show(result, facts, settings)
    if markdown_file is not None:
        text = tables.markdown(result, facts, settings)
        if markdown_file == "-":
            click.echo(text, nl=False)
        else:
            Path(markdown_file).write_text(text, encoding="utf-8")
    write_json(json_file, "compare", {**settings, "cases": [case.name for case in cases]}, {"machine": facts, **tables.as_json(result)})
    if interrupted:
        raise SystemExit(130)
    if result.failures or result.cut:
        raise SystemExit(1)


def _say(text: str) -> None:
    """Progress goes beside the table, not into it."""
    click.echo(text, err=True)


def writable(file: str | None) -> None:
    """Before an hour of measuring, not after it."""
    try:
        if file is not None:
            Path(file).open("a", encoding="utf-8").close()
    except OSError as error:
        raise click.BadParameter(f"{file} cannot be written ({error}).") from None


def shape_of(folder: str) -> tuple[int, int | None]:
    """Vocabulary and context of a Hugging Face folder."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        return int(config["vocab_size"]), config.get("max_position_embeddings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.BadParameter(f"{folder} has no config.json that says vocab_size ({error}).", param_hint="--model") from None
