"""What a prompt token with a log-probability weighs, by a model's sizes."""

from __future__ import annotations

import msgspec
import pytest

from penstock.core.contract.devices import MOST_WEIGHT, DeviceCapabilities, ModelFacts, prompt_logprobs_weight

FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    model_type="llama",
    vocab_size=1000,
    hidden_size=100,
    intermediate_size=200,
    num_layers=10,
    num_heads=10,
    num_kv_heads=5,
    head_dim=10,
    max_position=64,
)  # 10 layers of 100 x (2 x 100 + 2 x 50 + 3 x 200) multiply-adds, a head of 100 x 1000
DEVICE = DeviceCapabilities(name="some", depth=1, dtypes=["float32"], deterministic=True)


@pytest.mark.parametrize(
    ("vocab", "work", "weight"),
    [(1000, 0, 1 + 0.1 / 0.9), (9000, 0, 2.0), (9000, 100, 3.0), (10**6, 0, MOST_WEIGHT), (1, 0, 1 + 0.0001 / 0.9)],
)
def test_it_is_the_head_over_the_layers_besides_one(vocab: int, work: int, weight: float) -> None:
    facts = msgspec.structs.replace(FACTS, vocab_size=vocab)
    device = msgspec.structs.replace(DEVICE, logit_work=work)
    assert prompt_logprobs_weight(facts, device) == pytest.approx(weight)


def test_a_model_that_tells_no_sizes_weighs_something() -> None:
    assert prompt_logprobs_weight(msgspec.structs.replace(FACTS, num_layers=0), DEVICE) == MOST_WEIGHT
