"""How `penstock quant report` shows what was found, and what its record holds.

What it is: the record's figures, the advice on each layer's bits, a table for the terminal, a picture as SVG.
What it does not know: how figures come about, files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.plugins.commands.quant.comparing import Layer, Prompt, Summary

if TYPE_CHECKING:
    from rich.console import Console

WORST = 5
SHOWN = 12
"""Layers in the terminal's table, those with the largest errors."""
OUTLIER = 1.5
"""Times the median error of layers with as many bits: such a layer deserves more of them."""
ERRORS = {4: 0.15, 8: 0.05}
"""Bits -> the error past which a layer deserves more, whatever the others have."""


def advice(layers: Sequence[Layer]) -> list[int]:
    """Bits that each layer should have: its own, or twice as many where its error is too large or stands out (8 -> 16: wide)."""
    medians = {bits: float(np.median([layer.error for layer in layers if layer.bits == bits])) for bits in {layer.bits for layer in layers}}

    def bits_of(layer: Layer) -> int:
        most = min(ERRORS.get(layer.bits, 1.0), OUTLIER * medians[layer.bits])
        return layer.bits * 2 if layer.error > most else layer.bits

    return [bits_of(layer) for layer in layers]


def record_of(scheme: str, found: Summary, layers: Sequence[Layer], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The keys of quality.json, but for the seal."""
    texts = hashlib.sha256("\0".join(prompt.text for prompt in prompts).encode("utf-8", "surrogatepass"))
    return {
        "scheme": scheme,
        "kl_mean": found.kl_mean,
        "kl_p99": found.kl_p99,
        "top1": found.top1,
        "ppl": found.ppl,
        "ppl_full": found.ppl_full,
        "tokens": found.tokens,
        "text_sha256": texts.hexdigest(),
        "layers": [
            {"name": layer.name, "kind": layer.kind, "bits": layer.bits, "error": layer.error, "advised_bits": bits}
            for layer, bits in zip(layers, advice(layers), strict=True)
        ],
    }


def show(console: Console, scheme: str, found: Summary, layers: Sequence[Layer], prompts: Sequence[Prompt]) -> None:
    """Tables on the terminal."""
    from rich.table import Table
    from rich.text import Text

    figures = Table(title=f"{scheme}: {found.tokens} tokens of {len(prompts)} texts", title_justify="left")
    for column in ("", "value", "95 % interval over texts"):
        figures.add_column(column)
    figures.add_row("KL from the wide model, mean a token (nats)", f"{found.kl_mean:.3g}", _range(found.kl_range, ".3g"))
    figures.add_row("KL, 99th percentile", f"{found.kl_p99:.3g}", "")
    figures.add_row("same likeliest token", f"{found.top1:.2%}", "")
    figures.add_row("perplexity, quantised", f"{found.ppl:.4f}", _range(found.ppl_range, ".4f"))
    figures.add_row("perplexity, wide", f"{found.ppl_full:.4f}", _range(found.ppl_full_range, ".4f"))
    console.print(figures)
    worst = Table(title="texts that lose most", title_justify="left")
    for column in ("mean KL", "same likeliest", "tokens", "begins"):
        worst.add_column(column)
    for prompt in sorted(prompts, key=lambda prompt: -prompt.kl.mean())[:WORST]:
        begins = Text(" ".join(prompt.text.split())[:60])
        worst.add_row(f"{prompt.kl.mean():.3g}", f"{prompt.same.mean():.1%}", str(len(prompt.kl)), begins)
    console.print(worst)
    if layers:
        table = Table(title=f"layers with the largest errors (of {len(layers)})", title_justify="left")
        for column in ("layer", "stored", "relative weight error", "advice"):
            table.add_column(column)
        for layer, bits in sorted(zip(layers, advice(layers), strict=True), key=lambda row: -row[0].error)[:SHOWN]:
            table.add_row(layer.name, f"{layer.kind}", f"{layer.error:.3%}", "stays" if bits == layer.bits else _more(bits))
        console.print(table)


def _range(interval: tuple[float, float], form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def _more(bits: int) -> str:
    return f"{bits} bits" if bits < 16 else "wide"


def picture(scheme: str, found: Summary, layers: Sequence[Layer]) -> str:
    """An SVG: each layer's error as a bar, those that deserve more bits in another colour."""
    height, top, left, width = 14, 46, 330, 420
    largest = max((layer.error for layer in layers), default=0.0) or 1.0
    title = f"{scheme}: mean KL {found.kl_mean:.3g}, P99 {found.kl_p99:.3g}, same likeliest {found.top1:.2%}, perplexity {found.ppl:.4f} ({found.ppl_full:.4f})"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{top + height * len(layers) + 10}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="13">{escape(title)}</text>',
        '<text x="10" y="36" fill="#555">relative weight error of each layer; orange: more bits are advised</text>',
    ]
    for index, (layer, bits) in enumerate(zip(layers, advice(layers), strict=True)):
        y, long = top + index * height, layer.error / largest * width
        colour = "#3b6ea5" if bits == layer.bits else "#d9822b"
        lines.append(f'<text x="{left - 6}" y="{y + 10}" text-anchor="end">{escape(layer.name)}</text>')
        lines.append(f'<rect x="{left}" y="{y + 2}" width="{long:.1f}" height="{height - 4}" fill="{colour}"/>')
        lines.append(f'<text x="{left + long + 4:.1f}" y="{y + 10}">{layer.error:.2%}</text>')
    return "\n".join([*lines, "</svg>", ""])
