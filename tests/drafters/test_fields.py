"""Fields of --speculative-config that a built-in drafter does not read are refused, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins.drafters import register_drafters

FACTORIES = {spec.name: spec.factory for spec in register_drafters()}


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("ngram", "model", "/some/folder"),
        ("ngram", "options", {"own_tokens": 3}),
        ("suffix", "prompt_lookup_max", 3),
        ("draft_model", "prompt_lookup_min", 3),
        *((method, "quantization", "int8") for method in ("ngram", "suffix", "medusa", "eagle", "eagle3", "mtp")),
    ],
)
def test_a_field_that_says_nothing_to_the_method(method: str, field: str, value: Any) -> None:
    config = DraftConfig(method=method, **{field: value})
    with pytest.raises(ConfigError, match=rf"'{field}' says nothing to the method '{method}', which reads method, num_speculative_tokens"):
        FACTORIES[method](config=config, parts=None, vocab=9, longest=9)
