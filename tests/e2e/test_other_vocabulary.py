"""A server whose draft model has another tokenizer answers as one without: prompts in parts, shared prefixes, preemptions, clients that leave and grammars notwithstanding."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from penstock.plugins.demo_model import draft_path

sys.path.insert(0, str(Path(__file__).parents[1] / "devices_gpu"))  # pytest's importlib mode does not

from vocabularies import renumbered

SYSTEM = "You answer briefly. " * 12
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}
BODIES: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 0.8, "seed": 5, "top_p": 0.9, "ignore_eos": True},
    {"temperature": 0, "stop": ["12", " dog"]},
    {"temperature": 0.7, "seed": 6, "frequency_penalty": 0.3, "n": 2, "ignore_eos": True},
    {"temperature": 0, "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
]
QUESTIONS = ["Count from 1 to 30.", "Tell me a story about a dog."]
# A cache that does not hold them all at once, and prompts that are read in parts.
FLAGS = [
    "--deterministic",
    "--no-admission-forecast",
    "--block-size",
    "16",
    "--num-gpu-blocks-override",
    "36",
    "--max-model-len",
    "512",
    "--max-num-batched-tokens",
    "64",
]


def answers(server: Any, rounds: int = 1) -> list[Any]:
    asked = [
        {"model": "brook", "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}], "max_tokens": 90, **body}
        for text in QUESTIONS
        for body in BODIES
    ] * rounds

    def ask(body: dict[str, Any]) -> Any:
        answer = server.client.post("/v1/chat/completions", json={**body, "return_token_ids": True, "spec_decode": "force"}).json()
        return [(one["message"]["content"], one["token_ids"], one["finish_reason"]) for one in answer["choices"]]

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(ask, asked))


def leave(server: Any) -> None:
    """A client that goes away in the middle of an answer."""
    body = {
        "model": "brook",
        "messages": [{"role": "user", "content": QUESTIONS[1]}],
        "max_tokens": 300,
        "stream": True,
        "ignore_eos": True,
    }
    with server.client.stream("POST", "/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())


def share(server: Any) -> float:
    drafted = server.metric("penstock_spec_decode_draft_tokens_total")
    return float(server.metric("penstock_spec_decode_accepted_tokens_total") / drafted)


def test_answers_are_those_without_and_drafts_are_right(starter: Callable[..., Any], tmp_path: Path) -> None:
    plain = starter(*FLAGS)
    wanted = answers(plain)
    assert plain.stop() == 0
    other = renumbered(draft_path(), tmp_path / "other", merges=0.7)
    server = starter(*FLAGS, "--speculative-model", str(other), "--num-speculative-tokens", "4")
    assert answers(server) == wanted
    leave(server)
    assert answers(server) == wanted
    assert share(server) > 0.4
    assert server.metric("penstock_preemptions_total") > 0
    assert server.metric("penstock_prefix_cache_hits_total") > 0
    assert server.stop() == 0
