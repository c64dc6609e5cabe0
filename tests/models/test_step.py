"""One step of the decoder, composed operation by operation, against transformers: hidden states in front of any layer, behind the last, and logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from penstock.core.contract.devices import ModelFacts
from penstock.plugins.attention.native import NativeAttention
from penstock.plugins.attention.sdpa import TorchAttention
from penstock.plugins.devices.host_ops import HostOps
from penstock.plugins.devices.torch_ops import TorchOps
from penstock.plugins.models.builder import Builder
from penstock.plugins.models.decoder import build_decoder

CPU, LENGTH = torch.device("cpu"), 21


class Tensors:
    """A model's own, by name."""

    def __init__(self, model: Any) -> None:
        self.named = dict(model.state_dict())

    def take(self, name: str, shape: Any) -> torch.Tensor:
        value: torch.Tensor = self.named.pop(name)
        assert tuple(value.shape) == tuple(shape)
        return value

    def ignore(self, *names: str) -> None: ...

    def finish(self) -> None:
        assert not self.named


@pytest.mark.parametrize(("ops", "attention"), [(HostOps, NativeAttention), (HostOps, TorchAttention), (TorchOps, TorchAttention)])
def test_taps_and_logits_are_transformers(ops: Any, attention: Any) -> None:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    truth = LlamaForCausalLM(config).eval().float()
    facts = ModelFacts(
        architecture="LlamaForCausalLM", model_type="llama", vocab_size=61, hidden_size=64, intermediate_size=80, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=16, max_position=64, torch_dtype="float32",
    )  # fmt: skip
    table = ops()
    builder = Builder(Tensors(truth), table, torch.float32, CPU)
    model = build_decoder(facts=facts, builder=builder, attention=attention(facts, torch.float32, CPU, 16), max_len=64)
    caches = model.attention.caches(model.attention.allocate(4))
    tokens = torch.randint(0, 61, (1, LENGTH))
    history = torch.zeros(2, 64, dtype=torch.int32)
    history[1, :LENGTH] = tokens[0]
    blocks = torch.tensor([[-1, -1, -1], [3, 1, -1]], dtype=torch.int32)
    one, start = torch.tensor([1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    columns = table.ragged_inputs(one, start, torch.tensor([0, LENGTH], dtype=torch.int32), history, blocks, 16, LENGTH, 0)
    with torch.inference_mode():
        right = truth(tokens, output_hidden_states=True)
        stream = model.step(table, caches, columns, taps=(0, 1, 2, 3))
        assert len(stream.taps) == 4
        for mine, theirs in zip(stream.taps[:3], right.hidden_states[:3], strict=True):
            torch.testing.assert_close(mine, theirs[0], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(stream.taps[3], stream.x + stream.residual)
        hidden = model.final(table, stream.x, stream.residual)
        torch.testing.assert_close(hidden, right.hidden_states[3][0], atol=2e-4, rtol=2e-4)  # theirs is behind the final norm
        torch.testing.assert_close(model.logits(hidden), right.logits[0], atol=2e-3, rtol=1e-3)
        again = model.step(table, caches, columns, taps=(2,))
        torch.testing.assert_close(again.taps[0], stream.taps[2])
        assert model.step(table, caches, columns).taps == []
