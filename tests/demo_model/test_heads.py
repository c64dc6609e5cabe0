"""Brook's speculative heads: the plain modules do what their definition says, and acceptance is counted rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import brook_heads
import brook_model
import evaluate_heads
import pytest
import torch
import torch.nn.functional as F

SMALL = brook_model.Shape(hidden=32, layers=4, heads=4, kv_heads=2, intermediate=48, vocabulary=64)
HEADS = brook_heads.HeadShape(
    medusa_heads=3, medusa_layers=2, eagle_intermediate=40, draft_vocabulary=24, taps=(1, 2, 4), mtp_intermediate=40
)


@pytest.fixture(scope="module")
def target() -> brook_model.Llama:
    torch.manual_seed(3)
    return brook_model.Llama(SMALL).requires_grad_(False)


def _head(method: str, target: brook_model.Llama) -> Any:
    torch.manual_seed(4)
    head = brook_heads.make_head(method, SMALL, HEADS)
    for weight in head.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    if method == "eagle3":
        head.choose(target, torch.arange(2, 50, 2))
    return head.requires_grad_(False)


def _rms(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.epsilon)


def _attention(x: torch.Tensor, part: Any) -> torch.Tensor:
    """Causal attention over one sequence, written apart."""
    length, width = x.shape[0], SMALL.head_dim
    cos, sin = brook_model.rotary(torch.arange(length), SMALL)
    q = brook_model.rotate((x @ part.q_proj.weight.T).view(length, -1, width), cos, sin).transpose(0, 1)
    k = brook_model.rotate((x @ part.k_proj.weight.T).view(length, -1, width), cos, sin).transpose(0, 1)
    v = (x @ part.v_proj.weight.T).view(length, -1, width).transpose(0, 1)
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    scores = (q @ k.mT) / width**0.5 + torch.full((length, length), float("-inf")).triu(1)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1) @ part.o_proj.weight.T


def _swiglu(x: torch.Tensor, part: Any) -> torch.Tensor:
    return (F.silu(x @ part.gate_proj.weight.T) * (x @ part.up_proj.weight.T)) @ part.down_proj.weight.T


def _run(head: Any, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """The layer of a chain over a whole sequence of hidden states and embeddings."""
    if head.method == "eagle3":
        layer = head.midlayer
        both = torch.cat((_rms(embeds, layer.input_layernorm), _rms(hidden, layer.hidden_norm)), -1)
        x = hidden + _attention(both, layer.self_attn)
    else:
        layer = head
        x = torch.cat((_rms(embeds, head.enorm), _rms(hidden, head.hnorm)), -1) @ head.eh_proj.weight.T
        x = x + _attention(_rms(x, layer.input_layernorm), layer.self_attn)
    return x + _swiglu(_rms(x, layer.post_attention_layernorm), layer.mlp)


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_a_chain_computed_at_once_is_the_chain_computed_step_by_step(method: str, target: brook_model.Llama) -> None:
    head = _head(method, target)
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(5))
    seen = brook_heads.watch(target, tokens, HEADS.taps)
    roots = torch.tensor([[4, 5, 6, 7], [9, 10, 11, 12]])
    made = head.guess(target, tokens, seen, roots, 4)
    table = target.model.embed_tokens.weight
    for row in range(2):
        for place, root in enumerate(roots[row].tolist()):
            hidden = (seen.taps[row, : root + 1] @ head.fc.weight.T) if method == "eagle3" else seen.last[row, : root + 1]
            for step in range(4):
                # Position i pairs a hidden state of i with the embedding of token i + 1.
                out = _run(head, hidden, table[tokens[row, 1 : root + 2 + step]])
                if method == "eagle3":
                    wanted = _rms(out[-1], head.norm) @ head.lm_head.weight.T
                else:
                    wanted = _rms(out[-1], head.shared_head.norm) @ table.T
                torch.testing.assert_close(made[step][row, place], wanted, rtol=2e-4, atol=2e-4)
                hidden = torch.cat((hidden, out[-1:]))


def test_medusa_reads_one_state_with_each_head(target: brook_model.Llama) -> None:
    head = _head("medusa", target)
    tokens = torch.arange(12)[None]
    seen = brook_heads.watch(target, tokens, HEADS.taps)
    made = head.guess(target, tokens, seen, torch.tensor([[7]]), 3)
    for index in range(3):
        x = seen.last[0, 7]
        for block in range(2):
            linear = head[index][block].linear
            x = x + F.silu(linear.weight @ x + linear.bias)
        torch.testing.assert_close(made[index][0, 0], target.model.embed_tokens.weight @ x)


def test_the_target_is_watched_before_the_tapped_layers(target: brook_model.Llama) -> None:
    tokens = torch.arange(9)[None]
    seen = brook_heads.watch(target, tokens, (0, 4))
    torch.testing.assert_close(seen.taps[..., :32], target.model.embed_tokens(tokens))
    torch.testing.assert_close(target.model.norm(seen.taps[..., 32:]), seen.last)
    logits = seen.last[0, :-1] @ target.model.embed_tokens.weight.T
    assert logits.argmax(-1).tolist() == brook_model.argmax_along(target, [[0]], [list(range(1, 9))])[0]


@pytest.mark.parametrize("method", brook_heads.METHODS)
def test_a_head_survives_its_folder(method: str, target: brook_model.Llama, tmp_path: Path) -> None:
    head = _head(method, target)
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "model_type": "llama"}', encoding="utf-8")
    brook_heads.save_head(head, tmp_path, SMALL, HEADS, tmp_path / "head")
    again, _ = brook_heads.load_head(tmp_path / "head", target)
    assert type(again) is type(head)
    for name, weight in head.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=1e-2, atol=1e-3)


def test_a_small_vocabulary_maps_to_the_targets_tokens(target: brook_model.Llama) -> None:
    head = _head("eagle3", target)
    logits = torch.eye(24)
    assert brook_heads.tokens_of(head, logits).tolist() == list(range(2, 50, 2))
    assert head.t2d.nonzero().flatten().tolist() == list(range(2, 50, 2))


def test_a_walk_counts_passes_as_a_server_would() -> None:
    tally = evaluate_heads.Tally()
    # Two right and one wrong: three tokens. Then both of the two that are left: all tokens at once.
    right = [[True, True, False], [False] * 3, [False] * 3, [True, True, False], [True, False, False]]
    tally.walk(right)
    assert (tally.tokens, tally.passes) == (5, 2)
    assert (tally.offered, tally.taken) == ([2, 2, 1], [2, 2, 0])
    other = evaluate_heads.Tally()
    other.walk([[False, True]])
    tally.add(other)
    assert tally.figures() == {
        "tokens_per_pass": 2.0, "acceptance": 0.6667, "per_position": [0.6667, 1.0, 0.0], "tokens": 6, "passes": 3,
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_the_targets_own(target: brook_model.Llama, temperature: float) -> None:
    torch.manual_seed(6)
    made = brook_model.generate(target, [[1, 2, 3]] * 40, stop={63}, most=1, temperature=temperature)
    first = [tokens[0] for tokens in made if tokens]
    logits = brook_heads.watch(target, torch.tensor([[1, 2, 3]]), (0,)).last[0, -1] @ target.model.embed_tokens.weight.T
    if temperature:
        assert len(set(first)) > 4
    else:
        assert set(first) == {int(logits.argmax())}
