"""Requests and sequences as the scheduler holds them, and the room where they wait.

What it is: `Request` (what Admit said, once), `Sequence` (one choice), `Group` (the beams of a search), `Entry` (choices that wait together because they
have the same tokens so far) and `WaitingRoom`, which keeps the policy's columns in numpy, so that ordering a thousand waiting requests is one call.
What it does not know: slots, blocks, steps.
"""

from __future__ import annotations

import msgspec
import numpy as np

from penstock.core.actors.scheduler.search import Search
from penstock.core.contract.policy import SchedulePolicy, Waiting
from penstock.core.protocol.columns import EMPTY_I32, F32, I32, I64, Column
from penstock.core.protocol.messages import Admit, seq_of
from penstock.core.protocol.sampling import Beam, SamplingParams


def itl_goal_ns(admit: Admit) -> int:
    """What a step that the request decodes in should take at most (see pace.py); 0: it has no goal of its own. None has yet: this is where a class of requests
    would say it, and the strictest of those that run holds for all."""
    return 0


class Request:
    """One admitted prompt; `stop_ids` are all ids that end a sequence. `prompt_logprobs_next` is the next prompt position whose
    log-probability was not delivered yet (a recomputation does not deliver one twice). `draws_nothing`: max_tokens is 0, only the prompt is
    computed (scoring)."""

    __slots__ = (
        "arrival_ns",
        "banned_ids",
        "draws_nothing",
        "grammar",
        "group",
        "hashes",
        "incarnation",
        "itl_ns",
        "key",
        "limit",
        "live",
        "looked_up",
        "params",
        "parked",
        "priority",
        "prompt",
        "prompt_len",
        "prompt_logprobs_next",
        "root",
        "stop_ids",
        "wish",
    )

    def __init__(self, admit: Admit, now_ns: int, limit: int, hashes: bytes, masks_ahead: bool = False, adjusts_ahead: bool = True) -> None:
        self.key = admit.key
        self.incarnation = admit.incarnation
        self.prompt: I32 = admit.prompt
        self.prompt_len = int(admit.prompt.size)
        self.hashes = hashes
        self.root = admit.root_hash
        self.params = admit.sampling
        self.priority = admit.priority
        self.arrival_ns = admit.arrival_ns or now_ns
        self.limit = limit
        self.itl_ns = itl_goal_ns(admit)
        self.draws_nothing = admit.max_tokens == 0
        self.grammar = bool(admit.grammar) and not self.draws_nothing
        self.wish = {True: 1, False: -1, None: 0}[admit.spec_decode]
        """Drafts: 1 whatever they cost, -1 never."""
        if (
            self.grammar and not masks_ahead
        ) or admit.sampling.beam is not None:  # masks are for one token; what a beam draws does not count
            self.wish = -1
        if not adjusts_ahead and admit.sampling.looks_back:
            self.wish = -1
        self.stop_ids = sorted({*admit.eos.tolist(), *admit.sampling.stop_token_ids})
        self.banned_ids: I32 = np.asarray(self.stop_ids, np.int32) if admit.sampling.min_tokens > 0 else EMPTY_I32
        self.live = 0
        """Choices that have not ended."""
        self.parked = False
        self.looked_up = False
        self.prompt_logprobs_next = self.prompt_len if admit.sampling.prompt_logprobs is None else 1
        self.group: Group | None = None
        """Of beams; None: each choice goes its own way."""
        if admit.sampling.beam is not None and not self.draws_nothing:
            self._search(admit, admit.sampling.beam)

    @property
    def tells_prompt(self) -> bool:
        """Are log-probabilities of its prompt still to be delivered?"""
        return self.prompt_logprobs_next < self.prompt_len

    def _search(self, admit: Admit, beam: Beam) -> None:
        """Its ends are the search's business, and what the device is asked for are the likeliest tokens."""
        asked = admit.sampling
        search = Search(beam, self.stop_ids, asked.min_tokens, self.limit - self.prompt_len, asked.logprobs)
        self.group = Group(self, search, admit.choices.tolist(), admit.grammar, admit.grammar_min_tokens)
        self.stop_ids, self.banned_ids = [], EMPTY_I32
        plain = SamplingParams(
            temperature=0,
            seed=asked.seed,
            logprobs=search.top,
            prompt_logprobs=asked.prompt_logprobs,
            beam=beam if admit.grammar else None,
        )
        self.params = msgspec.structs.replace(plain, n=beam.width)


class Group:
    """The beams of one request: `members` are their sequences, of which `order` is the slots by rank once the first step has landed. The hypothesis of
    rank c is told as choice c, for the `wanted` ones. `grammar` is what they obey, b"": nothing."""

    __slots__ = ("grammar", "grammar_min_tokens", "home", "members", "moves", "order", "request", "search", "wanted", "writes")

    def __init__(self, request: Request, search: Search, wanted: list[int], grammar: bytes, grammar_min_tokens: int) -> None:
        self.request = request
        self.search = search
        self.wanted = wanted
        self.grammar = grammar
        self.grammar_min_tokens = grammar_min_tokens
        self.members: list[Sequence] = []
        self.reset()

    def reset(self) -> None:
        """The search begins anew."""
        self.search.reset()
        self.order: list[int] = []
        self.moves: list[tuple[int, int]] = []
        """Target and source slot of branches that KV does not know of yet."""
        self.writes: list[tuple[int, int, I32]] = []
        """Slot, first position, tokens: to be written before the group goes on."""
        self.home: list[Sequence] = []
        """Preempted members that have left their slots."""

    def slots(self) -> list[int]:
        return [member.slot for member in self.members if member.slot >= 0]


class Sequence:
    """One choice of a request. `slot` is -1 while it waits; `entry` is where it waits; `lead` is the sequence that computes its prompt
    while it has none itself; `attached` are those for whom this one computes the prompt."""

    __slots__ = ("attached", "choice", "drafts", "entry", "lead", "outputs", "request", "seq", "slot", "started")

    def __init__(self, request: Request, choice: int, outputs: I32) -> None:
        self.request = request
        self.choice = choice
        self.seq = seq_of(request.key, choice)
        self.outputs = outputs
        """Tokens received so far; current only while the sequence waits (a slot's history is the truth afterwards)."""
        self.drafts = 0, 0
        """Those that were verified before it lost its slot, and the right ones."""
        self.slot = -1
        self.started = False
        self.entry: Entry | None = None
        self.lead: Sequence | None = None
        self.attached: list[Sequence] = []


class Entry:
    """Sequences of one request with equal `tokens` (prompt, then outputs): the first computes, the others fork from it."""

    __slots__ = ("cached", "hashes", "request", "row", "seqs", "tokens")

    def __init__(self, seqs: list[Sequence], tokens: I32, hashes: bytes) -> None:
        self.request = seqs[0].request
        self.seqs = seqs
        self.tokens = tokens
        self.hashes = hashes
        self.cached = 0
        """Tokens that the last look-up found in the prefix cache."""
        self.row = -1
        for sequence in seqs:
            sequence.entry = self
            sequence.lead = None

    @property
    def uncached(self) -> int:
        """Tokens that the prefix cache did not have."""
        return int(self.tokens.size) - self.cached


class WaitingRoom:
    """Entries in the policy's order: its keys ascending, then arrival, then sequence."""

    def __init__(self, policy: SchedulePolicy) -> None:
        self._policy = policy
        self._entries: list[Entry | None] = []
        self._free: list[int] = []
        self._used = np.zeros(0, bool)
        self._arrival: I64 = np.zeros(0, np.int64)
        self._seq: I64 = np.zeros(0, np.int64)
        self._priority: I32 = np.zeros(0, np.int32)
        self._prompt: I32 = np.zeros(0, np.int32)
        self._cached: I32 = np.zeros(0, np.int32)
        self.sequences = 0
        """Sequences (choices) that wait; an entry may hold several."""

    def __len__(self) -> int:
        return len(self._entries) - len(self._free)

    def demand(self, *, parked: bool) -> tuple[int, int]:
        """(entries, their tokens without what the prefix cache had at the last look-up), parked ones left out: their clients would not take what they
        get. `parked`: whether there may be any; without, no entry is looked at by itself."""
        rows = np.flatnonzero(self._used)
        if parked:
            rows = rows[[(entry := self._entries[row]) is not None and not entry.request.parked for row in rows.tolist()]]
        return len(rows), int((self._prompt - self._cached)[rows].sum())

    def _grow(self) -> None:
        more = max(64, len(self._entries))
        self._free += range(len(self._entries) + more - 1, len(self._entries) - 1, -1)
        self._entries += [None] * more
        for name in ("_used", "_arrival", "_seq", "_priority", "_prompt", "_cached"):
            old: Column = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))

    def add(self, entry: Entry) -> None:
        if not self._free:
            self._grow()
        row = self._free.pop()
        request = entry.request
        entry.row = row
        self._entries[row] = entry
        self._used[row] = True
        self._arrival[row] = request.arrival_ns
        self._seq[row] = entry.seqs[0].seq
        self._priority[row] = request.priority
        self._prompt[row] = entry.tokens.size
        self._cached[row] = entry.cached
        self.sequences += len(entry.seqs)

    def note_cached(self, entry: Entry, cached: int) -> None:
        entry.cached = cached
        self._cached[entry.row] = cached

    def remove(self, entry: Entry) -> None:
        """The whole entry leaves; its sequences no longer wait."""
        self._entries[entry.row] = None
        self._used[entry.row] = False
        self._free.append(entry.row)
        entry.row = -1
        self.sequences -= len(entry.seqs)
        for sequence in entry.seqs:
            sequence.entry = None

    def drop(self, sequence: Sequence) -> None:
        """One sequence leaves (it was aborted); the entry stays as long as others are in it."""
        entry = sequence.entry
        if entry is None:
            return
        if len(entry.seqs) == 1:
            self.remove(entry)
        else:
            entry.seqs.remove(sequence)
            sequence.entry = None
            self.sequences -= 1

    def ordered(self, now_ns: int) -> list[Entry]:
        """All entries, first to be served first."""
        rows = np.flatnonzero(self._used)
        if rows.size > 1:
            arrival = self._arrival[rows]
            waited: F32 = ((now_ns - arrival) * 1e-9).astype(np.float32)
            keys = self._policy.order(
                Waiting(
                    arrival_ns=arrival,
                    priority=self._priority[rows],
                    waited_s=waited,
                    prompt_tokens=self._prompt[rows],
                    cached_tokens=self._cached[rows],
                )
            )
            rows = rows[np.lexsort((self._seq[rows], arrival, keys))]
        return [entry for row in rows.tolist() if (entry := self._entries[row]) is not None]
