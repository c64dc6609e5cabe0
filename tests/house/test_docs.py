"""Documentation that is made from code is fresh, and every hook is documented and tested."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from penstock.core.contract import hookspecs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("penstock_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration.md", "hooks.md", "actors.md", "metrics.md", "rooms.md"])
def test_made_pages_are_fresh(generate: ModuleType, page: str) -> None:
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == generate.PAGES[page](), "run: python docs/generate.py"


def hook_names() -> list[str]:
    return sorted(name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec"))


@pytest.mark.parametrize("hook", hook_names())
def test_each_hook_is_documented_and_used_by_a_test(hook: str) -> None:
    assert f"`{hook}(" in (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    tests = [p for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__)]
    assert any(re.search(rf"\b{hook}\b", p.read_text(encoding="utf-8")) for p in tests), f"no test uses {hook}"


def test_each_link_between_pages_leads_somewhere() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_rooms_page_has_every_file_and_says_what_it_is(generate: ModuleType) -> None:
    page = (ROOT / "docs" / "rooms.md").read_text(encoding="utf-8")
    for room in ("core", "plugins", "kernels", "transports"):
        for path in (ROOT / room).rglob("*.py"):
            if path.name != "__init__.py" and "__pycache__" not in path.parts:
                folder = page.split(f"`{path.parent.relative_to(ROOT).as_posix()}/`\n")[1].split("\n#")[0]
                row = next((line for line in folder.splitlines() if line.startswith(f"| `{path.name}` |")), "")
                assert row.split("|")[2].strip(), path
