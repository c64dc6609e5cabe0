"""docs/extending.md: what its samples import is there, and each capability to come has a place, a hook and a signature."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
SAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_what_the_samples_import_exists() -> None:
    imports = [node for sample in SAMPLES if "import" in sample for node in ast.walk(ast.parse(sample)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names}
    assert {"VOICE", "Surface", "Sse"} <= names, "a surface's sample says where its names are from"
    for node in imports:
        assert node.module is not None
        for alias in node.names:
            assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize(
    ("title", "file", "hook", "spec"),
    [
        ("A drafter", "plugins/drafters/NAME.py", "register_drafters", "DrafterSpec"),
        ("A KV tier", "plugins/tiers/NAME.py", "register_actors", "ActorSpec"),
        ("A rank executor", "plugins/executors/NAME.py", "register_executors", "ExecutorSpec"),
    ],
)
def test_each_capability_to_come_has_a_paragraph_and_a_signature(title: str, file: str, hook: str, spec: str) -> None:
    assert f"\n### {title}\n" in PAGE
    part = PAGE.split(f"\n### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]
    for word in (file, hook, f"{spec}(", "`penstock.engine`", "What is there today"):
        assert word in part, f"{title}: {word} is not said"
    for path in re.findall(r"`((?:core|plugins|transports)/[\w/]+\.py)`", part.replace(file, "")):
        assert (Path(__file__).resolve().parents[2] / path).is_file(), f"{title}: {path} does not exist"
