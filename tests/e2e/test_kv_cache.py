"""Brook served with keys and values in eight bits, from the command line: what it says of itself, and that its answers are those of the wide cache."""

from __future__ import annotations

from typing import Any

import pytest

TEXT = "<|bos|><|user|>Keep in mind that the favorite sport of Draik is chess. What is 17 + 25?"
ASK = {"model": "brook", "prompt": TEXT, "temperature": 0, "max_tokens": 4, "echo": True, "logprobs": 1}
CHAT = {"model": "brook", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0, "max_tokens": 40}


def answers(starter: Any, *flags: str) -> tuple[list[float], str, float, str]:
    """(log-probabilities of a prompt, twice, the second time from the prefix cache; an answer; blocks; the log)."""
    server = starter(*flags)
    rows = [server.client.post("/v1/completions", json=ASK).json()["choices"][0]["logprobs"]["token_logprobs"] for _ in range(2)]
    assert rows[0] == rows[1]
    said = server.client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    blocks = server.metric("penstock_kv_blocks")
    assert server.stop() == 0
    return rows[0][1:], said, blocks, server.log.read_text()


def test_eight_bits_answer_like_sixteen_and_hold_nearly_twice_as_much(starter: Any) -> None:
    wide, said, blocks, log = answers(starter)
    assert "in bfloat16" in log
    for word, kind in (("int8", "int8"), ("fp8", "fp8_e4m3")):
        found, answer, more, log = answers(starter, "--kv-cache-dtype", word)
        assert f"tokens in {kind}" in log
        assert more == pytest.approx(blocks * 64 / 34, rel=0.01)  # a code each of 32 dimensions, and a scale
        assert answer == said
        assert len(found) == len(wide)
        assert found != wide
        assert sum(abs(a - b) for a, b in zip(found, wide, strict=True)) / len(wide) < 0.05
