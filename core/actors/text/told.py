"""How many log-probabilities of prompts one reply tells.

What it is: `Told`, the count of one reply over all of its prompts, each added once it is tokens; and `Tellers`, which finds the Told of a Submit. The
reply lies in the edge's memory as a whole and is hundreds of megabytes of JSON beyond the bound, by a small request.
What it does not know: log-probabilities, how a reply is made, what becomes of the other prompts of a request that is refused (the edge cancels them).
"""

from __future__ import annotations

import weakref

from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import Submit
from penstock.core.protocol.sampling import MOST_PROMPT_LOGPROBS, SamplingParams


class Told:
    """Of one reply."""

    __slots__ = ("__weakref__", "prompts", "tokens")

    def __init__(self) -> None:
        self.prompts = 0
        self.tokens = 0

    def add(self, tokens: int, params: SamplingParams, submit: Submit) -> None:
        """One more of its prompts. Raises InvalidRequest if all so far are too much."""
        if params.prompt_logprobs is None:
            return
        self.prompts += 1
        self.tokens += tokens
        answers = (1 if submit.kind == "chat" else params.n) if submit.tells < 0 else submit.tells
        told = self.tokens * (params.prompt_logprobs + 1) * answers
        if told <= MOST_PROMPT_LOGPROBS:
            return
        field = submit.names.get("prompt_logprobs", "prompt_logprobs")
        many = self.prompts > 1
        raise InvalidRequest(
            f"{field} {params.prompt_logprobs} of {f'{self.prompts} prompts' if many else 'a prompt'} of {self.tokens} tokens{' together' if many else ''} for"
            f" {answers} answers are {told} log-probabilities, but a request may ask for {MOST_PROMPT_LOGPROBS}. Lower {field} or n,"
            f" {'send fewer prompts in a request, ' if many else ''}or shorten the prompt{'s' if many else ''}.",
            param=field,
        )


class Tellers:
    """The Told of each reply, as long as one of its prompts holds it."""

    def __init__(self) -> None:
        self._told: weakref.WeakValueDictionary[tuple[int, int], Told] = weakref.WeakValueDictionary()

    def of(self, submit: Submit) -> Told:
        """Made for the first prompt that asks, and found by the others."""
        if not submit.group:
            return Told()
        told = self._told.get((submit.edge, submit.group))
        if told is None:
            self._told[submit.edge, submit.group] = told = Told()
        return told
