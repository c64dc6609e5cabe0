"""Answers that must obey a grammar, as text sees them.

What it is: which grammars are being compiled and for whom, and which finished answers wait to be verified: an answer ends with "stop" only once it is
known to obey. The work is the grammar worker's; this keeps its jobs.
What it does not know: how a grammar is compiled, masks, what becomes of a request that fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from penstock.core.actors.text.ledger import Held, Request
from penstock.core.protocol.columns import I32
from penstock.core.protocol.control import EngineFacts
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import CheckGrammar, GrammarChecked, Submit
from penstock.core.protocol.sampling import SamplingParams

MOST_CHARS = 1 << 18
"""Of a grammar's source."""


class Obedience:
    """`backend` is the name of text's own grammar backend; "": it has none."""

    def __init__(self, backend: str = "") -> None:
        self._backend = backend
        self._jobs: dict[int, Request | Held] = {}
        self._job = 0

    def check(self, submit: Submit, params: SamplingParams, facts: EngineFacts, ends: I32) -> None:
        """What can be said before anything is compiled. Raises InvalidRequest or UnsupportedFeature naming the field."""
        grammar = submit.grammar
        if grammar is None:
            return
        if not facts.grammars or facts.grammars != self._backend:
            raise UnsupportedFeature(f"This server cannot make an answer obey {grammar.field}. Leave it out.", param=grammar.field)
        if len(grammar.source) > MOST_CHARS:
            raise InvalidRequest(f"{grammar.field} may have {MOST_CHARS} characters, but has {len(grammar.source)}.", param=grammar.field)
        if params.ignore_eos:
            raise InvalidRequest(
                f"ignore_eos and {grammar.field} cannot both be given: a grammar says where an answer ends.", param="ignore_eos"
            )
        if not len(ends) and not params.stop_token_ids:
            raise UnsupportedFeature(
                f"The model has no end token, so that no answer could end where {grammar.field} says. Give stop_token_ids.",
                param=grammar.field,
            )

    def compile(self, request: Request) -> CheckGrammar:
        """The prompt of `request` is encoded: its grammar comes next."""
        grammar = request.submit.grammar
        assert grammar is not None
        return CheckGrammar(job=self._new(request), grammar=grammar)

    def verify(self, held: Iterable[Held]) -> Iterator[CheckGrammar]:
        """Answers that have ended."""
        for one in held:
            grammar = one.choice.request.submit.grammar
            assert grammar is not None
            yield CheckGrammar(job=self._new(one), grammar=grammar, verify=True, ids=one.ids, stop=one.stop)

    def owner(self, checked: GrammarChecked) -> Request | Held | None:
        """Whose job that was."""
        return self._jobs.pop(checked.job, None)

    def _new(self, owner: Request | Held) -> int:
        self._job += 1
        self._jobs[self._job] = owner
        return self._job
