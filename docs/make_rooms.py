"""The page that shows a newcomer around: every file with the line that says what it is.

What it is: `page()`, made from the docstrings of files and packages, so that it cannot be out of date; docs/generate.py writes it.
What it does not know: what is in the files.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("core", "plugins", "kernels", "transports")

_HEAD = """# Rooms
<!-- Made by docs/generate.py; edit the code, then run it. -->

Code lives in the top-level folders; `src/penstock/` holds relative links to them, so that the import name is always `penstock.<room>`.

```
   cli   llm              the command line; the Python API
      processes           who runs where
        actors            scheduler, KV, text, executor, sampler
        runtime           the microkernel: actors, hosts, wiring, frames, links
  contract | telemetry    what a plugin author reads | logs, metrics, traces
       protocol           what they say: messages, options, errors
```

These are the floors of `core`: no import goes upward (checked in CI). `core` imports neither torch nor the other rooms; `transports` never imports
torch, kernels or plugins; `kernels` import only torch, triton and numpy; `plugins` may import `core` and `kernels`. `tests/` mirrors the rooms, and has
`parity/` (against transformers), `budget/` (counted, not timed), `chaos/` (killed processes), `contract/` (the wire), `e2e/` (whole servers) and `house/`.

To read the code in an evening: [life of a request](request.md), `core/protocol/messages.py`, `core/actors/scheduler/scheduler.py`,
`core/actors/text/actor.py`, `core/processes/kernel.py`, `plugins/devices/runner.py`, `transports/builtin.py`. To add something:
[extending](extending.md)."""


def what(path: Path) -> str:
    """The first sentence of a file's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(doc.split("\n\n")[0].split())
    return first.replace("|", "\\|")


def folders() -> Iterator[Path]:
    for room in ROOMS:
        yield ROOT / room
        yield from sorted(p for p in (ROOT / room).rglob("*") if p.is_dir() and p.name != "__pycache__" and any(p.glob("*.py")))


def page() -> str:
    out = [_HEAD]
    for folder in folders():
        name = folder.relative_to(ROOT).as_posix()
        out += ["", f"{'##' if '/' not in name else '###'} `{name}/`", "", what(folder / "__init__.py"), ""]
        files = sorted(p for p in folder.glob("*.py") if p.name != "__init__.py")
        if files:
            out += ["| file | what it is |", "|---|---|", *(f"| `{p.name}` | {what(p)} |" for p in files)]
    return "\n".join(out) + "\n"
