"""Beam search under a grammar against transformers' `generate` with a function that says which tokens may follow: worked out for each prefix anew."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from penstock.core.contract.grammars import Grammars
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Admit, Vocabulary
from penstock.core.protocol.sampling import Beam

VOCAB = 131
TOKENS = [bytes([token]) for token in range(VOCAB)]
WORDS = Vocabulary(data=bytes(range(VOCAB)), counts=i32([1] * VOCAB))
END = VOCAB - 2


@pytest.fixture(scope="module", params=["llguidance", "xgrammar"])
def backend(request: pytest.FixtureRequest) -> tuple[str, Grammars]:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    spec = PluginHost("engine").load().grammars(request.param)
    assert spec is not None
    return request.param, spec.factory(TOKENS, [])


@pytest.fixture
def sharp(checkpoint: Callable[..., Any]) -> tuple[Any, Any]:
    return checkpoint("LlamaForCausalLM", initializer_range=0.35)  # type: ignore[no-any-return]


class Following:
    """prefix_allowed_tokens_fn of a grammar: each prefix is walked from the beginning."""

    def __init__(self, grammars: Grammars, compiled: bytes, prompt: int) -> None:
        self._grammars, self._compiled, self._prompt = grammars, compiled, prompt

    def __call__(self, batch: int, ids: torch.Tensor) -> list[int]:
        matcher = self._grammars.matcher(self._compiled)
        for token in ids[self._prompt :].tolist():
            if token == END or not matcher.consume(token):
                return [VOCAB - 1]  # a beam that is over, or never was one
        out = np.zeros(-(-VOCAB // 32), np.int32)
        matcher.mask(out)
        allowed = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist()
        return [token for token in allowed if token not in (END, VOCAB - 1)] + [END] * matcher.may_end() or [VOCAB - 1]


def reference(model: Any, admit: Admit, follow: Following) -> list[tuple[list[int], float]]:
    """transformers' hypotheses and their scores, best first, without those that are none."""
    prompt, beam = admit.prompt.tolist(), admit.sampling.beam
    assert beam is not None
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beam.width,
        num_return_sequences=beam.width,
        length_penalty=beam.length_penalty,
        early_stopping=beam.early_stopping,
        do_sample=False,
        max_new_tokens=admit.max_tokens,
        eos_token_id=END,
        pad_token_id=VOCAB - 1,
        prefix_allowed_tokens_fn=follow,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found = []
    for row, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((at for at, token in enumerate(row) if token == END), len(row) - 1)
        if np.isfinite(score) and score > -1e6 and VOCAB - 1 not in row[: end + 1]:
            found.append((row[: end + 1], score))
    return found


GRAMMARS = [
    ("regex", "[ -~]{3,9}"),
    ("regex", "([a-f]{2}|[0-9]{3}x)*"),
    ("regex", "(ab|ac|b[0-9]{1,3})(;[A-Z]{2}){1,3}"),
    ("choice", '["one", "only", "two", "twelve", "x", "zebra"]'),
    ("json", '{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","yy"]}},"required":["a","b"],"additionalProperties":false}'),
    ("grammar", 'root ::= "(" root ")" | [a-c] root | ""'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "source"), GRAMMARS)
def test_hypotheses_are_those_of_transformers(kind: str, source: str, backend: tuple[str, Grammars], sharp: tuple[Any, Any]) -> None:
    from tests.parity import test_beams

    folder, model = sharp
    name, grammars = backend
    compiled = grammars.compile(kind, source)
    rng = np.random.default_rng(len(source))
    asked: list[Admit] = []
    for size in (1, 17):
        for width, penalty, early in ((2, 1.0, False), (6, 2.0, "never"), (4, -1.0, True)):
            beam = Beam(width=width, length_penalty=penalty, early_stopping=early)
            admit = test_beams.ask(len(asked) + 1, rng.integers(0, VOCAB - 2, size).tolist(), beam, n=1, most=14, eos=[END])
            asked.append(msgspec.structs.replace(admit, grammar=compiled))
    expected = [reference(model, admit, Following(grammars, compiled, admit.prompt.size)) for admit in asked]
    asked = [
        msgspec.structs.replace(admit, choices=i32(range(len(one))), sampling=msgspec.structs.replace(admit.sampling, n=len(one)))
        for admit, one in zip(asked, expected, strict=True)
    ]
    found = test_beams.search(folder, asked, vocabulary=WORDS, grammar_backend=name)
    for admit, mine, theirs in zip(asked, found, expected, strict=True):
        beam = admit.sampling.beam
        assert beam is not None
        assert [tokens for tokens, _, _ in mine] == [tokens for tokens, _ in theirs]
        scores = [total / len(tokens) ** beam.length_penalty for tokens, total, _ in mine]
        np.testing.assert_allclose(scores, [score for _, score in theirs], rtol=1e-4, atol=1e-4)
        for tokens, _, stopped in mine:
            matcher = grammars.matcher(compiled)
            said = tokens[:-1] if stopped else tokens
            assert all(matcher.consume(token) for token in said)
            assert matcher.may_end() or not stopped
