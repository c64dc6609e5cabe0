"""A drafter as a plugin: phrases that answers are known to have, each a list of token ids.

Install it beside Penstock (`pip install ./examples/phrases_drafter`) and start with
`--speculative-config '{"method": "phrases", "options": {"phrases": [[12, 7, 99, 3], [5, 5, 8]]}}'`. Where a sequence ends with the first two tokens of a phrase, or more of
them, the rest is proposed. What it does not know: tokenizers, whether a proposal was right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.contract.hookspecs import DrafterSpec, hookimpl
from penstock.core.protocol.columns import I32
from penstock.core.protocol.errors import ConfigError
from penstock.core.protocol.speculation import DraftConfig

LEAST = 2


class Phrases:
    def __init__(self, phrases: list[list[int]], most: int) -> None:
        self.max_lookahead = most
        self._rest = {tuple(one[:cut]): one[cut:] for one in phrases for cut in range(LEAST, len(one))}
        self._longest = max((len(start) for start in self._rest), default=0)
        self._ends: dict[int, list[int]] = {}

    def begin(self, seq: int, tokens: I32, tenant: str) -> None:
        self._ends[seq] = []
        self.extend(seq, tokens)

    def extend(self, seq: int, tokens: I32) -> None:
        self._ends[seq] = [*self._ends[seq], *tokens[-self._longest :].tolist()][-self._longest :]

    def propose(self, seq: int, most: int) -> I32:
        said = self._ends[seq]
        for length in range(len(said), LEAST - 1, -1):
            rest = self._rest.get(tuple(said[-length:]))
            if rest is not None:
                return np.array(rest[:most], np.int32)
        return np.array([], np.int32)

    def end(self, seq: int) -> None:
        del self._ends[seq]


def factory(*, config: DraftConfig, vocab: int, **options: Any) -> Phrases:
    phrases = config.options.get("phrases", [])
    if not isinstance(phrases, list) or not all(
        isinstance(one, list) and all(type(t) is int and 0 <= t < vocab for t in one) for one in phrases
    ):
        raise ConfigError("--speculative-config: 'options.phrases' must be a list of lists of token ids.", param="speculative_config")
    return Phrases(phrases, config.num_speculative_tokens or 8)


@hookimpl
def register_drafters() -> list[DrafterSpec]:
    return [DrafterSpec(name="phrases", api_level=1, doc="known phrases", methods=["phrases"], where="host", factory=factory)]
