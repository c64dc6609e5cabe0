"""Checkpoints whose files name tokens that the model does not have: the engine never hears of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from penstock import LLM, SamplingParams
from penstock.core.protocol.errors import InvalidRequest
from penstock.plugins.demo_model import brook_path

ADDED = "<|beyond|>"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The demo model with one token more in its tokenizer, which is also an end token, like ids that nobody has."""
    path = tmp_path_factory.mktemp("beyond")
    for file in brook_path().iterdir():
        shutil.copy(file, path / file.name)
    fast = Tokenizer.from_file(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    fast.add_tokens([AddedToken(ADDED, special=True)])
    assert fast.token_to_id(ADDED) == config["vocab_size"]
    fast.save(str(path / "tokenizer.json"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [config["vocab_size"], -1, 10**12]}))
    with LLM(str(path), kv_cache_memory_bytes=16 << 20) as model:
        yield model


def lively(llm: LLM) -> None:
    assert (
        "42" in llm.chat([{"role": "user", "content": "What is 17 + 25?"}], SamplingParams(temperature=0, max_tokens=24))[0].outputs[0].text
    )


@pytest.mark.parametrize("sampling", [{"min_tokens": 1}, {"min_tokens": 3, "n": 2, "seed": 1}, {}, {"ignore_eos": True}])
def test_end_tokens_beyond_the_model_never_reach_the_sampler(llm: LLM, sampling: dict[str, Any]) -> None:
    [output] = llm.generate([[5, 9]], SamplingParams(max_tokens=4, **sampling))
    assert all(1 <= len(choice.token_ids) <= 4 for choice in output.outputs)
    lively(llm)


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        (f"a {ADDED}", {}, "prompt"),
        ("a", {"bad_words": [ADDED]}, "bad_words"),
        ([{"role": "user", "content": f"a {ADDED}"}], {}, "messages"),
        ([4096], {}, "prompt"),
        ("a", {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 1}, "allowed_token_ids"),
    ],
)
def test_a_client_that_names_one_is_told(llm: LLM, prompt: Any, sampling: dict[str, Any], param: str) -> None:
    ask = llm.chat if isinstance(prompt, list) and isinstance(prompt[0], dict) else llm.generate
    with pytest.raises(InvalidRequest) as caught:
        ask(prompt, SamplingParams(max_tokens=4, **sampling))
    assert (caught.value.param or "").startswith(param)
    lively(llm)
