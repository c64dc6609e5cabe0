"""Prompt lookup: what followed when the history's last tokens stood there before.

What it is: the drafter of the method "ngram" (Saxena 2023, prompt lookup decoding), over the device's own histories. It has no weights, and costs next to nothing where it
finds nothing.
What it does not know: tokens' meaning, models, how it is looked up (kernels/drafting).
"""

from __future__ import annotations

import torch

from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins.drafters.api import NoLayers, Parts, Seen

DRAFTS, SHORTEST, LONGEST = 5, 2, 5
"""Of whoever does not say: drafts behind a token, and tokens that are looked for."""


class NgramDrafter(NoLayers):
    """See Drafter."""

    name = "ngram"

    def __init__(self, config: DraftConfig, parts: Parts) -> None:
        self.max_lookahead = config.num_speculative_tokens or DRAFTS
        longest = config.prompt_lookup_max or max(LONGEST, config.prompt_lookup_min or 0)
        self._longest, self._shortest = longest, config.prompt_lookup_min or min(SHORTEST, longest)
        self._ops = parts.ops

    def warm(self, seen: Seen, rows: int, width: int) -> None:
        """See Drafter."""
        assert seen.proposal is not None
        for count in {1, 2, 3, 5, 9, 17, 33} if rows == 1 else ():  # a kernel for each power of two
            if count <= self.max_lookahead:
                out = torch.empty(rows, count, dtype=torch.int32, device=seen.history.device)
                self._ops.ngrams(seen.proposal.slots, seen.proposal.ends, seen.history, self._shortest, self._longest, out)

    def propose(self, seen: Seen, out: torch.Tensor) -> None:
        """See Drafter."""
        assert seen.proposal is not None
        self._ops.ngrams(seen.proposal.slots, seen.proposal.ends, seen.history, self._shortest, self._longest, out)
