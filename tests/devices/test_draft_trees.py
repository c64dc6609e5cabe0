"""Trees of drafts on the CPU's runner: whoever makes them, and whatever they say, every answer is the one that it is without."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draft_kit import truth_of
from safetensors.torch import save_file

from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import EngineFailure, UnsupportedFeature
from penstock.core.protocol.messages import Forward, Sample, SlotSampling
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig
from penstock.plugins.attention.native import NativeAttention
from penstock.plugins.devices import cpu
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.drafters.api import NoLayers, Seen
from penstock.plugins.drafters.trees import Tree

Load = Callable[..., Any]
VOCAB = 97
TREES = {
    "wide": "[(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0), (1, 0, 1)]",
    "broad": str([(rank,) for rank in range(9)]),
    "late": "[(0,), (1,), (2,), (2, 0), (2, 1), (2, 1, 0), (2, 1, 0, 0), (2, 1, 0, 0, 0)]",
}
PARAMS = [
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=5, logprobs=0),
    SamplingParams(temperature=0.9, seed=7, logit_bias={3: 2.5, 90: -100.0}, min_p=0.02),
    SamplingParams(temperature=1.0, seed=9, min_tokens=11, allowed_token_ids=list(range(40)), bad_words_token_ids=[[4]]),
    SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=1),
]


class Told(NoLayers):
    """Says somewhere in the tree what the sequences said when they were run alone, and elsewhere anything: `lies` is the chance that the right way ends at a node. "empty", "foreign",
    "same": no tokens at all, what is none, and the same token everywhere."""

    name = "told"

    def __init__(self, tree: Tree, truth: dict[bytes, int], lies: float = 0.0, kind: str = "") -> None:
        self.tree, self.truth, self.lies, self.kind = tree, truth, lies, kind
        self.max_lookahead = tree.nodes - 1
        self.rng = random.Random(3)

    def propose(self, seen: Seen, out: torch.Tensor) -> None:
        proposal, parents = seen.proposal, self.tree.parents.tolist()
        assert proposal is not None
        for row, (slot, end) in enumerate(zip(proposal.slots.tolist(), proposal.ends.tolist(), strict=True)):
            history = seen.history[slot, :end].tolist()
            out[row] = torch.tensor([self.rng.randrange(VOCAB) for _ in range(out.shape[1])])
            node = 0
            while children := [child for child in range(1, self.tree.nodes) if parents[child] == node]:
                node = self.rng.choice(children)
                token = self.truth.get(i32(history).tobytes(), 0)
                out[row, node - 1] = (token + (self.rng.random() < self.lies)) % VOCAB
                history.append(token)
            if self.kind == "same":
                out[row] = self.truth.get(i32(history[:end]).tobytes(), 0)
            elif self.kind:
                out[row, self.rng.randrange(out.shape[1])] = VOCAB + 5 if self.kind == "foreign" else -1


def jobs_of(max_tokens: int = 18) -> list[Job]:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, VOCAB, 5 + 19 * index).astype(np.int32) for index in range(len(PARAMS))]
    for prompt in prompts:
        prompt[:4] = prompts[0][:4]
    return [
        Job(prompt=prompt, params=params, max_tokens=max_tokens, choice=index % 3, stop_ids=(1, 2, 5))
        for index, (prompt, params) in enumerate(zip(prompts, PARAMS, strict=True))
    ]


def same(mine: list[Job], theirs: list[Job], *, bits: bool = True) -> None:
    """Tokens, and every bit of the log-probabilities."""
    for a, b in zip(mine, theirs, strict=True):
        assert a.tokens == b.tokens
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            np.testing.assert_allclose(np.frombuffer(x, np.float32), np.frombuffer(y, np.float32), atol=0 if bits else 2e-4)
        assert a.prompt_logprobs.keys() == b.prompt_logprobs.keys()
        assert not bits or a.prompt_logprobs == b.prompt_logprobs


def ways(count: int) -> dict[str, Options]:
    return {
        "at once": Options(lookahead=lambda rng: count),
        "in chunks": Options(lookahead=lambda rng: count, chunk=lambda rng: rng.randint(1, 9), scatter=True, seed=1),
        "now and then": Options(lookahead=lambda rng: rng.choice([0, count]), seed=2),
        "shared": Options(lookahead=lambda rng: count, share=True, at_once=2),
        "preempted": Options(lookahead=lambda rng: count, preempt=0.15, seed=3),
    }


@pytest.fixture
def drafting(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """drafting(drafter, **RunnerConfig fields): a runner with that drafter."""

    def make(drafter: Any, **over: Any) -> Any:
        monkeypatch.setattr(cpu, "load_drafters", lambda *_, **__: ([drafter], drafter.max_lookahead))
        return load(folder, **over)

    return make


@pytest.mark.parametrize(
    ("tree", "more", "window"),
    [
        ("wide", {}, 0),
        ("broad", {"deterministic": True}, 0),
        ("late", {}, 24),
        ("late", {"kv_cache_dtype": "fp8_e4m3"}, 0),
        ("wide", {"kv_cache_dtype": "int8", "deterministic": True}, 4),
    ],
)
def test_trees_change_no_bit(
    tree: str, more: dict[str, Any], window: int, drafting: Any, load: Load, folder: Path, rewrite: Callable[..., None]
) -> None:
    """With a window that ends in the prompt, or inside the tree."""
    shape = Tree.of(TREES[tree])
    assert shape is not None
    if window:
        rewrite(folder, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=window)
    plain = jobs_of()
    Driver(load(folder, **more)).run(plain)
    truth = truth_of(plain)
    whole: dict[float, float] = {}
    cases = ways(shape.nodes - 1)
    for lies, name in [(0.0, "at once"), (1.0, "at once"), *((0.3, name) for name in cases)]:
        jobs = jobs_of()
        driver = Driver(drafting(Told(shape, truth, lies), **more), cases[name])
        driver.run(jobs)
        same(jobs, plain)
        if name == "at once":
            whole[lies] = 1 + driver.accepted / (driver.steps * len(jobs))
    assert whole[0.0] > 1.3
    assert whole[0.0] > whole[0.3] > whole[1.0]


@pytest.mark.parametrize("kind", ["empty", "foreign", "same"])
def test_what_is_no_tree_of_tokens_harms_nobody(kind: str, drafting: Any, load: Load, folder: Path) -> None:
    shape = Tree.of(TREES["wide"])
    assert shape is not None
    plain = jobs_of()
    Driver(load(folder)).run(plain)
    for name in ("at once", "shared"):
        jobs, options = jobs_of(), ways(shape.nodes - 1)[name]
        Driver(drafting(Told(shape, truth_of(plain), 0.0, kind)), options).run(jobs)
        same(jobs, plain)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_drafts_of_the_host_are_nodes_too(backend: str, drafting: Any, load: Load, folder: Path) -> None:
    shape = Tree.of(TREES["late"])
    assert shape is not None
    plain, rng = jobs_of(), random.Random(4)
    Driver(load(folder, attention_backend=backend)).run(plain)
    jobs = jobs_of()
    told = Options(told=lambda job: [rng.randrange(3) for _ in range(shape.nodes - 1)])
    Driver(drafting(Told(shape, {}), attention_backend=backend), told).run(jobs)
    same(jobs, plain, bits=backend == "native")  # torch's sums hang on the number of rows


def test_a_draw_from_the_middle_is_refused(drafting: Any) -> None:
    shape = Tree.of(TREES["wide"])
    assert shape is not None
    runner = drafting(Told(shape, {}))
    assert (runner.masks_ahead, runner.adjusts_ahead, runner.widths) == (False, False, (9,))
    places = {"place_slots": i32([0]), "place_counts": i32([6]), "place_tokens": i32([1, 2, 3, 4, 5, 6])}
    blocks = {"block_slots": i32([0]), "block_index": i32([0]), "block_ids": i32([0])}
    head: dict[str, Any] = {"engine": 0, "epoch": 0, "step": 1}
    runner.forward(Forward(**head, slots=i32([0]), starts=i32([2]), counts=i32([3]), num_decode=1, lookahead=9, **places, **blocks))
    placed = [SlotSampling(slot=0, choice=0, prompt_len=3, params=PARAMS[0])]
    with pytest.raises(EngineFailure, match="middle of a tree"):
        runner.sample(Sample(**head, rows=i32([0]), slots=i32([0]), positions=i32([4]), lookahead=9, places=placed))


def test_trees_are_refused_where_they_are_not_served(load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(method: str, **more: Any) -> SpeculationConfig:
        return SpeculationConfig(
            methods=[DraftConfig(method=method, speculative_token_tree=TREES["wide"], num_speculative_tokens=9, **more)]
        )

    with pytest.raises(Exception, match="says nothing to the method 'ngram'"):
        load(folder, speculation=asked("ngram"))
    monkeypatch.setattr(NativeAttention, "trees", False)
    with pytest.raises(UnsupportedFeature, match="by the attention backend 'native'"):
        load(folder, speculation=asked("medusa"))


def test_a_tree_is_no_part_of_the_fingerprint(load: Load, folder: Path, tmp_path: Path) -> None:
    """Answers are the same to the bit."""
    heads = tmp_path / "heads"
    heads.mkdir()
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    (heads / "config.json").write_text(json.dumps({"architectures": ["MedusaModel"], "medusa_num_heads": 2, "medusa_num_layers": 1}))
    layers = {f"{head}.0.linear.weight": torch.zeros(width, width) for head in range(2)}
    save_file(layers | {f"{head}.0.linear.bias": torch.zeros(width) for head in range(2)}, heads / "model.safetensors")

    def told(tree: str | None, nodes: int) -> str:
        one = DraftConfig(method="medusa", model=str(heads), num_speculative_tokens=nodes, speculative_token_tree=tree)
        found: str = load(folder, speculation=SpeculationConfig(methods=[one])).fingerprint
        return found

    assert load(folder).fingerprint == told(None, 2) == told("[(0,), (1,)]", 2)
