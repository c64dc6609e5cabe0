"""The example plugins in the real engine: the demo model gives with them what it gives with the built-in parts."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from penstock import LLM, SamplingParams
from penstock.core.contract.drafters import drafter_for
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.errors import CheckpointError, ConfigError, UnsupportedFeature
from penstock.core.protocol.model_folder import demo_folder
from penstock.core.protocol.speculation import DraftConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DOCS = Path(__file__).resolve().parents[2] / "docs"
PACKAGES = ["attention_plain", "phrases_drafter", "queue_probe", "shortest_first", "weights_npz"]
PROMPTS = ["Penstock is", "Count from 1 to 20: 1, 2,", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=3)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package in PACKAGES:
        monkeypatch.syspath_prepend(str(EXAMPLES / package))
    yield
    for package in PACKAGES:
        sys.modules.pop(f"penstock_{package}", None)


def answers(**options: Any) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Tokens and log-probabilities of each prompt."""
    with LLM(kv_cache_memory_bytes=64 << 20, **options) as llm:
        found = [result.outputs[0] for result in llm.generate(PROMPTS, GREEDY)]
    return [(list(o.token_ids), [{t: one.logprob for t, one in at.items()} for at in o.logprobs or []]) for o in found]


@pytest.mark.slow
def test_the_attention_example_gives_the_built_in_answers() -> None:
    right = answers(dtype="float32")
    mine = answers(dtype="float32", attention_backend="plain", extra_plugins=["penstock_attention_plain"])
    assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in right]
    for (_, ours), (_, theirs) in zip(mine, right, strict=True):
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            shared = a.keys() & b.keys()
            assert shared
            assert [a[token] for token in shared] == pytest.approx([b[token] for token in shared], abs=2e-4)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """The demo model, its weights as weights.npz."""
    for file in demo_folder().iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, tmp_path)
    save(tmp_path, {name: value.float().numpy() for name, value in load_file(demo_folder() / "model.safetensors").items()})
    return tmp_path


def save(folder: Path, arrays: dict[str, Any]) -> None:
    np.savez(folder / "weights.npz", **arrays)


@pytest.mark.slow
def test_the_weight_source_example_gives_the_same_bits(npz: Path) -> None:
    assert answers(model=str(npz), load_format="npz", extra_plugins=["penstock_weights_npz"]) == answers()


def source(folder: Path) -> Any:
    spec: Any = PluginHost("engine", extra=["penstock_weights_npz"]).load().weight_sources()["npz"]
    return spec.factory(str(folder), "npz", dtype=torch.bfloat16, seed=0, std=0.02)


def test_the_weight_source_example_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.npz cannot be read"):
        source(tmp_path)
    (tmp_path / "weights.npz").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"weights\.npz cannot be read"):
        source(tmp_path)
    save(tmp_path, {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8), "c": np.ones(1, np.float32)})
    weights = source(tmp_path)
    taken = weights.take("a", (2, 3))
    assert (taken.dtype, taken.is_contiguous(), weights.has("a"), weights.has("d")) == (torch.bfloat16, True, True, False)
    with pytest.raises(CheckpointError, match="'d' is missing"):
        weights.take("d", (1,))
    with pytest.raises(CheckpointError, match=r"shape \[1\], the model asks for \[2\]"):
        weights.take("c", (2,))
    with pytest.raises(UnsupportedFeature, match="'b' is int8"):
        weights.take("b", (4,))
    with pytest.raises(CheckpointError, match="does not use: b, c"):
        weights.finish()
    weights = source(tmp_path)
    weights.take("a", (2, 3))
    weights.ignore("b", "c", "never there")
    weights.finish()
    before = weights.identity()
    save(tmp_path, {"a": np.zeros((2, 3), np.float32)})
    assert source(tmp_path).identity() != before


@pytest.mark.parametrize("fence", ["0", "1"])
def test_the_actor_example_measures_the_way_to_the_device(
    fence: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a real runner, which has no controls: the queue answers the fence itself. Without the fence it gives and takes nothing of the queue's."""
    monkeypatch.setenv("QUEUE_PROBE_S", "0.01")
    monkeypatch.setenv("QUEUE_PROBE_FENCE", fence)
    heard = threading.Event()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.set()

    logger = logging.getLogger("penstock.queue_probe")
    caplog.set_level(logging.INFO, logger=logger.name)
    logger.addHandler(ear := Ear())
    try:
        with LLM(kv_cache_memory_bytes=64 << 20, extra_plugins=["penstock_queue_probe"]) as llm:
            assert heard.wait(20)
            llm.generate(PROMPTS, GREEDY)
    finally:
        logger.removeHandler(ear)
    said = [re.fullmatch(r"to the engine (\S+) ms, in the device's queue (\S+) ms, back \S+ ms", text) for text in caplog.messages]
    assert said
    assert all(said)
    waits = [float(one.group(2)) for one in said if one is not None]
    assert (max(waits) > 0) is (fence == "1")


def test_the_drafter_example_says_how_phrases_go_on() -> None:
    spec = drafter_for("phrases", PluginHost("engine", extra=["penstock_phrases_drafter"]).load().drafters())
    config = DraftConfig(method="phrases", options={"phrases": [[1, 2, 3, 4], [2, 3, 9]]})
    drafter: Any = spec.factory(config=config, vocab=10, longest=64)
    drafter.begin(7, np.array([5, 1], np.int32), "")
    found = []
    for token in (2, 3, 4, 2, 3):
        drafter.extend(7, np.array([token], np.int32))
        found.append(drafter.propose(7, 2).tolist())
    assert found == [[3, 4], [4], [], [], [9]]
    drafter.end(7)
    for wrong in ("x", [1], [[10]], [[-1, 2]]):
        with pytest.raises(ConfigError, match=r"options\.phrases"):
            spec.factory(config=DraftConfig(method="phrases", options={"phrases": wrong}), vocab=10, longest=64)


def test_a_backend_that_does_not_fit_is_refused_with_its_own_words() -> None:
    host = PluginHost("engine", extra=["penstock_attention_plain"]).load()
    spec: Any = host.attention_backends()["plain"]
    assert spec.supports(SimpleNamespace(head_dim=24), "float16") == "head_dim 24 is no multiple of 16"
    with pytest.raises(ConfigError, match="Did you mean 'plain'"):
        host.pick("attention_backends", "plian", "attention-backend")


@pytest.mark.parametrize("package", PACKAGES)
def test_an_installed_example_is_found_by_its_entry_point(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip leaves it: the module on the path, and metadata beside it that pyproject.toml decides."""
    project = tomllib.loads((EXAMPLES / package / "pyproject.toml").read_text(encoding="utf-8"))
    groups = project["project"]["entry-points"]
    assert all(list(points.values()) == [f"penstock_{package}"] for points in groups.values())
    assert project["tool"]["setuptools"]["py-modules"] == [f"penstock_{package}"]
    info = tmp_path / f"penstock_{package}-1.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: 1.0.0\n")
    lines = [line for group, points in groups.items() for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    for group in groups:
        role: Any = group.removeprefix("penstock.")
        rows = PluginHost(role).load().check().report()
        (row,) = [row for row in rows if row[1] == project["project"]["name"]]
        assert row[2:4] == ["1.0.0", role]
        assert row[4].startswith("register_")


@pytest.mark.parametrize("package", PACKAGES)
def test_all_that_an_example_imports_is_on_the_pages(package: str) -> None:
    """They can be written from the pages alone."""
    pages = (DOCS / "hooks.md").read_text(encoding="utf-8") + (DOCS / "plugins.md").read_text(encoding="utf-8")
    text = (EXAMPLES / package / f"penstock_{package}.py").read_text(encoding="utf-8")
    found = re.findall(r"from (penstock\.[\w.]+) import (.+)", text)
    assert found
    for module, names in found:
        assert module in pages, module
        for name in names.split(", "):
            assert re.search(rf"\b{name}\b", pages), name
