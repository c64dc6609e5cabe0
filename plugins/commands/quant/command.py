"""The commands `penstock quantize` and `penstock quant report`.

What it is: options, progress and output. What it does not know: formats, files, figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from penstock.plugins.commands.quant.comparing import Loaded, Prompt
    from penstock.plugins.commands.quant.writing import Plan

SCHEMES = ("w4a16", "w8a16", "int8", "fp8", "fp8-block", "mxfp4", "nf4")
METHODS = ("rtn", "gptq", "awq", "smoothquant")
KV_KINDS = ("fp8", "fp8_e4m3", "fp8_e5m2", "int8")
ROUNDED_INPUTS = ("int8", "fp8", "fp8-block")
CALIBRATION, REPORTED = "calibration.json", "builtin.json"
"""Built-in texts: none stands in both, so that a method is not measured on what it was fitted to."""


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--scheme", type=click.Choice(SCHEMES), required=True, help="How weights are stored.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="rtn",
    show_default=True,
    help="How they are rounded: rtn, to the nearest; the others for the inputs that calibration texts make.",
)
@click.option("--calibration", default="builtin", show_default=True, help="File of texts for the others (.txt, .json, .jsonl), or builtin.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Most calibration texts.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Longest calibration text in tokens; the rest is cut off.",
)
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Layers that stay wide, by name with * and ?; may be given again.")
@click.option(
    "--lm-head",
    "head",
    type=click.Choice(SCHEMES),
    help="Store the output head, too, in this form, rounded to the nearest; a tied embedding table stays wide beside it. Otherwise the head stays wide.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write, new or empty.")
def quantize(
    model: Path,
    scheme: str,
    method: str,
    calibration: str,
    samples: int,
    max_tokens: int,
    ignore: tuple[str, ...],
    head: str | None,
    out: Path,
) -> None:
    """Write a quantised copy of MODEL, a wide Hugging Face folder, in the compressed-tensors format (nf4: bitsandbytes'). Ended early, it goes on where it was."""
    if method == "smoothquant" and scheme not in ROUNDED_INPUTS:
        raise click.UsageError(
            f"--method smoothquant is for schemes whose inputs are rounded, too ({', '.join(ROUNDED_INPUTS)}). For --scheme {scheme} take gptq or awq."
        )
    from penstock.plugins.commands.quant import writing

    source = writing.open_source(model)
    plan = writing.plan(source, scheme, ignore, head)
    asked: dict[str, object] = {"method": method, "ignore": sorted(ignore), **({"head": head} if head else {})}
    prompts: list[Sequence[int]] = []
    if method == "rtn":
        _no_texts()
    else:
        encode = _encoder([model])
        texts = _texts("--calibration", calibration, CALIBRATION)[:samples]
        asked["prompts"] = prompts = [tokens for tokens in (encode(text)[:max_tokens] for text in texts) if tokens]
        if not prompts:
            raise click.UsageError(f"--calibration {calibration}: there is no text in it.")
    partial = writing.start(plan, out, asked)
    kept = _written(plan, partial, method, prompts)
    writing.finish(plan, partial, out)
    said = f", {kept} of {len(plan.shards)} files were there already" if kept else ""
    click.echo(f"{out}: {len(plan.schemes)} layers in {scheme} ({method}), {len(plan.wide)} wide{said}.")
    click.echo(f"What it costs: penstock quant report {out} --against {model} --text FILE")


def _no_texts() -> None:
    """Says which options were given for nothing."""
    given = click.get_current_context().get_parameter_source
    idle = [
        f"--{name.replace('_', '-')}" for name in ("calibration", "samples", "max_tokens") if given(name) is not ParameterSource.DEFAULT
    ]
    if idle:
        click.echo(f"--method rtn reads no texts: {', '.join(idle)} without effect. To round for them take --method gptq or awq.", err=True)


def _written(plan: Plan, partial: Path, method: str, prompts: Sequence[Sequence[int]]) -> int:
    """The shards, with a bar."""
    from rich.console import Console
    from rich.progress import Progress

    from penstock.plugins.commands.quant import calibrating, methods, writing

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("quantising", total=len(plan.shards))

        def tell(done: int, count: int, what: str) -> None:
            progress.update(task, completed=done, total=count, description=what)

        if method == "rtn":
            return writing.write(plan, partial, writing.nearest(plan), tell)
        longest = max(len(prompt) for prompt in prompts)
        return calibrating.calibrate(plan, partial, methods.METHODS[method](plan.word), prompts, tell, longest)


@click.group()
def quant() -> None:
    """What quantised weights cost."""


@quant.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--against", type=click.Path(exists=True, path_type=Path), help="The wide model. Not needed with the next two.")
@click.option(
    "--quantization", metavar="WORD", help="Measure MODEL, a wide one, as `serve --quantization WORD` would round it; no record is written."
)
@click.option(
    "--kv-cache-dtype", type=click.Choice(KV_KINDS), help="Measure MODEL as `serve` with this option would run it; no record is written."
)
@click.option(
    "--lm-head-quantization",
    "head",
    metavar="WORD",
    help="The same for `serve --lm-head-quantization WORD`; with --against beside MODEL's own form, and no record is written.",
)
@click.option("--text", "text", default="builtin", show_default=True, help="File of texts like your own (.txt, .json, .jsonl), or builtin.")
@click.option(
    "--max-tokens", type=click.IntRange(min=2), default=512, show_default=True, help="Longest text in tokens; the rest is cut off."
)
@click.option("--max-texts", type=click.IntRange(min=1), help="Only so many texts.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="Folder with tokenizer.json, if not the wide model's.")
@click.option("--dtype", default="auto", show_default=True, help="What both models compute in: auto, bfloat16 or float32.")
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of tables.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture of the layers' errors.")
def report(
    model: Path,
    against: Path | None,
    quantization: str | None,
    kv_cache_dtype: str | None,
    head: str | None,
    text: str,
    max_tokens: int,
    max_texts: int | None,
    tokenizer: Path | None,
    dtype: str,
    as_json: bool,
    svg: Path | None,
) -> None:
    """Compare MODEL, a quantised one, with the wide model on texts, on the CPU; the figures are kept as quality.json beside it."""
    if quantization is not None if against is not None else not (quantization or head or kv_cache_dtype):
        raise click.UsageError(
            "Give the wide model with --against FULL; or, where MODEL is the wide one itself, --quantization WORD or --kv-cache-dtype WORD."
        )
    if svg is not None and not svg.parent.is_dir():  # before the work
        raise click.UsageError(f"--svg {svg}: there is no folder {svg.parent}.")
    recorded = quantization is None and head is None and kv_cache_dtype is None  # a record speaks of the weights of a folder
    from rich.console import Console

    from penstock.core.protocol.quality import record_file, sealed
    from penstock.plugins.commands.quant import comparing
    from penstock.plugins.commands.quant import report as shown

    model = _checkpoint(model)
    full = model if against is None else _checkpoint(against)
    texts = _texts("--text", text, REPORTED)[:max_texts]
    encode = _encoder([folder for folder in (tokenizer, full, model, full.parent) if folder is not None])
    kv = "fp8_e4m3" if kv_cache_dtype == "fp8" else kv_cache_dtype or "auto"
    ours = comparing.Loaded(model, quantization=quantization, dtype=dtype, longest=max_tokens, against=full, head=head, kv_cache_dtype=kv)
    wide = comparing.Loaded(full, dtype=dtype, longest=max_tokens)
    prompts = _compared(ours, wide, texts, encode)
    found = comparing.summary(prompts)
    layers = ours.layers
    record = shown.record_of(ours.scheme, found, layers, prompts)
    if recorded:
        record = sealed(record, model)
        _kept(record_file(model), record)
    if svg is not None:
        _drawn(svg, shown.picture(ours.scheme, found, layers))
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    shown.show(Console(width=None if sys.stdout.isatty() else 120), ours.scheme, found, layers, prompts)
    if recorded:
        click.echo(f"Recorded in {record_file(model)}.")


def _checkpoint(path: Path) -> Path:
    """The folder, or the GGUF file, as `serve` would take it. Raises ConfigError."""
    from penstock.core.protocol.config import Config
    from penstock.core.protocol.model_folder import with_model

    return Path(str(with_model(Config(model=str(path))).model))


def _texts(option: str, text: str, own: str) -> list[str]:
    """Of a file, or those that come with the command."""
    from penstock.plugins.commands.quant import comparing

    if text != "builtin":
        return comparing.texts_of(Path(text), option)
    click.echo(
        f"{option} builtin: conversations of the kind that the demo model Brook knows. They are not yours, and say little about another model: give a file of"
        " texts like those that you will serve.",
        err=True,
    )
    return comparing.texts_of(Path(__file__).with_name(own), option)


def _encoder(folders: list[Path]) -> Callable[[str], Sequence[int]]:
    from tokenizers import Tokenizer

    files = [folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()]
    if not files:
        raise click.UsageError(f"{folders[0]} holds no tokenizer.json. Name a folder that does with --tokenizer.")
    tokenizer = Tokenizer.from_file(str(files[0]))

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer.encode(text).ids
        return ids

    return encode


def _compared(ours: Loaded, wide: Loaded, texts: list[str], encode: Callable[[str], Sequence[int]]) -> list[Prompt]:
    from rich.console import Console
    from rich.progress import Progress

    from penstock.plugins.commands.quant import comparing

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("comparing", total=len(texts))
        return comparing.compare(ours, wide, texts, encode, lambda done, count: progress.update(task, completed=done))


def _kept(file: Path, record: dict[str, object]) -> None:
    """Whole or not at all."""
    import os

    written = file.with_name(file.name + ".tmp")
    try:
        written.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(written, file)
    except OSError as error:
        raise click.ClickException(f"The record cannot be written to {file} ({error.strerror}). Make the folder writable.") from None


def _drawn(file: Path, picture: str) -> None:
    try:
        file.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"--svg {file}: cannot be written ({error.strerror}).") from None
