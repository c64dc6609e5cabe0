"""Documentation that is made from code is fresh, and every hook is documented and tested."""

from __future__ import annotations

import builtins
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from penstock.core.contract import actors, devices, formats, grammars, hookspecs, policy
from penstock.core.contract import text as text_api
from penstock.core.contract.families import FAMILIES
from penstock.core.protocol import errors
from penstock.core.protocol.config import Config
from penstock.plugins.models import api
from penstock.transports import gateway

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


@pytest.mark.parametrize("page", ["configuration.md", "hooks.md", "actors.md", "metrics.md", "rooms.md", "http.md"])
def test_made_pages_are_fresh(generate: ModuleType, page: str) -> None:
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == generate.PAGES[page](), "run: python docs/generate.py"


def hook_names() -> list[str]:
    return sorted(name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec"))


@pytest.mark.parametrize("hook", hook_names())
def test_each_hook_is_documented_and_used_by_a_test(hook: str) -> None:
    assert f"`{hook}(" in (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    tests = [p for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__)]
    assert any(re.search(rf"\b{hook}\b", p.read_text(encoding="utf-8")) for p in tests), f"no test uses {hook}"


def sections() -> dict[str, str]:
    """The hooks page by the classes and functions that its headings name."""
    parts = re.split(r"(?m)^##+ ", (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8"))
    return {found.group(1): part for part in parts if (found := re.match(r"`([\w.]+)`", part))}


SPECS = [one.spec for one in FAMILIES.values()]
PROTOCOLS: list[Any] = [
    *(devices.Device, devices.Runner, api.Weights, api.Quantizer, api.Attention, api.Model, api.Program, api.Ops, api.Linear),
    *(policy.SchedulePolicy, text_api.Tokenizer, text_api.ChatRenderer, text_api.TemplatedRenderer, gateway.Sink),
    *(actors.Seat, actors.Actor, actors.ActorPort, grammars.Grammars, grammars.Matcher, formats.Splitter),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda kind: kind.__name__)
def test_each_field_of_each_spec_has_its_type_and_meaning_on_the_page(spec: type[hookspecs.Spec]) -> None:
    section = sections()[spec.__name__]
    for field in spec.__struct_fields__:
        assert re.search(rf"(?m)^- `{field}: [^`]+`: \S", section), f"{spec.__name__}.{field}"


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda kind: kind.__name__)
def test_each_member_of_each_protocol_has_its_type_and_meaning_on_the_page(protocol: Any) -> None:
    section = sections()[protocol.__name__]
    for field in protocol.__annotations__:
        assert re.search(rf"(?m)^- `{field}: [^`]+`: \S", section), f"{protocol.__name__}.{field}"
    for name, value in vars(protocol).items():
        if callable(value) and (not name.startswith("_") or name == "__call__") and value.__module__ == protocol.__module__:
            assert re.search(rf"\*\*`(async )?{name}\(.*\) -> .+`\*\*\n\n[^#*\s]", section), f"{protocol.__name__}.{name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_factory_must_give_is_on_the_page(generate: ModuleType, family: str) -> None:
    """What plugin_guard asks for is what the family's first protocol has."""
    first = generate.make_hooks.objects()[family][0]
    wanted = FAMILIES[family].members()
    if wanted:
        assert set(wanted) <= {member.name for member in generate.make_hooks.members(first)}
        assert first in PROTOCOLS


def test_each_struct_on_the_page_has_all_its_fields(generate: ModuleType) -> None:
    shown = [one for some in generate.make_hooks.objects().values() for one in some]
    shown += [hookspecs.RequestSummary, devices.ModelFacts, devices.RopeFacts]
    found = sections()
    fields = [(kind.__name__, field) for kind in shown for field in getattr(kind, "__struct_fields__", ())]
    assert len(fields) > 100
    assert [(kind, field) for kind, field in fields if f"- `{field}: " not in found[kind]] == []


def test_each_name_in_a_type_on_the_page_is_explained_there(generate: ModuleType) -> None:
    found = sections()
    words = set(re.findall(r"\w+", " ".join(generate.make_hooks.WORDS))) | {"None", "True", "False"}
    raised = set(re.findall(r"(?m)^\| `(\w+)` \|", "\n".join(found.values()))) | {"PenstockError"}
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    types = re.findall(r"(?m)^- `(.+?)`|^\*\*`(.+)`\*\*|^### `(\w+\(.*)`$|^`(.+)`, from", page)
    assert len(types) > 200
    names = {name for some in types for text in some for name in re.findall(r"\b[A-Z]\w*", re.sub(r"'[^']*'|\w+\.\w+", "", text))}
    assert {"ModelFacts", "StepDone", "Submit"} <= names
    assert sorted(names - words - raised - found.keys()) == []


def test_each_error_that_the_pages_speak_of_exists() -> None:
    text = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("hooks.md", "plugins.md"))
    named = set(re.findall(r"\b(?:[A-Z]\w+Error|[A-Z]\w+Fault|InvalidRequest|UnsupportedFeature|Engine(?:Failure|Unavailable))\b", text))
    assert len(named) > 5
    libraries = {"MsgspecError", "OutOfMemoryError"}
    assert [name for name in sorted(named - libraries) if not hasattr(errors, name) and not hasattr(builtins, name)] == []


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


def test_the_pages_know_which_transports_are_used_when_nobody_says() -> None:
    words = ", ".join(f"`{name}`" for name in Config().transports)
    assert f"| transports | `--transports NAME,NAME` | {words} |" in (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert words in (hookspecs.TransportSpec.__doc__ or "")


def test_the_groups_name_the_hooks_of_every_family_that_they_load() -> None:
    rows = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8").splitlines()
    for family in FAMILIES.values():
        for role in family.roles:
            (row,) = [row for row in rows if row.startswith(f"| `penstock.{role}` |")]
            assert f"`{family.hook}`" in row


def test_what_is_called_on_a_class_is_shown_so() -> None:
    page = sections()
    assert "@staticmethod refuse(" in page["Voice"]
    assert 'opt={"voice":' in page["Voice"]
    assert "@classmethod at(" in page["Usage"]
