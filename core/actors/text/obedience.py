"""Answers that must obey a grammar, as text sees them.

What it is: which grammars are being compiled and for whom, and which finished answers wait to be verified: an answer ends with "stop" only once it is
known to obey. The work is the grammar worker's; this keeps its jobs.
What it does not know: how a grammar is compiled, masks, what becomes of a request that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from penstock.core.actors.text.ledger import Held, Request
from penstock.core.protocol.columns import I32
from penstock.core.protocol.control import EngineFacts
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import CheckGrammar, GrammarChecked, Submit
from penstock.core.protocol.sampling import SamplingParams

MOST_CHARS = 1 << 18
"""Of a grammar's source."""


def obeys(submit: Submit) -> bool:
    """Must its answers obey anything?"""
    return submit.grammar is not None or submit.calling is not None


class Obedience:
    """`backend` is the name of text's own grammar backend; "": it has none."""

    def __init__(self, backend: str = "") -> None:
        self._backend = backend
        self._jobs: dict[int, Request | Held] = {}
        self._job = 0

    def check(self, submit: Submit, params: SamplingParams, facts: EngineFacts, ends: I32) -> None:
        """What can be said before anything is compiled. Raises InvalidRequest or UnsupportedFeature naming the field."""
        if not obeys(submit):
            return
        sizes = [(grammar.field, len(grammar.source))] if (grammar := submit.grammar) is not None else []
        if submit.calling is not None:
            sizes.append(("tools", sum(len(function.schema) for function in submit.calling.functions)))
        field = submit.calling.field if submit.calling is not None else sizes[0][0]
        if not facts.grammars or facts.grammars != self._backend:
            raise UnsupportedFeature(f"This server cannot make an answer obey {field}. Leave it out.", param=field)
        for name, size in sizes:
            if size > MOST_CHARS:
                raise InvalidRequest(f"{name} may have {MOST_CHARS} characters, but has {size}.", param=name)
        if submit.continue_final_message and submit.grammar is not None and submit.grammar.kind == "json":
            raise InvalidRequest(
                f"{submit.grammar.field} cannot be given where the answer's beginning is given too (continue_final_message, or a last message of the "
                "assistant's): the answer would be a whole JSON value of its own. Leave out one of the two.",
                param=submit.grammar.field,
            )
        if params.ignore_eos:
            raise InvalidRequest(f"ignore_eos and {field} cannot both be given: a grammar says where an answer ends.", param="ignore_eos")
        if not len(ends) and not params.stop_token_ids:
            raise UnsupportedFeature(
                f"The model has no end token, so that no answer could end where {field} says. Give stop_token_ids.",
                param=field,
            )

    def compile(self, request: Request) -> CheckGrammar:
        """The prompt of `request` is encoded: its grammar comes next."""
        assert request.obeyed is not None
        return CheckGrammar(job=self._new(request), grammar=request.obeyed)

    def verify(self, held: Iterable[Held], settled: Callable[[Held, str], None]) -> Iterator[CheckGrammar]:
        """Answers that have ended. `settled(one, error)` for those of which nothing is left to be found out."""
        for one in held:
            request, said = one.choice.request, one.choice.said
            assert request.obeyed is not None
            if said is None:
                stays = request.params.include_stop_str_in_output
                yield CheckGrammar(
                    job=self._new(one), grammar=request.obeyed, verify=True, ids=one.ids, stop=one.stop, stop_stays=bool(one.stop) and stays
                )
                continue
            submit = request.submit
            wrong = said.wrong(submit.calling, submit.grammar, submit.parallel_calls)
            parts = [] if wrong else said.checks(submit.calling, submit.grammar)
            if parts:
                yield CheckGrammar(job=self._new(one), grammar=request.obeyed, verify=True, parts=parts)
            else:
                settled(one, f"The answer does not obey {request.obeyed.field}. {wrong}" if wrong else "")

    def owner(self, checked: GrammarChecked) -> Request | Held | None:
        """Whose job that was."""
        return self._jobs.pop(checked.job, None)

    def _new(self, owner: Request | Held) -> int:
        self._job += 1
        self._jobs[self._job] = owner
        return self._job
