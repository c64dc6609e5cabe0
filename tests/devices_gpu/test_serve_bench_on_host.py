"""The whole-server benchmark's own machinery, on host memory and the fake device: it must not fail for the first time on a lent machine."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.contract.host import PluginHost
from penstock.plugins.commands.bench import cuda_bench, cuda_serve_bench, cuda_timeline
from penstock.plugins.devices import cuda
from penstock.plugins.devices.lane import HostLane
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

ROOT = Path(cuda_bench.__file__).resolve().parents[3]
TINY = {**cuda_bench.LLAMA_8B, "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch, reference: dict[str, Any]) -> None:
    def load(self: Any, config: Any, progress: Callable[[str, float], None]) -> Any:
        return cuda.load(config, progress, HostLane(), {"bfloat16": torch.float32}, depth=2, **reference)

    monkeypatch.setattr(cuda.CudaDevice, "load", load)
    monkeypatch.setattr(PluginHost, "choose_device", lambda self, wanted: type("Spec", (), {"factory": cuda.CudaDevice}))


def pictures() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("timeline", ROOT / "docs" / "timeline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_token_of_the_synthetic_tokenizer_has_text(tmp_path: Path) -> None:
    path = cuda_serve_bench.synthetic_folder({**TINY, "vocab_size": 20_000}, tmp_path, "model")
    tokenizer = HuggingFaceTokenizer.load(path)
    assert tokenizer.vocab_size == 20_000
    assert tokenizer.is_byte_exact()
    assert all(tokenizer.token_bytes(token) for token in range(20_000))
    (ids,) = tokenizer.encode_batch(["Hello there"], add_special_tokens=True)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == "Hello there"


@pytest.mark.usefixtures("on_host")
def test_a_timeline_is_taken_and_drawn(tmp_path: Path) -> None:
    path = cuda_bench.folder_of(TINY, tmp_path, "tiny")
    found, kept = cuda_timeline.trace(path, rows=4, requests=7, input_len=40, output_len=48)
    assert found["steps"] > 40
    assert 0 <= found["device_idle"] <= 1
    assert len(kept["decode"]) == len(kept["mixed"]) == cuda_timeline.SHOWN_STEPS
    for step in [*kept["decode"], *kept["mixed"]]:
        assert step["launch"][0] <= step["launch"][1] <= step["result"][1]
        assert step["device"][0] <= step["device"][1]
        # The host's lane computes while it launches, so the device's interval lies within the launch's: the clocks agree.
        assert step["launch"][0] - 1e5 <= step["device"][0]
        assert step["device"][1] <= step["launch"][1] + 1e5
    svg = ElementTree.fromstring(pictures().draw(kept))
    bars = svg.findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 3 * 2 * cuda_timeline.SHOWN_STEPS


def test_what_is_shown_are_consecutive_steps() -> None:
    steps = [{"step": n, "rows": 4, "decode_rows": 4} for n in range(40) if n != 20]
    steps[29]["decode_rows"] = 3  # step 30
    shown = cuda_timeline.window(steps, lambda s: s["decode_rows"] == 4)
    assert [b["step"] - a["step"] for a, b in itertools.pairwise(shown)] == [1] * 7
    mixed = cuda_timeline.window(steps, lambda s: True, wants=lambda s: s["decode_rows"] < s["rows"])
    assert mixed[2]["step"] == 30
    assert cuda_timeline.window(steps[:5], lambda s: True) == []


def test_the_published_timeline_shows_launches_under_the_step_before() -> None:
    file = ROOT / "docs" / "benchmarks" / "h200-timeline.json"
    if not file.exists():
        pytest.skip("no timeline was taken on a device yet")
    data = json.loads(file.read_text())
    assert len(data["decode"]) == cuda_timeline.SHOWN_STEPS
    for a, b in itertools.pairwise(data["decode"]):
        assert b["launch"][0] < a["device"][1]
    assert (file.with_suffix(".svg")).read_text() == pictures().draw(data)


@pytest.mark.usefixtures("on_host")
def test_checkpoints_are_written_and_loaded(tmp_path: Path) -> None:
    found = cuda_serve_bench.loading({**TINY, "tie_word_embeddings": False}, tmp_path, kv_cache_memory_bytes=1 << 22, max_model_len=64)
    assert found["bytes"] > 2 * 2 * 4096 * 32
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) == 4
    assert {"first", "again", "dummy"} <= set(found)
    assert all(found[name]["gb_s"] > 0 for name in ("first", "again", "dummy"))


def test_rates_and_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RATE", raising=False)
    known = {"serve_8b": {"output_tokens_s": 2000.0, "requests": 10, "output_tokens": 100}}
    assert cuda_serve_bench.offered_rate(known) == pytest.approx(140.0)
    published = tmp_path / "published.json"
    published.write_text(json.dumps(known))
    assert cuda_serve_bench.offered_rate({"serve_8b": {"error": "x"}}, published) == pytest.approx(140.0)
    assert 10 < cuda_serve_bench.offered_rate({}, cuda_serve_bench.PUBLISHED) < 500
    with pytest.raises(ValueError, match="RATE"):
        cuda_serve_bench.offered_rate({})
    assert cuda_serve_bench.order(["cold", "http_8b"], {}) == ["serve_8b", "cold", "http_8b"]
    assert cuda_serve_bench.order(["http_8b"], known) == ["http_8b"]
    assert cuda_serve_bench.order([], known) == list(cuda_serve_bench.LIMITS_S)
    assert all(callable(getattr(cuda_serve_bench, name)) for name in cuda_serve_bench.LIMITS_S)


def test_quantiles_between_two_scrapes() -> None:
    page = 'penstock_x_bucket{model="m",le="1.0"} %s\npenstock_x_bucket{model="m",le="2.0"} %s\npenstock_x_bucket{model="m",le="+Inf"} %s\n'
    before, after = (cuda_serve_bench.histograms(page % counts)["penstock_x"] for counts in (("5", "5", "5"), ("5", "15", "15")))
    assert cuda_serve_bench.quantile(before, after, 0.5) == pytest.approx(1.5)
    assert cuda_serve_bench.quantile(after, after, 0.5) is None


def test_starts_are_measured_cold_and_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
        monkeypatch.setenv(name, "x")

    def measure(args: list[str], *, idle_s: float, timeout_s: float) -> dict[str, Any]:
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        cache.mkdir(exist_ok=True)
        (cache / "kernel").write_bytes(b"x")
        return {"ready_s": 1.0, "first_token_s": 2.0, "exit_status": 0}

    found = cuda_serve_bench.starts(["model"], tmp_path, measure)
    assert found["cold"] == {"ready_s": 1.0, "first_token_s": 2.0, "exit_status": 0, "cache_files": 1, "cache_mib": 0.0}
    assert set(found) == {"cold", "warm", "warm_again"}


MAIN = """
import json, sys
from pathlib import Path
from penstock.plugins.commands.bench import cuda_bench, cuda_serve_bench as bench
root = Path(sys.argv[1])
bench.entry_points(root / "site")
fake = root / "site" / "fake-0.dist-info"
fake.mkdir()
(fake / "METADATA").write_text("Metadata-Version: 2.1\\nName: fake\\nVersion: 0\\n")
(fake / "entry_points.txt").write_text("[penstock.engine]\\nfake = penstock.core.contract.fake_device\\n")
bench.EDGE_S = 0.3
shape = {**cuda_bench.LLAMA_8B, "vocab_size": 3000}
args = [bench.synthetic_folder(shape, root, "fake"), "--device", "fake", "--edge-workers", "2", "--max-model-len", "4096"]
print("RESULT", json.dumps(bench.over_http(args, rate=30.0, seconds=1.5, vocab=3000, warm=4)))
"""


def test_load_over_http_from_a_tree_that_nobody_installed(tmp_path: Path) -> None:
    """Without site-packages' knowledge of Penstock: only PYTHONPATH leads to it, as on a machine that got a copy of the tree."""
    tree = tmp_path / "tree"
    (tree / "src" / "penstock").mkdir(parents=True)
    for file in (ROOT / "src" / "penstock").iterdir():
        target = tree / "src" / "penstock" / file.name
        if file.is_symlink():
            target.symlink_to(os.readlink(file))
        elif file.is_file():
            target.write_bytes(file.read_bytes())
    for name in ("core", "plugins", "transports", "kernels"):
        (tree / name).symlink_to(ROOT / name)
    (tree / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    # Not this environment's interpreter, which knows Penstock, but the one below it, with all libraries except Penstock.
    hidden = tmp_path / "libraries"
    hidden.mkdir()
    places = dict.fromkeys(Path(str(metadata.distribution(name).locate_file(""))) for name in ("trio", "litestar", "numpy", "uvloop"))
    for entry in (entry for place in places for entry in place.iterdir()):
        if "penstock" not in entry.name and not entry.name.endswith(".pth") and not (hidden / entry.name).exists():
            (hidden / entry.name).symlink_to(entry)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(hidden)]), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys._base_executable, "-c", MAIN, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, done.stderr[-3000:]
    found = json.loads(line[7:])
    assert (found["failed"], found["short"], found["whole_run"]["errors"]) == (0, 0, [])
    assert (found["whole_run"]["completed"], found["whole_run"]["errors"]) == (45, [])
    assert found["itl_ms"]["p95"] > 0
    assert {"client", "pk-engine-0", "pk-engine-0/0"} <= set(found["cpu_cores_used"])
    assert found["server_says"]["inter_token_latency_seconds"]["p50"] is not None
    assert found["rate_offered"] == 30.0


def test_a_server_that_dies_costs_no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(OSError, match="left with status"):
        cuda_serve_bench.starts(["--no-such-flag"], tmp_path)
