"""Drafters that read the model's hidden states, against a plain computation of everything anew: no cache, no pages, no batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig, tree_of
from penstock.plugins.devices.driver import Driver, Job, Options

Tensor = torch.Tensor
Named = dict[str, Tensor]
Load = Callable[..., Any]
H, INNER, VOCAB, DIM, LAYERS, K = 32, 48, 97, 16, 2, 3
EPS = 1e-5
LINE = (0,) * K
SMALL = 41


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def turned(x: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    low, high = x.chunk(2, -1)
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


def layer(named: Named, at: str, residual: Tensor, x: Tensor) -> Tensor:
    """Two heads of queries, one of keys and values; x is what attention reads."""
    positions = torch.arange(len(x))
    q, k, v = ((x @ named[f"{at}self_attn.{name}_proj.weight"].T).view(len(x), -1, DIM) for name in ("q", "k", "v"))
    q, k = turned(q, positions), turned(k, positions)
    scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) * DIM**-0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    attended = torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[:, 0]).reshape(len(x), -1)
    y = residual + attended @ named[f"{at}self_attn.o_proj.weight"].T
    z = norm(y, named[f"{at}post_attention_layernorm.weight"])
    gate, up, down = (named[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return y + (functional.silu(z @ gate.T) * (z @ up.T)) @ down.T


def target(named: Named, tokens: list[int]) -> tuple[list[Tensor], Tensor]:
    """(the streams in front of each layer and behind the last, the normalised last states)."""
    x = named["model.embed_tokens.weight"][tokens]
    streams = [x]
    for index in range(LAYERS):
        at = f"model.layers.{index}."
        x = layer(named, at, x, norm(x, named[f"{at}input_layernorm.weight"]))
        streams.append(x)
    return streams, norm(x, named["model.norm.weight"])


def chain(
    history: list[int],
    states: Tensor,
    table: Tensor,
    step: Callable[[Tensor, Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    ranks: Sequence[int],
) -> list[int]:
    """Drafts behind the history, each of its rank; `states` are those of all tokens but the last."""
    tokens, found = list(history), []
    for rank in ranks:
        y = step(states, table[tokens[1:]])[-1:]
        found.append(int(read(y).argsort(descending=True, stable=True)[rank]))
        tokens.append(found[-1])
        states = torch.cat([states, y])
    return found


def eagle3(own: Named, named: Named, history: list[int], ranks: Sequence[int] = LINE, after: bool = False) -> list[int]:
    streams, _ = target(named, history[:-1])

    def step(states: Tensor, embeds: Tensor) -> Tensor:
        normed = norm(states, own["midlayer.hidden_norm.weight"])
        x = torch.cat([norm(embeds, own["midlayer.input_layernorm.weight"]), normed], 1)
        return layer(own, "midlayer.", normed if after else states, x)

    def read(y: Tensor) -> Tensor:
        full = torch.full((VOCAB,), -torch.inf)
        full[torch.arange(SMALL) + own["d2t"]] = (norm(y, own["norm.weight"]) @ own["lm_head.weight"].T)[0]
        return full

    return chain(history, torch.cat(streams, 1) @ own["fc.weight"].T, named["model.embed_tokens.weight"], step, read, ranks)


def eagle(own: Named, named: Named, history: list[int], ranks: Sequence[int] = LINE) -> list[int]:
    def step(states: Tensor, embeds: Tensor) -> Tensor:
        x = torch.cat([embeds, states], 1) @ own["fc.weight"].T + own["fc.bias"]
        return layer(own, "layers.0.", x, x)

    _, states = target(named, history[:-1])
    return chain(history, states, own["embed_tokens.weight"], step, lambda y: (y @ named["lm_head.weight"].T)[0], ranks)


def mtp(own: Named, named: Named, history: list[int], ranks: Sequence[int] = LINE) -> list[int]:
    at = f"model.layers.{LAYERS}."

    def step(states: Tensor, embeds: Tensor) -> Tensor:
        x = torch.cat([norm(embeds, own[f"{at}enorm.weight"]), norm(states, own[f"{at}hnorm.weight"])], 1) @ own[f"{at}eh_proj.weight"].T
        return layer(own, at, x, norm(x, own[f"{at}input_layernorm.weight"]))

    _, states = target(named, history[:-1])
    last = own[f"{at}shared_head.norm.weight"]
    return chain(history, states, named["model.embed_tokens.weight"], step, lambda y: (norm(y, last) @ named["lm_head.weight"].T)[0], ranks)


def medusa(own: Named, named: Named, history: list[int], ranks: Sequence[int] = LINE) -> list[int]:
    _, states = target(named, history[:-1])
    found = []
    for k, rank in enumerate(ranks):
        x = states[-1]
        for index in range(2):
            x = x + functional.silu(x @ own[f"{k}.{index}.linear.weight"].T + own[f"{k}.{index}.linear.bias"])
        head = own[f"{k}.2.weight"] if k == 1 else named["lm_head.weight"]
        found.append(int((x @ head.T).argsort(descending=True, stable=True)[rank]))
    return found


def block(at: str, reads: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}self_attn.q_proj.weight": (2 * DIM, reads),
        f"{at}self_attn.k_proj.weight": (DIM, reads),
        f"{at}self_attn.v_proj.weight": (DIM, reads),
        f"{at}self_attn.o_proj.weight": (H, 2 * DIM),
        f"{at}post_attention_layernorm.weight": (H,),
        f"{at}mlp.gate_proj.weight": (INNER, H),
        f"{at}mlp.up_proj.weight": (INNER, H),
        f"{at}mlp.down_proj.weight": (H, INNER),
    }


AT = f"model.layers.{LAYERS}."
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "eagle3": {
        **block("midlayer.", 2 * H),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.hidden_norm.weight": (H,),
        "fc.weight": (H, 3 * H),
        "norm.weight": (H,),
        "lm_head.weight": (SMALL, H),
    },
    "eagle": {**block("layers.0.", H), "fc.weight": (H, 2 * H), "fc.bias": (H,), "embed_tokens.weight": (VOCAB, H)},
    "mtp": {
        **block(AT, H),
        **{f"{AT}{name}.weight": (H,) for name in ("enorm", "hnorm", "input_layernorm", "shared_head.norm")},
        f"{AT}eh_proj.weight": (H, 2 * H),
    },
    "medusa": {
        **{f"{k}.{i}.linear.weight": (H, H) for k in range(4) for i in range(2)},
        **{f"{k}.{i}.linear.bias": (H,) for k in range(4) for i in range(2)},
        "1.2.weight": (VOCAB, H),
    },
}
REFERENCES: dict[str, Callable[..., list[int]]] = {"eagle3": eagle3, "eagle": eagle, "mtp": mtp, "medusa": medusa}
EXTRA: dict[str, dict[str, Any]] = {
    "eagle3": {"draft_vocab_size": SMALL, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}},
    "medusa": {"medusa_num_heads": 4, "medusa_num_layers": 2},
}


@pytest.fixture
def head(folder: Path, tmp_path: Path) -> Callable[..., tuple[Path, Named]]:
    """head(method, **config changes): a drafter's folder and its tensors."""

    def make(method: str, **changes: Any) -> tuple[Path, Named]:
        generator = torch.Generator().manual_seed(11)
        own = {name: torch.empty(shape).normal_(0, 0.3, generator=generator) for name, shape in SHAPES[method].items()}
        for name in own:
            if "norm" in name and own[name].ndim == 1:
                own[name] += 1
        if method == "eagle3":
            kept = torch.randperm(VOCAB, generator=generator)[:SMALL].sort().values
            own["d2t"] = kept - torch.arange(SMALL)
            own["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, kept, True)
        where = tmp_path / method
        where.mkdir()
        config = {**json.loads((folder / "config.json").read_text()), "num_hidden_layers": 1, **EXTRA.get(method, {}), **changes}
        (where / "config.json").write_text(json.dumps(config))
        save_file(own, where / "model.safetensors")
        return where, own

    return make


def asked(method: str, where: Path) -> SpeculationConfig:
    return SpeculationConfig(methods=[DraftConfig(method=method, model=str(where), num_speculative_tokens=K)])


def jobs_of(count: int = 3, max_tokens: int = 14) -> list[Job]:
    rng = np.random.default_rng(3)
    greedy = SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1)
    return [Job(prompt=rng.integers(0, VOCAB, 4 + 15 * n).astype(np.int32), params=greedy, max_tokens=max_tokens) for n in range(count)]


def drafts_of(runner: Any, jobs: list[Job], options: Options) -> dict[tuple[int, ...], list[int]]:
    """History -> what was drafted behind it."""
    found: dict[tuple[int, ...], list[int]] = {}
    sample = runner.sample

    def listening(work: Any) -> Any:
        done = sample(work)()
        at = 0
        for row, (slot, position) in enumerate(zip(work.slots.tolist(), work.positions.tolist(), strict=True)):
            count = int(done.counts[row]) if len(done.counts) else 1
            history = tuple(runner.history[slot, : position + count].tolist())
            if work.drafts:
                found[history] = done.drafts[row * work.drafts : (row + 1) * work.drafts].tolist()
            at += count
        return lambda: done

    runner.sample = listening
    Driver(runner, options).run(jobs)
    return found


@pytest.mark.parametrize("method", list(SHAPES))
def test_a_head_drafts_what_its_formula_says_and_changes_nothing(
    method: str, head: Any, load: Load, folder: Path, make_tensors: Any
) -> None:
    where, own = head(method)
    named = make_tensors()
    plain, jobs = jobs_of(), jobs_of()
    Driver(load(folder, deterministic=True)).run(plain)
    runner = load(folder, deterministic=True, speculation=asked(method, where))
    options = Options(lookahead=lambda rng: K, chunk=lambda rng: rng.randint(1, 9), scatter=True, preempt=0.05, seed=5)
    found = drafts_of(runner, jobs, options)
    assert [(job.tokens, job.logprobs, job.prompt_logprobs) for job in jobs] == [
        (job.tokens, job.logprobs, job.prompt_logprobs) for job in plain
    ]
    assert len(found) > 20
    full = 0
    for history, drafts in found.items():
        wanted = REFERENCES[method](own, named, list(history))
        made = [draft for draft in drafts if draft >= 0]  # at a sequence's end the next block may be missing
        assert made == wanted[: len(made)]
        full += len(made) == K
    assert full > 15


TREE = "[(0,), (2,), (0, 0), (0, 1), (2, 1), (0, 1, 0), (2, 1, 1), (2, 1, 3)]"


@pytest.mark.parametrize("method", list(SHAPES))
def test_every_path_of_a_tree_is_what_the_formula_says(method: str, head: Any, load: Load, folder: Path, make_tensors: Any) -> None:
    where, own = head(method)
    named, paths = make_tensors(), tree_of(TREE)
    plain, jobs = jobs_of(2), jobs_of(2)
    Driver(load(folder)).run(plain)
    one = DraftConfig(method=method, model=str(where), num_speculative_tokens=len(paths), speculative_token_tree=TREE)
    runner = load(folder, speculation=SpeculationConfig(methods=[one]))
    options = Options(lookahead=lambda rng: len(paths), chunk=lambda rng: rng.randint(1, 9), scatter=True, preempt=0.05, seed=5)
    found = drafts_of(runner, jobs, options)
    assert [job.tokens for job in jobs] == [job.tokens for job in plain]
    full = 0
    for history, drafts in list(found.items())[::3]:
        made = [draft for draft in drafts if draft >= 0]  # at a sequence's end the next block may be missing
        assert drafts[len(made) :] == [-1] * (len(drafts) - len(made))
        for path, token in zip(paths, made, strict=False):
            assert token == REFERENCES[method](own, named, list(history), path)[-1]
        full += len(made) == len(paths)
    assert full > 4


def test_a_tree_that_is_deeper_than_there_are_heads(head: Any, load: Load, folder: Path) -> None:
    deep = str([(0,) * (depth + 1) for depth in range(5)] + [(1,)])
    one = DraftConfig(method="medusa", model=str(head("medusa")[0]), num_speculative_tokens=6, speculative_token_tree=deep)
    with pytest.raises(ConfigError, match="is 5 tokens deep, but the folder has 4 heads"):
        load(folder, speculation=SpeculationConfig(methods=[one]))


@pytest.mark.parametrize("method", ["eagle3", "eagle", "mtp"])
def test_drafts_now_and_then(method: str, head: Any, load: Load, folder: Path, make_tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is the program's, whoever looks into it; and what was made without drafts is read once some are asked for again, so that they are as apt as ever."""
    where, own = head(method)
    named = make_tensors()
    plain, jobs = jobs_of(), jobs_of()
    Driver(load(folder, deterministic=True)).run(plain)
    runner = load(folder, deterministic=True, speculation=asked(method, where))
    monkeypatch.setattr(runner._model, "step", lambda *step: pytest.fail("composed"))
    turns = iter([K, 1, 0, 0, 0, K, 0, K] * 20)
    options = Options(lookahead=lambda rng: next(turns), chunk=lambda rng: rng.randint(1, 9), scatter=True, preempt=0.05, seed=5)
    found = drafts_of(runner, jobs, options)
    assert [(job.tokens, job.logprobs, job.prompt_logprobs) for job in jobs] == [
        (job.tokens, job.logprobs, job.prompt_logprobs) for job in plain
    ]
    full = 0
    for history, drafts in found.items():
        wanted = REFERENCES[method](own, named, list(history))
        made = [draft for draft in drafts if draft >= 0]
        assert made == wanted[: len(made)]
        full += len(made) == K
    assert full > 8


@pytest.mark.parametrize("length", [1, 5])
def test_what_fell_out_of_a_ring_costs_drafts_alone(
    length: int, head: Any, load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _ = head("eagle3")
    plain, jobs = jobs_of(), jobs_of()
    Driver(load(folder, deterministic=True)).run(plain)
    monkeypatch.setattr("penstock.plugins.drafters.gaps.LONGEST", length)
    turns = iter([K, *[0] * 9, K, K] * 20)
    found = drafts_of(
        load(folder, deterministic=True, speculation=asked("eagle3", where)), jobs, Options(lookahead=lambda rng: next(turns))
    )
    assert [(job.tokens, job.logprobs) for job in jobs] == [(job.tokens, job.logprobs) for job in plain]
    assert found


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_who_is_not_read_has_no_drafts_and_costs_nothing(
    method: str, head: Any, load: Load, folder: Path, make_tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside those that are read, whose drafts are as apt as ever; and where nobody is, nothing is tapped, kept or read."""
    where, own = head(method)
    named = make_tensors()
    plain, jobs = jobs_of(5, 20), jobs_of(5, 20)
    Driver(load(folder, deterministic=True)).run(plain)
    runner = load(folder, deterministic=True, speculation=asked(method, where))
    assert runner.reads == (2,)
    turns = iter([K, 1, 0, 0, K, K, 0, K] * 20)
    some = Options(lookahead=lambda rng: next(turns), chunk=lambda rng: rng.randint(1, 9), scatter=True, preempt=0.05, seed=6, unread=0.5)
    found = drafts_of(runner, jobs, some)
    assert [(job.tokens, job.logprobs, job.prompt_logprobs) for job in jobs] == [
        (job.tokens, job.logprobs, job.prompt_logprobs) for job in plain
    ]
    full = 0
    for history, drafts in found.items():
        made = [draft for draft in drafts if draft >= 0]
        assert made == REFERENCES[method](own, named, list(history))[: len(made)]
        full += len(made) == K
    assert full > 5
    (drafter,) = runner._drafters
    for name in ("begin", "observe", "propose"):
        told = getattr(drafter, name)
        monkeypatch.setattr(
            drafter,
            name,
            lambda work, *rest, told=told, name=name: told(work) if name == "begin" and len(work.block_ids) else pytest.fail(name),
        )
    assert {job.unread for job in jobs} == {True, False}
    jobs = jobs_of(5, 20)
    nobody = drafts_of(runner, jobs, Options(lookahead=lambda rng: rng.choice([0, K]), unread=1.0))
    assert [job.tokens for job in jobs] == [job.tokens for job in plain]
    assert {max(drafts) for drafts in nobody.values()} == {-1}
    assert runner._launched is None


def test_a_program_without_taps_is_composed_where_somebody_looks(
    head: Any, load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no drafts are asked for a step is the program's; the first one with drafts has not seen enough, the next one has."""
    from penstock.plugins.devices.host_ops import WholeStep

    where, _ = head("eagle3")
    plain, jobs = jobs_of(), jobs_of()
    Driver(load(folder, deterministic=True)).run(plain)
    monkeypatch.setattr(WholeStep, "taps", False)
    runner = load(folder, deterministic=True, speculation=asked("eagle3", where))
    program, fused = runner._program, []
    monkeypatch.setattr(runner, "_program", lambda *step: (fused.append(1), program(*step))[1])
    turns = iter([K, K, 0, 0, 0, K, K, K] * 20)
    found = drafts_of(runner, jobs, Options(lookahead=lambda rng: next(turns)))
    assert [(job.tokens, job.logprobs) for job in jobs] == [(job.tokens, job.logprobs) for job in plain]
    assert fused
    assert {max(drafts) >= 0 for drafts in found.values()} == {True, False}


def test_heads_that_look_at_different_things(head: Any, load: Load, folder: Path) -> None:
    """One reads the streams between layers, another the last states: a step that the program computed, while no drafts were asked for, has those for the latter alone."""
    both = SpeculationConfig(methods=[one for method in ("eagle3", "mtp") for one in asked(method, head(method)[0]).methods])
    plain, jobs = jobs_of(), jobs_of()
    Driver(load(folder, deterministic=True)).run(plain)
    turns = iter([K, K, 0, 0, 0, K, K, K] * 20)
    found = drafts_of(load(folder, deterministic=True, speculation=both), jobs, Options(lookahead=lambda rng: next(turns)))
    assert [(job.tokens, job.logprobs) for job in jobs] == [(job.tokens, job.logprobs) for job in plain]
    assert any(max(drafts) >= 0 for drafts in found.values())


def test_norm_before_residual(head: Any, load: Load, folder: Path, make_tensors: Any) -> None:
    where, own = head("eagle3", norm_before_residual=True)
    found = drafts_of(load(folder, speculation=asked("eagle3", where)), jobs_of(1, 6), Options(lookahead=lambda rng: K))
    for history, drafts in found.items():
        wanted = eagle3(own, make_tensors(), list(history), after=True)
        assert drafts == wanted[: len(drafts)] or -1 in drafts


@pytest.mark.parametrize(
    ("method", "change"), [("eagle3", {"vocab_size": 96}), ("medusa", {"hidden_size": 64}), ("medusa", {"vocab_size": 96})]
)
def test_heads_of_another_model_are_refused(method: str, change: dict[str, int], head: Any, load: Load, folder: Path) -> None:
    where, _ = head(method, **change)
    with pytest.raises(CheckpointError, match="another model"):
        load(folder, speculation=asked(method, where))


def test_heads_need_a_folder(load: Load, folder: Path) -> None:
    for method in ("eagle", "medusa", "draft_model"):
        with pytest.raises(ConfigError, match='needs "model"'):
            load(folder, speculation=SpeculationConfig(methods=[DraftConfig(method=method)]))


@pytest.mark.parametrize("field", ["draft_vocab_size", "medusa_num_heads"])
@pytest.mark.parametrize("value", ["many", -1, 2.5, True])
def test_a_number_in_config_that_is_none(field: str, value: object, head: Any, load: Load, folder: Path) -> None:
    method = "medusa" if field == "medusa_num_heads" else "eagle3"
    where, _ = head(method, **{field: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: '{field}' must be a number above 0"):
        load(folder, speculation=asked(method, where))


@pytest.mark.parametrize("method", [*SHAPES, "draft_model"])
@pytest.mark.parametrize("given", [*SHAPES, "draft_model"])
def test_a_folder_of_another_kind_is_named(method: str, given: str, head: Any, load: Load, folder: Path) -> None:
    if method == given:
        return
    kind = {"medusa": "Medusa heads", "eagle3": "an EAGLE-3 head", "eagle": "an EAGLE head", "mtp": "a multi-token prediction layer"}
    words = {"medusa": "MedusaModel", "eagle3": "LlamaForCausalLMEagle3", "eagle": "EagleLlama", "mtp": "LlamaForCausalLMNextN"}
    where = folder if given == "draft_model" else head(given, architectures=[words[given]])[0]
    with pytest.raises(CheckpointError) as raised:
        load(folder, speculation=asked(method, where))
    said = str(raised.value)
    assert f"--speculative-config: the method '{method}' takes {kind.get(method, 'a model of its own')}, but " in said
    assert f"{where} is {kind.get(given, 'a model of its own')} (" in said
    assert f'"method": "{given}"' in said


def test_more_drafts_than_medusa_heads_are_refused_with_both_numbers(head: Any, load: Load, folder: Path) -> None:
    where, _ = head("medusa")
    many = SpeculationConfig(methods=[DraftConfig(method="medusa", model=str(where), num_speculative_tokens=5)])
    with pytest.raises(ConfigError, match=r"'num_speculative_tokens' is 5, but .*medusa has 4 Medusa heads.*at most 4"):
        load(folder, speculation=many)
