"""Draws consecutive steps of the engine: `python docs/timeline.py [JSON [SVG]]`.

What it is: reads what `cuda_serve_bench timeline` wrote (docs/benchmarks/h200-timeline.json) and writes an SVG beside it, by hand: for each span
three lanes (the host's launch, the device, the host's wait for the result), a bar an interval, on one clock. Readable in light and dark.
What it does not know: how the times were taken.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
LANES = (("launch", "host: launch"), ("device", "device"), ("result", "host: wait for result"))
COLOURS = ("#2f6fb0", "#b5611a")
"""Even and odd steps: neighbours must be told apart."""
WIDTH, LEFT, RIGHT = 960, 150, 20
LANE, BAR, HEAD, FOOT = 30, 20, 46, 34
THIN = 1.5
"""No bar is narrower: a launch takes microseconds, a step milliseconds."""
STYLE = """text{font:12px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600}.g{stroke:#8b949e;stroke-opacity:.35}.n{fill:#fff;font-size:11px}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.n{fill:#fff}}"""


def tick(span: float) -> float:
    """A round distance between grid lines, so that there are five to twelve."""
    unit = 1.0
    while span / unit > 12:
        unit *= 2 if str(unit)[0] == "1" else 2.5 if str(unit)[0] == "2" else 2
    while span / unit < 5:
        unit /= 2
    return unit


def panel(title: str, steps: list[dict[str, Any]], top: float) -> list[str]:
    """One span as SVG elements: title, grid in milliseconds, lanes, bars with the step's number."""
    first = min(step[lane][0] for step in steps for lane, _ in LANES)
    last = max(step[lane][1] for step in steps for lane, _ in LANES)
    span = (last - first) / 1e6
    scale = (WIDTH - LEFT - RIGHT) / span
    bottom = top + HEAD + LANE * len(LANES)
    out = [f'<text class="t" x="8" y="{top + 18:g}">{escape(title)}</text>']
    unit, at = tick(span), 0.0
    while at <= span:
        x = LEFT + at * scale
        out.append(f'<line class="g" x1="{x:.1f}" y1="{top + HEAD - 8:g}" x2="{x:.1f}" y2="{bottom:g}"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 16:g}" text-anchor="middle">{at:g}{" ms" if at == 0 else ""}</text>')
        at += unit
    for row, (lane, label) in enumerate(LANES):
        y = top + HEAD + row * LANE
        out.append(f'<text x="8" y="{y + BAR - 5:g}">{escape(label)}</text>')
        for step in steps:
            begin, end = ((value - first) / 1e6 for value in step[lane])
            width = max(THIN, (end - begin) * scale)
            x = LEFT + begin * scale
            said = f"step {step['step']}: {label}, {begin:.3f} to {end:.3f} ms; {step['rows']} rows, {step['tokens']} tokens"
            out.append(
                f'<rect class="{lane}" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{BAR}" rx="2" fill="{COLOURS[step["step"] % 2]}"'
                f"><title>{escape(said)}</title></rect>"
            )
            if width > 40 and lane == "device":
                mixed = f" ({step['tokens']} tokens)" if step["tokens"] > step["rows"] and width > 110 else ""
                out.append(f'<text class="n" x="{x + width / 2:.1f}" y="{y + 14:g}" text-anchor="middle">{step["step"]}{mixed}</text>')
            elif lane == "launch":
                out.append(f'<text x="{x:.1f}" y="{y - 3:g}" text-anchor="middle" style="font-size:10px">{step["step"]}</text>')
    return out


def draw(data: dict[str, Any]) -> str:
    """The picture of a timeline file."""
    titles = {"decode": "decode", "mixed": "a prompt joins running decodes"}
    spans = [(f"{data['what']}: {title}", data[name]) for name, title in titles.items() if data.get(name)]
    each = HEAD + LANE * len(LANES) + FOOT
    height = each * len(spans) + 22
    body = [line for index, (title, steps) in enumerate(spans) for line in panel(title, steps, each * index)]
    note = f"{data['device']}, {data['date']}; the device's clock is known to {data['clock_uncertainty_us']:g} µs"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>Steps of the engine: launch, device, result</title>",
            f"<style>{STYLE}</style>",
            *body,
            f'<text x="8" y="{height - 8}">{escape(note)}</text>',
            "</svg>",
            "",
        ]
    )


def main(arguments: list[str]) -> None:
    source = Path(arguments[0]) if arguments else HERE / "benchmarks" / "h200-timeline.json"
    target = Path(arguments[1]) if len(arguments) > 1 else source.with_suffix(".svg")
    target.write_text(draw(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
