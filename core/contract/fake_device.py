"""A device without a model, for tests, chaos runs and measuring the machinery.

What it is: `FakeDevice` and `FakeRunner` implement core/contract/devices.py in numpy. The next token is a deterministic function of the sequence's
history (and of seed and choice unless greedy), so that equal requests give equal tokens whatever the batching, chunking, caching, preemption
or wiring. The runner also referees: it keeps a real paged "KV" whose entry for a position is a digest of all tokens up to it, and before a
row uses a position it checks that the block table leads to the right digest. A wrong block, a missed copy, a hit on foreign KV, a write to a
shared block or an unknown token raises `FakeViolation` (as a device fault would). Blocks may be moved to host pages and back; Control "host_pages"
(the number as decimal text) takes that many.
What it does not know: torch, the scheduler, plugins' hooks beyond the one at the end of this file.
It is long because the referee and what it watches are one step.

As a plugin module (`Boot.extra_plugins = ["penstock.core.contract.fake_device"]`) it registers the device "fake"; options come from
`--hf-overrides '{"fake": {...}}'`, fields of `FakeOptions`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.core.contract.devices import READS_ALL, READS_NOTHING, DeviceCapabilities, MemoryTable, ModelFacts, RunnerConfig
from penstock.core.contract.fake_draws import DraftKind, FakeDraws, Mask, Script, columns_of, fall_of
from penstock.core.contract.fake_pool import FakePool
from penstock.core.contract.fake_slots import FakeSlots, FakeViolation
from penstock.core.contract.hookspecs import DeviceSpec, hookimpl
from penstock.core.protocol.columns import EMPTY_F32, EMPTY_I32, EMPTY_U8, i32
from penstock.core.protocol.errors import CheckpointError, InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Control, Forward, LogprobColumns, Move, Sample, StepDone


class FakeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape and behaviour. `step_s`, `load_s` are seconds of pretended work; `fail_*` and `hang_*` inject faults; `manual` holds every step's result
    until `FakeDevice.release` lets it go; `eos_every`: about one token in so many is `eos` (0: left to chance). `clones`, `lookahead`,
    `adapters`, `embeddings`, `pool_kinds`: what it declares. `drafts`: how its drafters guess, one word each (see FakeDraws.guess); `reads`: what each reads."""

    vocab_size: int = 512
    depth: int = 1
    max_model_len: int = 4096
    num_blocks: int = 1024
    step_s: float = 0.0
    load_s: float = 0.0
    fail_load: str = ""
    fail_at_step: int = 0
    hang_at_step: int = 0
    bad_row_at_step: int = 0
    manual: bool = False
    check: bool = True
    eos: int = 0
    eos_every: int = 0
    clones: bool = False
    lookahead: int = 0
    drafts: tuple[DraftKind, ...] = ("fair",)
    masks_ahead: bool = False
    loose: bool = True
    reads: tuple[int, ...] = ()
    adapters: int = 0
    embeddings: int = 0
    pool_kinds: tuple[int, ...] = ()


class FakeDevice:
    """`script` may decide tokens (slow path); `launches` counts over all runners; `runner` is the last one loaded."""

    def __init__(self, options: FakeOptions | None = None, *, script: Script | None = None) -> None:
        self.options = options or FakeOptions()
        self.script = script
        self.launches: Counter[str] = Counter()
        self.runner: FakeRunner | None = None
        self.capabilities = self._declare()
        self._gate = threading.Semaphore(0)

    def _declare(self) -> DeviceCapabilities:
        options = self.options
        return DeviceCapabilities(
            name="fake",
            depth=options.depth,
            dtypes=["float32", "bfloat16"],
            deterministic=True,
            bounded_steps=True,
            clones=options.clones,
            lookahead=options.lookahead,
            adapters=options.adapters,
            embeddings=options.embeddings,
            pool_kinds=options.pool_kinds,
            masks=True,
            writes=True,
        )

    def load(self, config: RunnerConfig, progress: Callable[[str, float], None]) -> FakeRunner:
        options = msgspec.convert({**msgspec.structs.asdict(self.options), **config.hf_overrides.get("fake", {})}, FakeOptions)
        self.options = options
        self.capabilities = self._declare()
        progress("weights", 0.0)
        if options.load_s:
            time.sleep(options.load_s)
        if options.fail_load:
            raise CheckpointError(options.fail_load)
        self.runner = FakeRunner(self, options, config)
        progress("weights", 1.0)
        return self.runner

    def release(self, steps: int = 1) -> None:
        """With `manual`: let the results of so many steps go."""
        for _ in range(steps):
            self._gate.release()


class FakeRunner:
    """State per slot is in FakeSlots, besides what a draw needs. Blocks hold digests."""

    def __init__(self, device: FakeDevice, options: FakeOptions, config: RunnerConfig) -> None:
        self.max_model_len = min(options.max_model_len, config.max_model_len or options.max_model_len)
        self.block_size = config.block_size
        self.num_blocks = config.num_gpu_blocks_override or options.num_blocks
        self.dtype = "float32" if config.dtype == "auto" else config.dtype
        self.attention = "fake"
        self.fingerprint = f"fake-{options.vocab_size}"
        self.kv_layout = f"fake-{self.block_size}"
        block_bytes = 8 * self.block_size
        kv = self.num_blocks * block_bytes
        self.memory = MemoryTable(weights=0, workspace=0, graphs=0, kv=kv, slack=0, total=kv)
        self.facts = ModelFacts(
            architecture="FakeForCausalLM",
            model_type="fake",
            vocab_size=_vocab_of(config.model_path) or options.vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            max_position=options.max_model_len,
        )
        asked = [] if config.speculation is None else config.speculation.methods
        self.lookahead = max([one.num_speculative_tokens or options.lookahead for one in asked], default=options.lookahead)
        specs = {} if config.plugins is None else config.plugins.drafters()
        hosted = {method for spec in specs.values() if spec.where == "host" for method in spec.methods}
        mine = tuple(one.method or "" for one in asked if one.method not in hosted)
        self.drafters = mine if asked else options.drafts
        self.masks_ahead = options.masks_ahead
        self.loose = options.loose
        self.reads = options.reads
        self._device = device
        self._options = options
        slots = config.max_num_seqs
        self._slots = FakeSlots(slots, self.max_model_len + 1, self.block_size, self.facts.vocab_size, self._need)
        self._history, self._length = self._slots.history, self._slots.length
        self._digest, self._table, self._sampling = self._slots.digest, self._slots.table, self._slots.sampling
        self._kv = np.zeros((self.num_blocks, self.block_size), np.uint64)
        self._draws = FakeDraws(
            self._slots, self._kv, self.facts.vocab_size, eos=options.eos, eos_every=options.eos_every, script=device.script
        )
        self._pool = FakePool(self._slots, self._kv, self.facts.hidden_size, options.pool_kinds, self._need)
        self._pages = np.zeros((0, self.block_size), np.uint64)
        self._rows: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
        self._asked, self._step, self._started, self._width = EMPTY_I32, 0, 0, 0
        self._loose = np.zeros(0, np.bool_)
        self._engine = (0, 0)
        self.closed = False

    # --- Runner

    def warm_up(self, progress: Callable[[str], None]) -> None:
        progress("warm-up")

    def close(self) -> None:
        self.closed = True

    def forward(self, work: Forward) -> None:
        self._device.launches["forward"] += 1
        self._need(self._rows is None, "a Forward came before the last one's Sample")
        self._need(work.step == self._step + 1, f"Forward of step {work.step} came after step {self._step}")
        if self._options.hang_at_step and work.step == self._options.hang_at_step:
            threading.Event().wait()
        if self._options.fail_at_step and work.step == self._options.fail_at_step:
            raise RuntimeError("injected device fault")
        self._started = time.monotonic_ns()
        self._engine = (work.engine, work.epoch)
        groups = self._device.capabilities.kv_groups
        for column, beside in ((work.block_groups, work.block_ids), (work.copy_groups, work.copy_src)):
            self._need(len(column) in (0, len(beside)), "a column of groups is not as long as its blocks")
            self._need(bool((column < groups).all()), f"a KV group is named beyond the {groups} there are")
        if len(work.copy_src):
            self._kv[work.copy_dst] = self._kv[work.copy_src]
        self._slots.place(work.place_slots, work.place_counts, work.place_tokens, work.place_adapters, self._options.adapters)
        self._need(
            not (len(work.place_unread) or len(work.read_slots)) or bool(self.reads), "sequences are not read where nobody reads any"
        )
        self._need(
            not len(work.read_slots) or READS_ALL not in self.reads,
            "sequences are to be read late by who has to see them from their beginning",
        )
        self._slots.skip(work.place_slots, work.place_unread, work.read_slots)
        if len(work.embed_slots):
            self._slots.embed(work.embed_slots, work.embed_starts, work.embed_counts, work.embed_rows, self._options.embeddings)
        if len(work.clone_src):
            self._slots.clone(work.clone_src, work.clone_dst, work.clone_lens)
        if len(work.write_slots):
            self._slots.write(work.write_slots, work.write_positions, work.write_tokens)
        if len(work.block_ids):
            self._need(bool(((work.block_ids >= 0) & (work.block_ids < self.num_blocks)).all()), "a block id is out of range")
            self._table[work.block_slots, work.block_index] = work.block_ids
        slots = work.slots.astype(np.int64)
        starts = work.starts.astype(np.int64)
        self._loose = np.zeros(len(slots), np.bool_)
        if len(work.loose):
            self._need(self.loose and len(work.loose) == len(slots), "rows are loose that may not be")
            self._loose = work.loose > 0
            starts[self._loose] = self._length[slots[self._loose]] - 1
            self._need(bool((starts <= work.starts).all()), "a loose row has come further than it can")
            self._need(not self._loose[work.num_decode :].any(), "a prompt is loose")
            for row in np.nonzero(self._loose)[0].tolist():
                self._slots.assume(int(slots[row]), int(work.counts[row]) - 1)
        ends = starts + work.counts
        self._compute(slots, starts, ends, work.num_decode, work.lookahead)
        self._rows, self._asked = (slots, starts, ends), work.prompt_rows
        self._width = work.lookahead

    def sample(self, work: Sample) -> Callable[[], StepDone]:
        self._device.launches["sample"] += 1
        self._need(self._rows is not None, "a Sample came without its Forward")
        self._need(work.step == self._step + 1, f"Sample of step {work.step} came after step {self._step}")
        assert self._rows is not None
        slots, starts, ends = self._rows
        self._rows = None
        self._step = work.step
        self._need(work.lookahead == self._width, "a Sample has another lookahead than its Forward")
        for state in work.places:
            self._draws.place(state)
        rows, into = work.rows.astype(np.int64), work.slots.astype(np.int64)
        positions, last = work.positions.astype(np.int64), ends[rows]
        loose = self._loose[rows]
        self._need(bool((starts[rows] + 1 <= positions)[loose].all()), "a loose row draws further than it can")
        positions[loose] = starts[rows][loose] + 1
        self._referee_draws(work, slots[rows], into, positions, last)
        mask = self._draws.mask = Mask(work, self.facts.vocab_size, self._need) if len(work.mask_rows) or len(work.mask) else None
        # Before the draw: afterwards histories are one token longer.
        pooled, pooled_counts = self._pool.of(work, slots, ends) if len(work.pool_rows) else (EMPTY_F32, EMPTY_I32)
        counts = drafts = EMPTY_I32
        self._need(work.lookahead <= self.lookahead and work.drafts <= self.lookahead, "a step is wider than the lookahead")
        drafters = EMPTY_U8
        if work.lookahead:
            tokens, counts = self._draws.verify(slots[rows], into, positions, last)
            at = np.repeat(np.arange(len(into)), counts)
            logprobs = self._logprobs(into[at], positions[at] + np.arange(len(at)) - (np.cumsum(counts) - counts)[at], tokens, mask, at)
        else:
            tokens = self._draws.draw(slots[rows], into, positions)
            self._slots.append(into, positions, tokens)
            logprobs = self._logprobs(into, positions, tokens, mask)
        if work.drafts:
            self._device.launches["draft"] += 1
            reads = (self.reads + (READS_NOTHING,) * len(self.drafters))[: len(self.drafters)]
            drafts, drafters = self._draws.drafts(into, work.drafts, work.drafters, self._options.drafts[: len(self.drafters)], reads)
        self._need(np.array_equal(work.prompt_rows, self._asked), "prompt log-probabilities of other rows than Forward said")
        prompt = self._prompt_logprobs(work, slots, starts, ends)
        bad = i32([0]) if self._options.bad_row_at_step == work.step and len(rows) else EMPTY_I32
        if mask is not None:
            bad = mask.impossible
        started, (engine, epoch) = self._started, self._engine
        out_slots = work.slots

        def wait() -> StepDone:
            if self._options.manual:
                self._device._gate.acquire()
            if self._options.step_s:
                time.sleep(self._options.step_s)
            return StepDone(
                engine=engine,
                epoch=epoch,
                step=work.step,
                slots=out_slots,
                tokens=tokens,
                started_ns=started,
                finished_ns=time.monotonic_ns(),
                logprobs=logprobs,
                prompt_logprobs=prompt,
                bad_rows=bad,
                counts=counts,
                drafts=drafts,
                drafters=drafters,
                pooled=pooled,
                pooled_counts=pooled_counts,
            )

        return wait

    def move(self, work: Move) -> Callable[[], None]:
        self._device.launches["move"] += 1
        self._need(self._rows is None, "a move came between a Forward and its Sample")
        blocks, pages = work.blocks, work.pages
        self._need(len(blocks) == len(pages), "a move's columns differ in length")
        self._need(bool(((blocks >= 0) & (blocks < self.num_blocks)).all()), "a move names a block out of range")
        self._need(len(set((pages if work.out else blocks).tolist())) == len(blocks), "a move writes one place twice")
        if not bool(((pages >= 0) & (pages < len(self._pages))).all()):
            raise InvalidRequest(f"There are {len(self._pages)} host pages.", param="pages")
        if work.out:
            self._pages[pages] = self._kv[blocks]
        else:
            self._kv[blocks] = self._pages[pages]
        return lambda: None

    def control(self, work: Control) -> bytes:
        self._device.launches["control"] += 1
        self._need(self._rows is None, "a control came between a Forward and its Sample")
        if work.name != "host_pages":
            raise UnsupportedFeature(f"The fake device does not know the control {work.name!r}.", param=work.name)
        self._pages = np.zeros((int(work.data), self.block_size), np.uint64)
        return str(self._pages.nbytes).encode()

    # --- inside

    def _need(self, ok: bool, what: str) -> None:
        if not ok:
            raise FakeViolation(f"step {self._step + 1}: {what}")

    def _compute(
        self, slots: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], num_decode: int, lookahead: int
    ) -> None:
        self._need(len(set(slots.tolist())) == len(slots), "two rows name one slot")
        self._need(bool((ends > starts).all()), "a row computes nothing")
        known = self._length[slots]
        if lookahead:  # decode rows may go on into the drafts behind
            known[:num_decode] += self._slots.drafts[slots[:num_decode]]
        self._need(bool((ends <= known).all()), "a row computes a position whose token is not known")
        self._need(bool((ends[:num_decode] - starts[:num_decode] <= 1 + lookahead).all()), "a decode row computes too many positions")
        size = self.block_size
        lengths = ends - starts
        # Every (row, position) that is written, flat.
        row = np.repeat(np.arange(len(slots)), lengths)
        position = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(starts, lengths)
        block = self._table[slots[row], position // size]
        self._need(bool((block >= 0).all()), "a row writes a position that has no block")
        cell = block.astype(np.int64) * size + position % size
        self._need(len(np.unique(cell)) == len(cell), "two rows write one place of the KV")
        self._kv.reshape(-1)[cell] = self._digest[slots[row], position]
        if not self._options.check:
            return
        for slot, end in zip(slots.tolist(), ends.tolist(), strict=True):
            table = self._table[slot, : -(-end // size)]
            self._need(bool((table >= 0).all()), f"slot {slot} reads a position that has no block")
            right = self._kv[table].reshape(-1)[:end] == self._digest[slot, :end]
            if not right.all():
                first = int(np.argmin(right))
                raise FakeViolation(
                    f"step {self._step + 1}: slot {slot} reads foreign or missing KV at position {first} (block {int(table[first // size])})"
                )

    def _referee_draws(
        self,
        work: Sample,
        source: npt.NDArray[np.int64],
        into: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        last: npt.NDArray[np.int64],
    ) -> None:
        """`last` is the position behind what each row computed."""
        slots = self._slots
        if work.lookahead:
            self._need(
                bool(((positions <= last) & (last - positions <= work.lookahead)).all()), "a row draws more than the lookahead allows"
            )
            self._need(bool(((last == positions) | (source == into)).all()), "drafts of another slot would be verified")
            self._need(bool((slots.sure[into] <= positions).all()), "a token that was drawn would be drawn again")
            self._need(bool((positions <= slots.length[into]).all()), "a draft was taken for a token")
        else:
            self._need(bool((last == positions).all()), "a drawn position is not the one after its row's last")
            self._need(bool((slots.length[into] == positions).all()), "a slot's history does not end where its token is to go")
        self._need(len(set(into.tolist())) == len(into), "two draws go into one slot")
        self._need(all(slots.sampling[s] is not None for s in into.tolist()), "a slot without sampling state is drawn for")

    def _logprobs(
        self,
        into: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int32],
        mask: Mask | None = None,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> LogprobColumns | None:
        """-0.5 for the drawn token, then less and less for its successors in the vocabulary: how much, the history decides. Beams are told of those that
        `mask` allows, which has `rows` for them."""
        if self._draws.plain[into].all():
            return None
        wanted: list[tuple[int, int, int, int]] = []
        falls: list[float] = []
        allowed: dict[int, npt.NDArray[np.bool_]] = {}
        for i, slot in enumerate(into.tolist()):
            state = self._sampling[slot]
            if state is not None and state.params.logprobs is not None:
                wanted.append((i, int(positions[i]), int(tokens[i]), min(state.params.logprobs, self.facts.vocab_size)))
                falls.append(fall_of(self._digest[slot, positions[i] - 1]))
                if mask is not None and state.params.beam is not None:
                    allowed[i] = mask.of(i if rows is None else int(rows[i]))
        return columns_of(wanted, self.facts.vocab_size, falls, allowed)

    def _prompt_logprobs(
        self, work: Sample, slots: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> LogprobColumns | None:
        wanted: list[tuple[int, int, int, int]] = []
        for i, (row, top) in enumerate(zip(work.prompt_rows.tolist(), work.prompt_topk.tolist(), strict=True)):
            slot = int(slots[row])
            state = self._sampling[slot]
            limit = int(self._length[slot]) if state is None else state.prompt_len
            for position in range(int(starts[row]) + 1, min(int(ends[row]) + 1, limit)):
                wanted.append((i, position, int(self._history[slot, position]), top))
        return columns_of(wanted, self.facts.vocab_size)


def _vocab_of(model_path: str) -> int | None:
    """The vocabulary of a real checkpoint folder, so that its tokenizer can be served by the fake; None without one."""
    try:
        size = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8")).get("vocab_size") if model_path else None
    except (OSError, ValueError):
        return None
    return size if isinstance(size, int) else None


@hookimpl
def register_devices() -> list[DeviceSpec]:
    """The door through which chaos tests bring the fake into a real engine process."""
    return [
        DeviceSpec(
            name="fake",
            api_level=1,
            doc="Deterministic tokens without a model, for tests.",
            available=lambda: True,
            factory=FakeDevice,
            priority=-100,
        )
    ]
