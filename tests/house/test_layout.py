"""The packaging layout's traps (ADR 0001): links, import spelling, unsafe loading, the public surface."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "plugins", "kernels", "transports")


def sources(*folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_a_relative_link(room: str) -> None:
    link = ROOT / "src" / "penstock" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{room}"
    assert link.resolve() == ROOT / room


def imports_of(path: Path) -> list[str]:
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            out.append(node.module)
    return out


def test_no_import_names_a_room_without_the_package() -> None:
    bad = [(p, name) for p in sources(*ROOMS, "tests", "src", "examples") for name in imports_of(p) if name.split(".")[0] in ROOMS]
    assert bad == []


def test_nothing_unpickles() -> None:
    unsafe = re.compile(r"pickle|torch\.load\(|cloudpickle|yaml\.load\(|\bmarshal\b|shelve")
    bad = [
        (p, line) for p in sources(*ROOMS, "src", "examples") for line in p.read_text().splitlines() if unsafe.search(line.split("#")[0])
    ]
    assert [b for b in bad if "never" not in b[1].lower()] == []


@pytest.mark.parametrize("path", sources(*ROOMS), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_file_says_what_it_is(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc, f"{path} has no module docstring"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > 400:
        assert says_why_it_is_long(doc), f"{path}: {lines} lines need a sentence in the docstring: It is long because ..."


def says_why_it_is_long(doc: str) -> bool:
    return re.search(r"(?i)\b(long|over \d+ lines),? (because|since|as|so that) \w|\blong: \w", " ".join(doc.split())) is not None


@pytest.mark.parametrize(
    ("doc", "says"),
    [
        ("What it is.\nIt is long\nbecause each part needs the others.", True),
        ("Long: one section a kernel.", True),
        ("A little over 400 lines, because the checks stand here.", True),
        ("Columns of equal length, whole frames, 400 rows, one file.", False),
        ("It is long.", False),
        ("No longer because of that.", False),
    ],
)
def test_a_reason_is_a_sentence(doc: str, says: bool) -> None:
    assert says_why_it_is_long(doc) is says


def test_public_surface() -> None:
    import penstock

    assert penstock.__all__ == [
        "LLM",
        "Beam",
        "BeamSearchParams",
        "GuidedDecodingParams",
        "SamplingParams",
        "StructuredOutputsParams",
        "__version__",
    ]
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom penstock.core.cli import build_cli\nbuild_cli()\n"
        "heavy = {'torch', 'trio', 'litestar', 'tokenizers', 'uvicorn'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_wheel_from_sdist_imports_in_a_clean_environment(tmp_path: Path) -> None:
    """The wheel holds every room and the package data, and imports without the source tree."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-q", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        timeout=240,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for room in ROOMS:
        assert f"penstock/{room}/__init__.py" in names
    assert "penstock/py.typed" in names
    assert "penstock/plugins/demo_model/brook/model.safetensors" in names
    assert "penstock/plugins/demo_model/brook-draft/config.json" in names
    tracked = subprocess.run(["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        missing = [f for f in tracked.stdout.split() if f"penstock/{f}" not in names]
        assert missing == []
    code = (
        "import sys, importlib\nsys.path.insert(0, sys.argv[1])\nimport penstock\n"
        "assert penstock.__file__.startswith(sys.argv[1]), penstock.__file__\n"
        "for m in ('core.processes.kernel', 'core.cli', 'core.llm', 'plugins.demo_model', 'transports.edge', 'plugins.devices'):\n"
        "    importlib.import_module('penstock.' + m)\n"
    )
    # -S -P would hide the dependencies too; the editable install's finder is what must not be used, hence the assertion on __file__.
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path / "site")], check=True, timeout=120, cwd=tmp_path)
