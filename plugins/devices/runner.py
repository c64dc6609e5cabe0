"""A loaded model on a device: slots, paged cache, graphs, and the two halves of a step, neither of which waits for the device.

What it is: the Runner of core/contract/devices.py. Token history and block tables of the slots live on the device; a draw writes its token into
the history, where the next step's Forward finds it, so that the host may launch step n+1 before it knows the tokens of step n. Columns go
up in one pinned copy (a second one in steps that place sequences, give blocks or mix in a prefill), tokens come back in one; `sample` returns
a call that waits for that copy's event and is made on the waiter thread of the device queue.
Graphs: a step of decode rows alone replays a graph of the smallest bucket that holds them; padding rows have slot -1, which reads zeros and
writes nowhere. The draw is a second graph on the same inputs, for rows without penalties, lists or log-probabilities; under a step's masks it is a
third one, which is captured once masks are used. Graphs are captured at
warm-up, largest bucket first, within a time and a memory reservation; what is left is captured while nothing runs (`improve`), or in mid-service
after a bucket was used LAZY_USES times and at most one every LAZY_PAUSE_S. Steps with prefill have graphs too, by sequences and tokens: which sequences compute one token is looked up on
the device. Beyond MIXED_TOKENS tokens a step takes the device longer than the host needs to launch it piece by piece, and runs eagerly.
A direct lane (the CPU) has neither copies nor graphs; where its operations can fuse the model, a step is one call of theirs. That call keeps one hidden
state a row, and all of the rows whose prompt log-probabilities Sample will ask for (Forward.prompt_rows), so that other steps never pay for them.
With drafts the lengths of histories live on the device, too: a step that is planned before the one ahead has landed (Forward.loose) begins where that will have left its
rows; a direct lane has no such steps under way, and looks itself.
`--deterministic` keeps to the same code with operations whose rows do not depend on each other, behind a self-test at start-up.
What it does not know: requests, scheduling, Triton, which model family it drives.

It is long because forward, graphs and sample share one set of buffers whose order of use is what makes them right; split, that order would be in no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch

from penstock.core.contract.devices import READS_ALL, READS_NOTHING, MemoryTable, ModelFacts, refuse_columns
from penstock.core.protocol.columns import EMPTY_I32, EMPTY_U8, I32, Column, i32
from penstock.core.protocol.errors import EngineFailure, InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Control, Forward, LogprobColumns, Move, Sample, StepDone
from penstock.plugins.devices.host_pages import HostPages
from penstock.plugins.devices.lane import Event, Graph, Lane, Outputs
from penstock.plugins.devices.ops import DeviceOps
from penstock.plugins.devices.rings import Download, Landing, Upload
from penstock.plugins.devices.sampler import SlotSampler, Wanted
from penstock.plugins.devices.trees import TreeSteps
from penstock.plugins.drafters.api import Drafter, Proposal, Seen, tree_among
from penstock.plugins.models.api import Columns, Model

Tensor = torch.Tensor

PROMPT_LOGIT_ELEMENTS, DIRECT_LOGIT_ELEMENTS = 1 << 26, 1 << 23
"""Prompt log-probabilities are computed for at most this many logits at a time (256 MiB of float32; 32 MiB on a direct lane)."""
Size = int | tuple[int, int]
"""Of a graph: decode rows, or (sequences, tokens) of a step with prefill."""
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
MIXED_ROWS = (16, 64, 128, 256, 512)
MIXED_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)
CAPTURE_S = 6.0
WARM_SHAPES = ((1, 1), (3, 3), (16, 16), (1, 7), (1, 16), (3, 7), (3, 16), (16, 48), (16, 49), (17, 48))
"""(rows, tokens) that between them compile each kernel for counts of 1, for multiples of 16, and for others."""
WARM_DRAFTS = (1, 2, 4, 8, 16)
"""Rows for which drafters' graphs are captured before anybody asks."""
FLAT_BELOW = 256
"""Sequences times KV heads. On an H100, with an 8B shape at 1k context, 64 rows took 21.2 ms with 4 drafts, flat, and 22.3 ms with 8, which were not."""
LAZY_USES = 4
LAZY_PAUSE_S = 0.3
AHEAD = 0.75
"""Share of the graphs' memory reservation that sizes may take which nobody asked for yet."""


def buckets_for(rows: int) -> list[int]:
    """Batch sizes that get a graph, ascending; the last one holds `rows`, if that is at most BUCKETS[-1]."""
    return [size for index, size in enumerate(BUCKETS) if index == 0 or BUCKETS[index - 1] < rows]


def mixed_for(rows: int, tokens: int) -> tuple[list[int], list[int]]:
    """Numbers of sequences and of tokens that steps with prefill are padded to, ascending: the last ones hold what a step may have, up to
    MIXED_TOKENS[-1] tokens."""
    sizes = [size for size in MIXED_ROWS if size < padded_rows(rows)]
    return [*sizes, padded_rows(rows)], [size for index, size in enumerate(MIXED_TOKENS) if index == 0 or MIXED_TOKENS[index - 1] < tokens]


def padded_rows(rows: int, lookahead: int = 0) -> int:
    """The most rows that a step of `rows` sequences may have, padding included; with drafts among them of one that is not too large for a graph."""
    return max(rows, buckets_for(rows)[-1]) if not lookahead else buckets_for(min(rows, BUCKETS[-1]))[-1]


@dataclass
class Counters:
    """What happened so far. Times in ns of the device, from events: `busy` within steps, `idle` between consecutive ones."""

    steps: int = 0
    replays: int = 0
    captures: int = 0
    busy_ns: int = 0
    idle_ns: int = 0


@dataclass
class _Launched:
    """The Forward that waits for its Sample."""

    work: Forward
    bucket: int
    """0: eager."""
    hidden: Tensor | None
    """[rows, H] normalised, padded rows included, with drafts a row for each token of a decode row; behind them, where a program ran, all tokens of
    Forward.prompt_rows, in their order."""
    whole: tuple[Tensor, Tensor] | None
    """(x, residual) of every token of an eager step; None where a program kept what was asked for alone."""
    first: I32
    """For each row the row of `hidden` that its first kept token has: of decode rows all are kept, of others the last."""
    taps: Sequence[Tensor] = ()
    """Of every token, what drafters asked for (Drafter.taps)."""
    streams: Tensor | None = None
    """The same by a program: [T, K, H]."""
    states: Tensor | None = None
    """So (Drafter.states)."""
    columns: Columns | None = None
    """Where a drafter asked for either."""
    asked: Forward | None = None
    """The Forward as it came, where `work` is another: see _flat, _unbound."""


class DeviceRunner:
    """See core/contract/devices.py: Runner. `forward` and `sample` are called on one thread; what `sample` returns, on another."""

    def __init__(
        self,
        *,
        facts: ModelFacts,
        model: Model,
        ops: DeviceOps,
        lane: Lane,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        dtype: str,
        torch_dtype: torch.dtype,
        deterministic: bool,
        fingerprint: str,
        graphs: bool,
        depth: int,
        kv_dtype: str = "",
        lookahead: int = 0,
        drafters: Sequence[Drafter] = (),
    ) -> None:
        """`num_blocks` may be small at first: `resize` brings the real cache. `lookahead`: the most drafts behind a token, whoever makes them; `drafters`: who
        does it here, the first asked first."""
        self.facts = facts
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.attention = model.attention.name
        self.deterministic = deterministic
        self.fingerprint = fingerprint
        self.kv_dtype = kv_dtype or dtype
        self.kv_layout = (
            f"{model.attention.kv_layout}:{self.kv_dtype}:L{facts.num_layers}:H{facts.num_kv_heads}:D{facts.head_dim}:B{block_size}"
        )
        self.lookahead = lookahead
        tree = tree_among(drafters)
        self.masks_ahead = self.adjusts_ahead = tree is None
        self.loose = lookahead > 0 and not lane.direct and tree is None
        """A direct lane takes loose rows as well, but does not ask for them: its steps wait for nobody, and an answer begins and ends with a step in vain. Which node of a tree
        a row goes on from is not known while its step runs: those are planned one at a time."""
        self.widths: tuple[int, ...] = () if tree is None else (lookahead,)
        self.drafters = tuple(drafter.name for drafter in drafters)
        self._drafters = list(drafters)
        self.reads = tuple(getattr(drafter, "reads", READS_ALL) for drafter in drafters)
        self._readers = [drafter for drafter, reads in zip(drafters, self.reads, strict=True) if reads != READS_NOTHING]
        self._unread = np.zeros(max_num_seqs, bool)
        """Slots that none of these looks at."""
        self._any_unread = False
        self._read: Column | None = None
        """Rows of the Forward that is launched that they look at; None: all."""
        self._seen_by = True
        """Whether there are any."""
        self._same: Column = EMPTY_I32
        """The slots of the Forward before: the same object, as long as the same sequences go on."""
        self._own_bytes = sum(drafter.page_bytes for drafter in drafters)
        """Of each page, what the drafters' layers have, behind the model's own."""
        self.kv_layout += "".join(drafter.kv_layout for drafter in drafters)
        self.counters = Counters()
        self.timed = False
        """Whether StepDone's events are read for `counters` (benchmarks)."""
        weights = model.weights_bytes + sum(drafter.nbytes for drafter in drafters)
        self.memory = MemoryTable(weights=weights, workspace=0, graphs=0, kv=0, slack=0, total=0)
        self._model = model
        self._taps = tuple(sorted({tap for drafter in drafters for tap in drafter.taps}))
        """Layers in front of which some drafter wants to see the stream."""
        self._followers = [index for index, drafter in enumerate(drafters) if getattr(drafter, "follows", False) and lane.direct]
        self._following = [drafters[index] for index in self._followers]
        self._states = any(drafter.states for drafter in drafters)
        self._looked_at = self._states or bool(self._taps)
        self._drafting = False
        """Drafts were asked for behind the last step."""
        self._ops = ops
        self._lane = lane
        self._torch_dtype = torch_dtype
        self.num_blocks = num_blocks
        self._bind(self.allocate(num_blocks))
        device = lane.device
        width = -(-max_model_len // block_size) + 1  # a planner may reserve for one token more than is ever computed
        # One more place than the longest sequence: the draw after a full context is written, and never read.
        self.history = torch.zeros(max_num_seqs, max_model_len + 1, dtype=torch.int32, device=device)
        self.table = torch.full((max_num_seqs, width), -1, dtype=torch.int32, device=device)
        self._lens = torch.zeros(max_num_seqs if lookahead else 0, dtype=torch.int32, device=device)
        """Of each slot's history, behind the last draw with drafts or behind some."""
        self._stand: I32 = np.zeros(max_num_seqs if lookahead and lane.direct else 0, np.int32)
        """Drafts that stand behind it; a direct lane's alone, which knows."""
        self._known = np.full((max_num_seqs, width), -1, np.int32)
        """The table as the host wrote it, to refuse a step that would read another sequence's blocks."""
        entries = depth + 1
        rows = padded_rows(max_num_seqs * (1 + lookahead), lookahead)
        self._max_rows = rows
        """Of a step that has a graph."""
        self._tree = None if tree is None else TreeSteps(tree, ops, lane, block_size, entries)
        """Drafts are a tree. The third column of `_decode` says then which node each row is."""
        self._decode = Upload(lane, entries, (2 if tree is None else 3) * rows, fixed=True)
        twice = 2 * entries if lookahead else entries  # with drafts a step may send them twice
        self._columns = Upload(lane, twice, 4 * max_num_seqs + 4 * max_num_batched_tokens)
        self._draws = Upload(lane, twice, 3 * max_num_seqs)
        at_once = max_num_seqs if not lookahead else min(max_num_seqs * (1 + lookahead), BUCKETS[-1])
        self._mixed_rows, self._mixed_tokens = mixed_for(at_once, max_num_batched_tokens) if graphs else ([], [])
        self._mixed: dict[tuple[int, int], Graph] = {}
        self._width = -(-(rows + 1) // 16) * 16
        nodes = 0 if tree is None else max(self._mixed_tokens, default=0)
        self._ragged = Upload(lane, entries, 4 * self._width + nodes if graphs else 0, fixed=True)
        # What graphs of steps with prefill leave behind: one set for all of them.
        self._rows = torch.zeros(rows if graphs else 0, facts.hidden_size, dtype=self._torch_dtype, device=device)
        longest = max(self._mixed_tokens, default=0)
        self._whole = [torch.zeros(longest, facts.hidden_size, dtype=self._torch_dtype, device=device) for _ in range(2)]
        self._down = Download(lane, entries, max_num_seqs * (3 + 2 * lookahead) if lookahead else rows)
        self._bounds = [(lane.event(), lane.event()) for _ in range(entries)]
        self._draft_bounds = [(lane.event(), lane.event()) for _ in range(entries if lookahead else 0)]
        state = Upload(lane, entries, 16 * max_num_seqs)
        lists, masks = Upload(lane, entries, 16 * max_num_seqs), Upload(lane, entries, 0)
        self.sampler = SlotSampler(
            ops,
            max_num_seqs,
            facts.vocab_size,
            self.history,
            state,
            lists,
            masks,
            self._to_device,
            deterministic=deterministic,
            direct=lane.direct,
            slack=depth * lookahead,
        )
        self._zeros = torch.zeros(max_num_seqs if lookahead else 0, dtype=torch.int32, device=device)
        self._range: I32 = np.arange(max(rows, max_num_seqs, max_num_batched_tokens) + 1, dtype=np.int32)
        self._buckets = buckets_for(at_once) if graphs else []
        self._forwards: dict[int, Graph] = {}
        self._samples: dict[tuple[int, bool], Graph] = {}
        self._masked: dict[tuple[int, bool], Graph] = {}
        """Draws under masks, by bucket and whether somebody is not greedy; and what they read: which row of the masks each row has, then the masks."""
        self._masks: Upload | None = None
        self._masked_uses: dict[tuple[int, bool], int] = {}
        self._entries = entries
        self._uses: dict[Size, int] = {}
        self._capture_after = 0.0
        self.graph_reserve = 0
        self._graph_bytes = 0
        self._launched: _Launched | None = None
        self._moved: Column = EMPTY_U8
        """Rows of the Forward that waits for its Sample that were loose, and were looked up."""
        self._asked: Forward | None = None
        """The Forward as it came, while it is launched."""
        self._host_pages = HostPages(lane)
        self._kept_logits = torch.empty(max_num_seqs if lane.direct else 0, facts.vocab_size)
        self._started_ns = 0
        self._last_end: Event | None = None

    # ------------------------------------------------------------------ memory

    def allocate(self, num_blocks: int) -> Tensor:
        """A pool of so many blocks. Raises torch.OutOfMemoryError, on the host RuntimeError."""
        if not self._own_bytes:
            return self._model.attention.allocate(num_blocks)
        page = self._model.attention.allocate(1)
        if page.dim() != 2 or page.dtype != torch.uint8:
            raise UnsupportedFeature(
                f"The attention backend {self.attention!r} has pages of its own making, in which a drafter finds no room. Choose another"
                " --attention-backend, or a drafter without layers, such as ngram.",
                param="speculative_config",
            )
        # The drafters' keys and values lie in the same pages: what copies, shares or moves a page need not know of them. Zeros: a page that was filled
        # without drafts holds numbers at least.
        return torch.zeros(num_blocks, page.nbytes + self._own_bytes, dtype=torch.uint8, device=page.device)

    def _bind(self, pool: Tensor) -> None:
        self._pool = pool
        at = pool.shape[-1] - self._own_bytes
        self._own_pool = pool[:, :at] if self._own_bytes else pool
        self._caches = self._model.attention.caches(self._own_pool)
        self._program = self._ops.fuse(self._model, self._caches)
        self._tapped = None
        if self._taps and getattr(self._program, "taps", False):
            self._tapped = torch.tensor(self._taps, dtype=torch.int32)
        for drafter in self._drafters:
            drafter.bind(pool[:, at : at + drafter.page_bytes] if self._own_bytes else pool[:, :0])
            at += drafter.page_bytes

    def resize(self, pool: Tensor, num_blocks: int) -> None:
        """Take another pool. Before serving only: graphs captured with the old one are dropped, whatever it held is lost."""
        self.drop_graphs()
        self._bind(pool)
        self.num_blocks = num_blocks

    @property
    def pool_bytes(self) -> int:
        """Of the KV cache."""
        return self._pool.nbytes

    @property
    def state_bytes(self) -> int:
        """Bytes of what this runner keeps on the device beside weights and KV cache."""
        tensors = (self.history, self.table, self._lens, self._zeros, self._rows, self._kept_logits, *self._whole)
        kept = (self._decode, self._columns, self._draws, self._ragged, self.sampler)
        masks = 0 if self._masks is None else self._masks.nbytes
        return (
            sum(part.nbytes for part in tensors)
            + sum(part.nbytes for part in kept)
            + masks
            + self._ops.workspace_bytes
            + self._model.attention.workspace_bytes
            + self._model.tables_bytes
            + sum(drafter.state_bytes for drafter in self._drafters)
        )

    # ------------------------------------------------------------------ forward

    @torch.inference_mode()
    def forward(self, work: Forward) -> None:
        """See Runner.forward. Raises EngineFailure if a row names a block that it does not hold."""
        refuse_columns(
            work, writes=True, lookahead=self.lookahead, loose=self.lookahead > 0 and self._tree is None, unread=bool(self._readers)
        )
        self._started_ns = time.monotonic_ns()
        self._lane.bind()
        loose = len(work.loose) > 0
        self._moved = work.loose > 0 if loose and self._lane.direct else EMPTY_U8
        if len(self._moved):
            work, loose = self._looked_up(work), False
        rows = len(work.slots)
        asked, first = work, None
        self._asked = asked
        if work.lookahead and self._flattens(work):
            work, first = _flat(work)
            rows = len(work.slots)
        decode = rows > 0 and work.num_decode == rows and (not work.lookahead or int(work.counts.max()) == 1)
        if self._drafters:
            self._begin_drafts(asked)
        if not self._lane.direct:  # there the program looks at the table itself, and nothing else reads a block that was not given
            self._update_known(work)
        if loose:
            work = _unbound(work, asked)
        self._bounds[self.counters.steps % len(self._bounds)][0].record()
        if len(work.copy_src) or len(work.place_slots) or len(work.block_slots) or len(work.write_slots):
            self._update(work)
        bucket = self._bucket(rows) if decode and rows <= self._max_rows else 0
        if self._masked_uses:
            self._capture_masks()
        if rows == 0:
            self._launched = _Launched(work, 0, None, None, EMPTY_I32)
        elif bucket:
            self._send_decode(work)
            if loose:
                staging, most = self._decode.staging, self._max_rows
                self._ops.find_ends(staging[:rows], staging[most : most + rows], self._lens)
            graph = self._forwards[bucket]
            graph.replay()
            self.counters.replays += 1
            self._launched = _Launched(work, bucket, graph.outputs[0], None, self._range[:rows])
            if self._looked_at and self._seen_by:
                self._look(self._launched, graph.outputs, rows)
        elif decode or (self._looked_at and self._seen_by) or not self._replay_mixed(work, rows):
            self._eager(work, rows, decode)
        assert self._launched is not None
        if first is not None:
            self._launched.first = first
        if work is not asked:
            self._launched.asked = asked

    def _begin_drafts(self, work: Forward) -> None:
        """Drafters are told of the step: who enters, and whom they need not look at."""
        placed, news = work.place_slots, len(work.place_slots) > 0
        given = news or len(work.block_ids) > 0 or len(work.copy_src) > 0
        if work.slots is self._same and not self._seen_by and not given and not len(work.read_slots):
            return  # nobody is read, as in the step before
        self._same = work.slots
        if self._readers and (news or len(work.read_slots)):
            unread: Column = work.place_unread > 0 if len(work.place_unread) else np.zeros(len(placed), bool)
            self._unread[placed] = unread
            self._unread[work.read_slots] = False
            self._any_unread = bool(self._unread.any())
            for drafter in self._readers:
                drafter.place(placed[~unread])
                for told, slots in (("skip", placed[unread]), ("attend", work.read_slots)):
                    if len(slots) and hasattr(drafter, told):
                        getattr(drafter, told)(slots)
        self._read, self._seen_by = None, True
        if self._any_unread:
            self._read = read = ~self._unread[work.slots]
            count = int(np.count_nonzero(read))
            self._seen_by = count > 0
            self._read = None if count == len(read) else read
        if self._seen_by or given:
            for drafter in self._drafters:
                if news and drafter not in self._readers:
                    drafter.place(placed)
                drafter.begin(work)

    def _looked_up(self, work: Forward) -> Forward:
        """The step with what is known here, since all steps before have been: where loose rows begin, and how many drafts they have."""
        loose, starts, counts = work.loose > 0, work.starts.copy(), work.counts.copy()
        slots = work.slots[loose]
        starts[loose] = self._lens.numpy()[slots] - 1
        counts[loose] = np.minimum(counts[loose], 1 + self._stand[slots])
        return msgspec.structs.replace(work, starts=starts, counts=counts, loose=EMPTY_U8)

    def _send_decode(self, work: Forward | None = None) -> None:
        """The fixed inputs of a step of decode rows; None: of padding alone."""
        slots, starts = (EMPTY_I32, EMPTY_I32) if work is None else (work.slots, work.starts)
        if self._tree is None:
            self._decode.send_rows(self._max_rows, -1, slots, starts)
            return
        self._decode.send_rows(self._max_rows, -1, slots, starts, EMPTY_I32 if work is None else self._nodes_of(work))

    def _nodes_of(self, work: Forward) -> I32:
        """Of each token, where drafts are a tree. In a flat step a row's nodes are rows of one slot, one place after the other."""
        assert self._tree is not None
        if not work.lookahead:
            return np.zeros(int(work.counts.sum()), np.int32)
        return self._tree.nodes(self._asked or work)

    def _flattens(self, work: Forward) -> bool:
        """Are a row's drafts computed as rows of their own? So few sequences keep a GPU busy only if attention splits their keys, which it does for rows of one token; many read
        their keys once for all drafts of a row instead. Nodes of a tree that share tiles of keys have other bits than along a chain."""
        if self._tree is not None and self.deterministic and not self._lane.direct:
            return True
        if self._lane.direct or work.num_decode * self.facts.num_kv_heads >= FLAT_BELOW:
            return False
        return int(work.counts[: work.num_decode].sum()) + len(work.slots) - work.num_decode <= self._max_rows

    def _look(self, launched: _Launched, outputs: Outputs, rows: int) -> None:
        """What drafters with taps or states see of a captured decode step, each token of which is a row."""
        staging = self._decode.staging
        slots, starts = staging[:rows], staging[self._max_rows : self._max_rows + rows]
        launched.columns = self._ops.decode_inputs(slots, starts, self.history, self.table, self.block_size)
        launched.states, launched.taps = outputs[0][:rows], [tap[:rows] for tap in outputs[2:]]

    def _update_known(self, work: Forward) -> None:
        """Mirror of the device's table; the check that every position of this step has a block."""
        known, size = self._known, self.block_size
        if len(work.place_slots):
            known[work.place_slots] = -1
        if len(work.block_slots):
            known[work.block_slots, work.block_index] = work.block_ids
        if len(work.slots) == 0:
            return
        first = work.starts // size
        last = first if work.num_decode == len(work.slots) and not work.lookahead else (work.starts + work.counts - 1) // size
        lowest = min(int(known[work.slots, first].min()), int(known[work.slots, last].min()))
        if lowest < 0:
            raise EngineFailure("A step names positions whose blocks were never given to their slot.")

    def _update(self, work: Forward) -> None:
        """Copies, places, writes and blocks, in this order, with one copy up."""
        place_at = np.zeros(len(work.place_counts), np.int32)
        np.cumsum(work.place_counts[:-1], out=place_at[1:])
        sent = self._columns.send(
            work.copy_src,
            work.copy_dst,
            work.place_slots,
            work.place_counts,
            place_at,
            work.place_tokens,
            work.block_slots,
            work.block_index,
            work.block_ids,
            work.write_slots,
            work.write_positions,
            work.write_tokens,
        )
        if len(work.copy_src):
            self._model.attention.copy(self._pool, sent[0], sent[1])
        if len(work.place_slots):
            self._ops.place(self.history, self.table, sent[2], sent[3], sent[4], sent[5])
        if len(work.write_slots):
            self._ops.write_tokens(sent[9], sent[10], sent[11], self.history)
        if len(work.block_slots):
            self._ops.set_blocks(self.table, sent[6], sent[7], sent[8])

    def _eager(self, work: Forward, rows: int, decode: bool) -> None:
        """A step without a graph. The host knows every count; only token values and blocks are looked up on the device."""
        columns, kept, first = self._columns_of(work, decode)
        asked = len(work.prompt_rows) > 0
        looked_at = self._looked_at and self._seen_by
        if self._program is None or (looked_at and self._taps and self._tapped is None and (self._drafting or work.num_decode < rows)):
            x, residual, taps = self._model.step(self._ops, self._caches, columns, self._taps if looked_at else ())
            every = self._model.final(self._ops, x.clone(), residual.clone()) if self._states and looked_at else None
            hidden = self._model.final(self._ops, self._ops.take_rows(x, kept), self._ops.take_rows(residual, kept))
            self._launched = _Launched(work, 0, hidden, (x, residual), first, taps, None, every, columns)
            return
        wanted = torch.cat([kept, torch.from_numpy(_tokens_of(work))]) if asked else kept
        if not looked_at:
            self._launched = _Launched(work, 0, self._run(columns, wanted), None, first)
            return
        tokens, streams = len(columns.tokens), None
        # Of the last layer a program gives the rows that are wanted alone.
        whole = (self._states or self.facts.num_layers in self._taps) and not (decode and not asked)
        if self._tapped is not None:
            streams = torch.empty(tokens, len(self._taps), self.facts.hidden_size, dtype=self._torch_dtype)
        hidden = self._run(columns, torch.arange(tokens, dtype=torch.int32) if whole else wanted, streams)
        states = hidden if self._states else None
        seen = columns if not self._taps or streams is not None else None
        kept = self._ops.take_rows(hidden, wanted) if whole else hidden
        self._launched = _Launched(work, 0, kept, None, first, (), streams, states, seen)

    def _columns_of(self, work: Forward, decode: bool) -> tuple[Columns, Tensor, I32]:
        """The step's columns, the token rows that may be drawn from, and for each sequence which of them is its first. `decode`: one token each."""
        rows, state = len(work.slots), (self.history, self.table, self.block_size)
        if decode:
            sent = self._columns.send(work.slots, work.starts, self._range[:rows])
            if len(work.loose):
                self._ops.find_ends(sent[0], sent[1], self._lens)
            return self._noded(self._ops.decode_inputs(sent[0], sent[1], *state), work), sent[2], self._range[:rows]
        q_start = np.zeros(rows + 1, np.int32)
        np.cumsum(work.counts, out=q_start[1:])
        kept, first = _kept_of(work, q_start, self._range)
        sent = self._columns.send(work.slots, work.starts, q_start, kept)
        if len(work.loose):
            self._ops.find_ends(sent[0], sent[1], self._lens)
        # Where there are too many tokens for a row each, the device looks who has one token only.
        single = -1 if len(kept) > rows else work.num_decode
        return self._noded(self._ops.ragged_inputs(sent[0], sent[1], sent[2], *state, int(q_start[-1]), single), work), sent[3], first

    def _noded(self, columns: Columns, work: Forward) -> Columns:
        """As a tree's nodes, where there are any."""
        if self._tree is None or not work.lookahead:
            return columns
        return self._tree.columns(columns, self._to_device(self._nodes_of(work)))

    def _run(self, columns: Columns, rows: Tensor, streams: Tensor | None = None) -> Tensor:
        """The step by the program: normalised hidden states of these token rows; `streams`: where what drafters look at goes."""
        assert self._program is not None
        hidden = torch.empty(len(rows), self.facts.hidden_size, dtype=self._torch_dtype)
        try:
            if streams is None:
                self._program(columns, rows, hidden)
            else:
                self._program(columns, rows, hidden, self._tapped, streams)  # type: ignore[call-arg]
        except IndexError as error:  # a block that was never given (-1), a token outside the vocabulary
            raise EngineFailure(f"A step names what does not exist: {error}.") from error
        return hidden

    # ------------------------------------------------------------------ graphs

    def _bucket(self, rows: int) -> int:
        """The captured bucket for so many rows, or 0. Captures one that was asked for often enough."""
        bucket = next((size for size in self._buckets if size >= rows), 0)
        if not bucket or bucket in self._forwards:
            return bucket
        if not self._wanted(bucket):
            return 0
        self.capture(bucket)
        return bucket

    def _wanted(self, bucket: Size) -> bool:
        """Count a use of a bucket without a graph; whether it is to get one now."""
        self._uses[bucket] = used = self._uses.get(bucket, 0) + 1
        return used >= LAZY_USES and self._may_capture()

    def _may_capture(self) -> bool:
        """In mid-service."""
        now = time.monotonic()
        if now < self._capture_after or self._graph_bytes >= self.graph_reserve:
            return False
        self._capture_after = now + LAZY_PAUSE_S
        return True

    def _capture_masks(self) -> None:
        """A draw under masks that was asked for often enough."""
        key, used = max(self._masked_uses.items(), key=lambda item: item[1])
        if used >= LAZY_USES and self._may_capture():
            self.capture_masked(*key)

    @torch.inference_mode()
    def improve(self) -> bool:
        """Capture one more step size while nothing runs (tens of ms): what was asked for most, then what may be asked for, few sequences and
        tokens first. False: nothing is left to do until something is asked for."""
        if self._graph_bytes >= self.graph_reserve:
            return False
        if self._masked_uses:
            self._lane.bind()
            self.capture_masked(*next(iter(self._masked_uses)))
            self._lane.synchronize()
            return True
        asked = [size for size in self._uses if not self._captured(size)]
        size: Size | None = max(asked, key=self._uses.__getitem__, default=None)
        if size is None and self._graph_bytes < AHEAD * self.graph_reserve:
            sizes: list[Size] = [*self._buckets, *((rows, tokens) for rows in self._mixed_rows for tokens in self._mixed_tokens)]
            size = next((size for size in sizes if not self._captured(size)), None)
        if size is None:
            return False
        self._lane.bind()
        if isinstance(size, int):
            self.capture(size)
        else:
            self.capture_mixed(*size)
        self._lane.synchronize()
        return True

    def _captured(self, size: Size) -> bool:
        return size in self._forwards if isinstance(size, int) else size in self._mixed

    def _replay_mixed(self, work: Forward, rows: int) -> bool:
        """A step with prefill by its graph, if there is one for its size. Its draw is eager."""
        total = int(work.counts.sum())
        size = next((size for size in self._mixed_rows if size >= rows), 0)
        length = next((length for length in self._mixed_tokens if length >= total), 0)
        if not size or not length:
            return False
        if (size, length) not in self._mixed:
            if not self._wanted((size, length)):
                return False
            self.capture_mixed(size, length)
        ends: I32 = np.cumsum(work.counts, dtype=np.int32)
        self._send_mixed(work.slots, work.starts, ends, EMPTY_I32 if self._tree is None else self._nodes_of(work))
        if len(work.loose):
            self._ops.find_ends(self._ragged.staging[:rows], self._ragged.staging[self._width : self._width + rows], self._lens)
        self._mixed[size, length].replay()
        self.counters.replays += 1
        whole = self._whole[0][:total], self._whole[1][:total]
        kept, first = self._rows[:size], self._range[:rows]
        if work.lookahead and int(work.counts[: work.num_decode].max(initial=1)) > 1:
            every, first = _kept_of(work, np.concatenate([self._range[:1], ends]), self._range)
            (at,) = self._columns.send(every)
            kept = self._model.final(self._ops, self._ops.take_rows(whole[0], at), self._ops.take_rows(whole[1], at))
        self._launched = _Launched(work, 0, kept, whole, first)
        return True

    def _send_mixed(self, slots: Column, starts: Column, ends: I32, nodes: I32 = EMPTY_I32) -> None:
        """slots, starts, q_start and last rows, each `_width` wide, and where drafts are a tree which node each token is. Sequences behind the step's are empty, and look at
        row 0."""
        width, total = self._width, int(ends[-1]) if len(ends) else 0
        q_start = np.zeros(len(ends) + 1, np.int32)
        q_start[1:] = ends
        more = [] if self._tree is None else [(nodes, self._mixed_tokens[-1], 0)]
        self._ragged.send_parts((slots, width, -1), (starts, width, 0), (q_start, width, total), (ends - 1, width, 0), *more)

    def _mixed_body(self, size: int, length: int) -> Outputs:
        """A step of `size` sequences and `length` tokens on the fixed inputs, into `_rows` and `_whole`."""
        width, staging = self._width, self._ragged.staging
        slots, starts, q_start, last = (staging[width * part :][:size] for part in range(4))
        q_start = staging[2 * width :][: size + 1]
        columns = self._ops.ragged_inputs(slots, starts, q_start, self.history, self.table, self.block_size, length, -1)
        if self._tree is not None:
            columns = self._tree.columns(columns, staging[4 * width :][:length])
        x, residual, _ = self._model.step(self._ops, self._caches, columns)
        self._whole[0][:length].copy_(x)
        self._whole[1][:length].copy_(residual)
        self._rows[:size].copy_(self._model.final(self._ops, self._ops.take_rows(x, last), self._ops.take_rows(residual, last)))
        return ()

    def capture_mixed(self, size: int, length: int) -> None:
        """Capture steps of up to `size` sequences and `length` tokens; see `capture`."""
        before = self._lane.used()
        self._send_mixed(EMPTY_I32, EMPTY_I32, EMPTY_I32)
        self._mixed_body(size, length)
        self._mixed[size, length] = self._lane.capture(lambda: self._mixed_body(size, length))
        self.counters.captures += 1
        self._graph_bytes += max(0, self._lane.used() - before)

    def _decode_body(self, bucket: int) -> Outputs:
        """A decode step of `bucket` rows on the fixed inputs: hidden states, and lengths (the positions that the draw fills)."""
        slots, starts = self._decode.staging[:bucket], self._decode.staging[self._max_rows : self._max_rows + bucket]
        columns = self._ops.decode_inputs(slots, starts, self.history, self.table, self.block_size)
        if self._tree is not None:
            columns = self._tree.columns(columns, self._decode.staging[2 * self._max_rows :][:bucket])
        x, residual, taps = self._model.step(self._ops, self._caches, columns, self._taps)
        return self._model.final(self._ops, x, residual), columns.kv_len, *taps

    def _sample_body(self, bucket: int, hot: bool, hidden: Tensor, positions: Tensor, words: int = 0) -> Outputs:
        """The draw behind `_decode_body`, into the history; with `words` (of a mask row) under the step's masks."""
        slots = self._decode.staging[:bucket]
        logits = self._model.logits(hidden)
        if words:
            assert self._masks is not None
            staging, rows = self._masks.staging, self._max_rows
            self._ops.mask(logits, staging[rows : rows * (1 + words)].view(rows, words), staging[:bucket])
        tokens = self.sampler.draw(logits, slots, positions, hot)
        self._ops.write_tokens(slots, positions, tokens, self.history)
        return (tokens,)

    def capture(self, bucket: int) -> None:
        """Capture one bucket, a draw of either kind included. Runs each piece once before, on padding rows alone, so that nothing is compiled or
        allocated for the first time inside a capture; that overwrites the fixed inputs, which every step sends anew."""
        before = self._lane.used()
        self._send_decode()
        hidden, positions, *_ = self._decode_body(bucket)
        for hot in (False, True):
            self._sample_body(bucket, hot, hidden, positions)
        graph = self._lane.capture(lambda: self._decode_body(bucket))
        if not graph.outputs:  # a lane that captures nothing makes the outputs when it runs
            graph.replay()
        self._forwards[bucket] = graph
        kept, lengths = graph.outputs[:2]
        for hot in (False, True):
            body = _bound(self._sample_body, bucket, hot, kept, lengths)
            self._samples[bucket, hot] = sampled = self._lane.capture(body)
            if not sampled.outputs:
                sampled.replay()
        self.counters.captures += 1
        self._graph_bytes += max(0, self._lane.used() - before)

    def capture_masked(self, bucket: int, hot: bool) -> None:
        """Capture a draw under masks behind the captured decode step of that bucket; see `capture`."""
        before = self._lane.used()
        self._masked_uses.pop((bucket, hot), None)
        words = -(-self.facts.vocab_size // 32)
        if self._masks is None:
            self._masks = Upload(self._lane, self._entries, self._max_rows * (1 + words), fixed=True, beside=True)
        self._send_masks(EMPTY_I32, EMPTY_I32)
        self._send_decode()
        body = _bound(self._sample_body, bucket, hot, *self._forwards[bucket].outputs[:2], words)
        body()
        self._masks.done_reading()
        self._masked[bucket, hot] = graph = self._lane.capture(body)
        if not graph.outputs:
            graph.replay()
        self.counters.captures += 1
        self._graph_bytes += max(0, self._lane.used() - before)

    def _send_masks(self, mask: Column, mask_rows: Column) -> None:
        assert self._masks is not None
        self._masks.send_parts((mask_rows, self._max_rows, -1), (mask, mask.size, 0))

    def _draw_graph(self, work: Sample, launched: _Launched) -> Graph | None:
        """The captured draw of a decode step, its masks sent; or None where rows want more than such a draw does."""
        masked = len(work.mask_rows) > 0
        if not launched.bucket or not self._follows(work, launched.asked or launched.work) or not self.sampler.plain(work.slots):
            return None
        key = launched.bucket, self.sampler.hot(work.slots)
        if not masked:
            return self._samples[key]
        if key not in self._masked:  # a capture now would overwrite the inputs of the draw that waits: the next Forward sees to it
            self._masked_uses[key] = self._masked_uses.get(key, 0) + 1
            return None
        self._send_masks(work.mask, work.mask_rows)
        return self._masked[key]

    @property
    def graphs_planned(self) -> int:
        """Step sizes that memory is reserved for: every batch size, and steps with prefill at two numbers of sequences."""
        return len(self._buckets) + 2 * len(self._mixed_tokens)

    @torch.inference_mode()
    def capture_largest(self) -> None:
        """For the memory table."""
        self._lane.bind()
        self.capture_mixed(self._mixed_rows[-1], self._mixed_tokens[-1])
        self.capture(self._buckets[-1])
        self._lane.synchronize()

    def drop_graphs(self) -> None:
        """Forget every graph and the memory that they took."""
        self._forwards.clear()
        self._samples.clear()
        self._masked.clear()
        self._masked_uses.clear()
        self._mixed.clear()
        self._lane.forget()
        self._launched = None
        self._graph_bytes = 0

    def capture_all(self, progress: Callable[[str], None], limit_s: float = CAPTURE_S) -> None:
        """The largest step with prefill, then every decode bucket, largest first, until the time or the reservation is used up."""
        started = time.monotonic()
        if self._buckets and limit_s > 0 and not self._mixed:
            self.capture_mixed(self._mixed_rows[-1], self._mixed_tokens[-1])
        for bucket in reversed(self._buckets):
            if bucket not in self._forwards:
                if time.monotonic() - started > limit_s or (self.graph_reserve and self._graph_bytes >= self.graph_reserve):
                    progress(f"capturing graphs: {len(self._forwards)} of {len(self._buckets)} batch sizes; the others when they are used")
                    return
                self.capture(bucket)
        if self._buckets:
            self._warm_drafters(progress, limit_s)
            progress(f"captured graphs for {len(self._buckets)} batch sizes up to {self._buckets[-1]}")

    # ------------------------------------------------------------------ sample

    @torch.inference_mode()
    def sample(self, work: Sample) -> Callable[[], StepDone]:
        """See Runner.sample: everything is enqueued when this returns; the returned call waits for the step's event."""
        refuse_columns(work, masks=True, lookahead=self.lookahead)
        launched = self._launched
        self._drafting = work.drafts > 0
        if launched is None:
            raise EngineFailure("A Sample came without its Forward.")
        self._launched = None
        before = launched.asked or launched.work
        self._lane.bind()
        if work.places:
            self.sampler.place(work.places)
        loose: Column = before.loose[work.rows] > 0 if len(before.loose) else EMPTY_U8
        if len(self._moved):
            at = np.where(self._moved[work.rows], before.starts[work.rows] + 1, work.positions)
            work = msgspec.structs.replace(work, positions=at.astype(np.int32))
        landing = self._down.take()
        prompt = self._prompt_logprobs(work, launched, landing) if len(work.prompt_rows) else []
        rows, found, drawn, begins = len(work.rows), None, None, None
        if rows and work.lookahead:
            drawn = _Drawn.of(work, before, launched.first, loose)
            if self._tree is not None:
                self._tree.check(work, before)
                at = (work.positions[drawn.row] + self._tree.depths(drawn.ahead)).astype(np.int32)
                drawn = replace(drawn, positions=at, places=at)
            found, begins = self._verify(work, launched, drawn, landing)
        elif rows:
            assert launched.hidden is not None
            graph = self._draw_graph(work, launched)
            if graph is not None:
                graph.replay()
                if self._masks is not None and len(work.mask_rows):
                    self._masks.done_reading()
                tokens = graph.outputs[0][:rows]
            else:
                logits, slots, positions = self._logits_for(work, launched, loose)
                mask = (work.mask, work.mask_rows) if len(work.mask_rows) else None
                tokens, found = self.sampler.sample(logits, work.slots, work.positions, slots, positions, landing, mask, None, loose)
                self._ops.write_tokens(slots, positions, tokens, self.history)
                begins = positions
            if work.drafts or len(loose):
                row_at, slots, positions = self._sent_rows(work, loose)
                self._extend(slots, positions + 1)
                if work.drafts:
                    hidden = self._ops.take_rows(launched.hidden, row_at)
                    tokens = torch.cat([tokens, *self._draft(work, launched, slots, positions, positions + 1, hidden)])
            landing.bring(tokens)
        where = landing.also(begins) if found is not None and len(loose) and begins is not None else -1
        if self._drafters and self._seen_by:
            every = range(len(self._drafters)) if len(before.slots) > before.num_decode else self._followers
            if every and len(before.slots):
                self._observe(launched, every, work.drafters if rows and work.drafts else 0)
        begin, end = self._bounds[self.counters.steps % len(self._bounds)]
        drafting = None
        if rows and work.drafts:
            drafting = self._draft_bounds[self.counters.steps % len(self._draft_bounds)]
        self.counters.steps += 1
        end.record()
        event = landing.close()
        started = self._started_ns

        def wait() -> StepDone:
            event.synchronize()
            if self.timed:
                self._account(begin, end)
            tokens, counts, drafts, named = landing.tokens(), EMPTY_I32, EMPTY_I32, None
            drafters = EMPTY_U8
            told = found
            if found is not None and where >= 0:  # where loose rows drew is known now
                begun, row = landing.more(where, np.int32), found.rows
                at = begun[row] if drawn is None else begun[drawn.row[row]] + drawn.ahead[row]
                told = replace(found, positions=at.astype(np.int32))
            if drawn is not None:
                tokens, counts, named, rest = drawn.landed(tokens)
            else:
                tokens, rest = tokens[:rows], tokens[rows:]
            if work.drafts:
                drafts, drafters = rest[: rows * work.drafts].copy(), rest[rows * work.drafts :].astype(np.uint8)
            bad: I32 = EMPTY_I32
            if rows and int(tokens.min()) < 0:
                wrong = np.flatnonzero(tokens < 0).astype(np.int32)
                bad = wrong if not len(counts) else np.searchsorted(np.cumsum(counts), wrong, side="right").astype(np.int32)
                tokens[wrong] = 0
            return StepDone(
                engine=work.engine,
                epoch=work.epoch,
                step=work.step,
                slots=work.slots,
                tokens=tokens,
                started_ns=started,
                finished_ns=time.monotonic_ns(),
                logprobs=None if told is None else told.columns(landing, named),
                prompt_logprobs=_joined([part.columns(landing) for part in prompt]) if len(work.prompt_rows) else None,
                bad_rows=bad,
                counts=counts,
                drafts=drafts,
                drafters=drafters,
                draft_ns=0 if drafting is None else max(1, int(drafting[0].elapsed_time(drafting[1]) * 1e6)),
            )

        return wait

    def _verify(self, work: Sample, launched: _Launched, drawn: _Drawn, landing: Landing) -> tuple[Wanted | None, Tensor]:
        """Draw at every position of the rows, keep what a draw one by one would have brought, and put new drafts behind. The second is where each row began."""
        ops = self._ops
        sent = self._draws.send(drawn.at, drawn.slots, drawn.places, work.slots, drawn.begins, drawn.bounds)
        at, slots, positions, row_slots, row_positions, bounds = sent
        if len(drawn.loose):
            ops.find_ends(slots, positions, self._lens)
            ops.find_ends(row_slots, row_positions, self._lens)
        assert launched.hidden is not None
        hidden = ops.take_rows(launched.hidden, at)
        logits = self._logits(hidden)
        mask = drawn.masks(work) if len(work.mask_rows) else None
        loose = drawn.loose[drawn.row] if len(drawn.loose) else drawn.loose
        tokens, found = self.sampler.sample(logits, drawn.slots, drawn.positions, slots, positions, landing, mask, drawn.ahead, loose)
        if self._tree is None:
            counts, kept = ops.verify(tokens, row_slots, row_positions, bounds, self.history, 1 + work.lookahead)
            at_end = bounds[:-1] + counts - 1
        else:
            counts, kept, at_end = self._walk(work, launched, tokens, row_slots, row_positions, bounds)
        self.sampler.settle(kept)
        results, ends = [kept, counts], row_positions + counts
        self._extend(row_slots, ends)
        if work.drafts:
            results += self._draft(work, launched, row_slots, row_positions, ends, ops.take_rows(hidden, at_end))
        landing.bring(torch.cat(results))
        return found, row_positions

    def _walk(
        self, work: Sample, launched: _Launched, tokens: Tensor, slots: Tensor, positions: Tensor, bounds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a row's tree came to: (counts, kept, the draws that the ways end with). Afterwards the step looks as if its drafts had been a chain."""
        assert self._tree is not None
        walked = self._tree.walk(tokens, slots, positions, bounds, self.history)
        before = launched.asked or launched.work
        last = self._tree.straighten(walked, slots, positions, bounds, self.table, self._model.attention, self._own_pool)
        if self._looked_at and launched.columns is not None:
            flat, streams = launched.asked is not None, launched.streams
            taps = launched.taps if streams is None else [streams.flatten(1)]
            line = self._tree.line(before, work.rows, walked.sources, flat, taps, launched.states, self.history, self.table)
            launched.asked, launched.columns, launched.taps, launched.states = line
            if streams is not None:
                launched.taps, launched.streams = (), line.taps[0].view(-1, *streams.shape[1:])
        return walked.counts, walked.kept, last

    def _extend(self, slots: Tensor, ends: Tensor) -> None:
        """These are the lengths of the slots' histories, behind which no drafts stand."""
        self._ops.write_tokens(slots, self._zeros[: len(slots)], ends, self._lens.view(-1, 1))
        if self._lane.direct:
            self._stand[slots.numpy()] = 0

    def _draft(self, work: Sample, launched: _Launched, slots: Tensor, begins: Tensor, ends: Tensor, hidden: Tensor) -> list[Tensor]:
        """New drafts behind the histories, flat; and, where several drafters are asked, whose they are. `begins`: where each row's draws began."""
        begin, end = self._draft_bounds[self.counters.steps % len(self._draft_bounds)]
        begin.record()
        made = self._drafts(work, launched, slots, begins, ends, hidden)
        end.record()
        if self._lane.direct:
            self._stand[work.slots] = (made[0].view(len(work.rows), work.drafts) >= 0).sum(1).numpy()
        return made

    def _drafts(self, work: Sample, launched: _Launched, slots: Tensor, begins: Tensor, ends: Tensor, hidden: Tensor) -> list[Tensor]:
        shape, device = (len(work.rows), work.drafts), self._lane.device
        drafts = torch.full(shape, -1, dtype=torch.int32, device=device)
        first, hot = True, self.sampler.hot(work.slots)
        read = None if self._read is None else np.flatnonzero(self._read[work.rows])
        asked = [drafter for index, drafter in enumerate(self._drafters) if work.drafters >> index & 1]
        if read is None and len(self._drafters) == 1 and asked and asked[0].max_lookahead >= work.drafts:
            proposal = Proposal(work.rows, work.slots, slots, begins, ends, hidden, self._guess(hot), hot, True)
            asked[0].propose(self._seen(launched, asked[0], proposal), drafts)
            self._ops.put_drafts(drafts, slots, ends, self.history, self.facts.vocab_size)
            return [drafts.view(-1)]
        whose = torch.zeros(shape[0], dtype=torch.int32, device=device)
        for index, drafter in enumerate(self._drafters):
            if not work.drafters >> index & 1:
                continue
            idle = self._lane.direct and not first and bool((drafts[:, 0] >= 0).all())
            if idle and not drafter.page_bytes:  # one with layers keeps up with what it may be asked about later
                continue
            some = read if drafter in self._readers else None
            if some is not None and not some.size:  # nobody of those that it reads draws; it may see their prompts
                if self._seen_by and (drafter in self._following or len(launched.work.slots) > launched.work.num_decode):
                    drafter.observe(self._seen(launched, drafter, None))
                continue
            width = min(work.drafts, drafter.max_lookahead)
            mine = torch.full((shape[0], width), -1, dtype=torch.int32, device=device)
            proposal = Proposal(work.rows, work.slots, slots, begins, ends, hidden, self._guess(hot), hot, first)
            if some is None:
                drafter.propose(self._seen(launched, drafter, proposal), mine)
            else:
                at = self._to_device(some.astype(np.int32)).long()
                its_own = replace(proposal, rows=work.rows[some], host_slots=work.slots[some], slots=slots[at], begins=begins[at])
                proposal = replace(its_own, ends=ends[at], hidden=hidden[at])
                its = mine[at]
                drafter.propose(self._seen(launched, drafter, proposal), its)
                mine[at] = its
            lacking = (drafts[:, 0] < 0) & (mine[:, 0] >= 0) & (mine[:, 0] < self.facts.vocab_size)
            drafts[:, :width] = torch.where(lacking[:, None], mine, drafts[:, :width])
            whose.masked_fill_(lacking, index)
            first = False
        self._ops.put_drafts(drafts, slots, ends, self.history, self.facts.vocab_size)
        return [drafts.view(-1), whose]

    def _guess(self, hot: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda logits, slots, positions: self.sampler.draw(logits, slots, positions, hot)

    def _warm_drafters(self, progress: Callable[[str], None], limit_s: float) -> None:
        """Graphs of drafters' own steps, few rows first; the others when they are used."""
        started = time.monotonic()
        none = [torch.zeros(0, self.facts.hidden_size, dtype=self._torch_dtype, device=self._lane.device)] * len(self._taps)
        nobody = _Launched(
            Forward(engine=0, epoch=0, step=0, slots=EMPTY_I32, starts=EMPTY_I32, counts=EMPTY_I32, num_decode=0),
            0,
            None,
            None,
            EMPTY_I32,
            none,
        )
        for drafter in self._drafters:
            for rows in WARM_DRAFTS:
                if rows > self.max_num_seqs or time.monotonic() - started > limit_s:
                    break
                progress(f"capturing graphs of the drafter ({drafter.name})")
                slots = torch.full((rows,), -1, dtype=torch.int32, device=self._lane.device)
                hidden = torch.zeros(rows, self.facts.hidden_size, dtype=self._torch_dtype, device=self._lane.device)
                for hot in (False, True):
                    nobodies = self._range[:rows], i32([-1] * rows)
                    proposal = Proposal(*nobodies, slots, slots + 2, slots + 3, hidden, self._guess(hot), hot, True)
                    drafter.warm(self._seen(nobody, drafter, proposal), rows, min(2, drafter.max_lookahead))

    def _observe(self, launched: _Launched, every: Sequence[int], asked: int) -> None:
        """Let these drafters see a step, but those that were `asked` (bits) for drafts behind it."""
        for index in every:
            if not asked >> index & 1:
                drafter = self._drafters[index]
                drafter.observe(self._seen(launched, drafter, None))

    def _seen(self, launched: _Launched, drafter: Drafter, proposal: Proposal | None) -> Seen:
        taps, joined, columns = launched.taps, None, launched.columns
        if launched.streams is not None and drafter.taps == self._taps and drafter in self._following:
            taps, joined = (), launched.streams.flatten(1)
        else:
            taps = taps or (launched.streams.unbind(1) if launched.streams is not None else ())
            taps = [taps[self._taps.index(tap)] for tap in drafter.taps] if taps else []
            # A program may have kept what another drafter looks at, and not the taps.
            columns = columns if len(taps) == len(drafter.taps) else None
        work, read = launched.asked or launched.work, self._read
        return Seen(work, taps, launched.states, columns, self.history, self.table, proposal, read, joined)

    def _sent_rows(self, work: Sample, loose: Column) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, slots and positions on the device."""
        begins = np.where(loose, np.int32(-2), work.positions) if len(loose) else work.positions
        rows, slots, positions = self._draws.send(work.rows, work.slots, begins)
        if len(loose):
            self._ops.find_ends(slots, positions, self._lens)
        return rows, slots, positions

    def _logits_for(self, work: Sample, launched: _Launched, loose: Column) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the rows that draw, their slots and positions on the device."""
        rows, hidden = len(work.rows), launched.hidden
        assert hidden is not None
        row_at, slots, positions = self._sent_rows(work, loose)
        if rows != hidden.shape[0] or work.rows.tobytes() != self._range[:rows].tobytes():
            hidden = self._ops.take_rows(hidden, row_at)
        return self._logits(hidden), slots, positions

    def _logits(self, hidden: Tensor) -> Tensor:
        if not self._lane.direct:
            return self._model.logits(hidden)
        rows = len(hidden)
        if self._kept_logits.shape[0] < rows:  # memory that is used again: fresh pages would be paid for by every step
            self._kept_logits = torch.empty(rows, self.facts.vocab_size)
        return self._model.logits(hidden, self._kept_logits[:rows])

    def _follows(self, work: Sample, before: Forward) -> bool:
        """Does each row of a decode step draw for itself, at the position after it."""
        count = len(before.slots)
        return (
            len(work.rows) == count
            and np.array_equal(work.rows, self._range[:count])
            and (work.slots is before.slots or np.array_equal(work.slots, before.slots))
            and np.array_equal(work.positions, before.starts + 1)
        )

    def _prompt_logprobs(self, work: Sample, launched: _Launched, landing: Landing) -> list[Wanted]:
        """Log-probabilities of the prompt tokens that the last Forward's rows predict, a bounded number of logits at a time."""
        last = launched.asked or launched.work
        chunk = max(1, (DIRECT_LOGIT_ELEMENTS if self._lane.direct else PROMPT_LOGIT_ELEMENTS) // self.facts.vocab_size)
        parts: list[Wanted] = []
        for index, (row, k) in enumerate(zip(work.prompt_rows.tolist(), work.prompt_topk.tolist(), strict=True)):
            slot, start, count = int(last.slots[row]), int(last.starts[row]), int(last.counts[row])
            count = min(count, int(self.sampler.prompt_len[slot]) - 1 - start)
            for first in range(0, count, chunk):
                size = min(chunk, count - first)
                hidden = self._hidden_of(launched, row, first, size)
                at = start + first + 1
                chosen = self.history[slot, at : at + size]
                wants, named = np.full(size, k, np.int32), np.full(size, index, np.int32)
                positions = self._range[:size] + at
                parts.append(self.sampler.wanted(self._model.logits(hidden), chosen, named, positions.astype(np.int32), wants, landing))
        return parts

    def _hidden_of(self, launched: _Launched, row: int, first: int, count: int) -> Tensor:
        """Normalised hidden states of `count` tokens of a sequence in the step, from its token `first` on."""
        work = launched.asked or launched.work
        if launched.whole is None:
            assert launched.hidden is not None
            if int(work.counts[row]) == 1:
                return launched.hidden[launched.first[row] :][:1].clone()
            if row not in work.prompt_rows:
                raise EngineFailure(f"A Sample asks for prompt log-probabilities of row {row}, of which its Forward did not say so.")
            before = work.prompt_rows[: int(np.flatnonzero(work.prompt_rows == row)[0])]
            drawn = int(work.counts[: work.num_decode].sum()) + len(work.slots) - work.num_decode
            at = drawn + int(work.counts[before].sum()) + first
            return launched.hidden[at : at + count]
        x, residual = launched.whole
        at = int(work.counts[:row].sum()) + first
        return self._model.final(self._ops, x[at : at + count].clone(), residual[at : at + count].clone())

    def _account(self, begin: Event, end: Event) -> None:
        self.counters.busy_ns += int(begin.elapsed_time(end) * 1e6)
        if self._last_end is not None:
            self.counters.idle_ns += max(0, int(self._last_end.elapsed_time(begin) * 1e6))
        self._last_end = end

    def _to_device(self, values: Column) -> Tensor:
        """A small column with memory of its own (rare: lists, log-probabilities, penalties)."""
        pinned = self._lane.pinned(values.size)
        pinned.numpy()[:] = values
        return pinned.to(self._lane.device, non_blocking=True)

    # ------------------------------------------------------------------ between steps

    @torch.inference_mode()
    def move(self, work: Move) -> Callable[[], None]:
        """See Runner.move: whole pages between the pool and the host memory that the control "host_pages" took."""
        self._lane.bind()
        return self._host_pages.move(self._pool, work.blocks, work.pages, out=work.out).synchronize

    def control(self, work: Control) -> bytes:
        """See Runner.control. "host_pages": have so many (decimal digits) pages of host memory; the answer is their bytes."""
        if work.name != "host_pages":
            raise UnsupportedFeature(f"This runner does not know the control {work.name!r}. Known: host_pages.", param=work.name)
        if not work.data.isdigit():
            raise InvalidRequest(f"host_pages takes a number in decimal digits, not {work.data[:20]!r}.", param="host_pages")
        self._lane.synchronize()  # moves under way may still read what goes
        return str(self._host_pages.take(int(work.data), self._pool.nbytes // self.num_blocks)).encode()

    # ------------------------------------------------------------------ life

    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Compile and touch what a first request would pay for, capture graphs; then, if asked for, the deterministic self-test."""
        from penstock.plugins.devices.self_test import self_test, touch

        if not self._lane.direct:
            progress("warming up: kernels")
            for rows, tokens in WARM_SHAPES:
                if rows <= self.max_num_seqs and tokens <= self.max_num_batched_tokens:
                    self.exercise(rows, tokens)
        touch(self, progress)
        with torch.inference_mode():
            self._lane.bind()
            self.capture_all(progress)
        self._lane.synchronize()
        if self.deterministic:
            self_test(self, progress, self._model.attention.seam(self.table.shape[1] * self.block_size))
        self.counters = Counters()
        self._last_end = None

    @torch.inference_mode()
    def compile_ahead(self) -> None:
        """Compile what serving needs, side by side: one kernel after the other takes most of a first start. Whatever is missed here is compiled
        when it is first launched."""
        self._lane.bind()
        whole, self._model = self._model, self._model.brief()
        try:
            with self._ops.compile_only():
                self._every_launch()
        finally:
            self._model = whole
        self._lane.synchronize()

    def _every_launch(self) -> None:
        """On padding, which leaves no trace."""
        for rows, tokens in WARM_SHAPES:
            if rows <= self.max_num_seqs and tokens <= self.max_num_batched_tokens:
                self._step_on_padding(rows, tokens)
                if self._tree is not None:
                    self._step_on_padding(rows, tokens, tree=True)
        if self._mixed_rows:
            self._send_mixed(EMPTY_I32, EMPTY_I32, EMPTY_I32)
            self._mixed_body(self._mixed_rows[-1], self._mixed_tokens[-1])
        for bucket in self._buckets:
            self._send_decode()
            hidden, positions, *_ = self._decode_body(bucket)
            for hot in (False, True):
                self._sample_body(bucket, hot, hidden, positions)
        none = torch.full((1,), -1, dtype=torch.int32, device=self._lane.device)
        self._ops.place(self.history, self.table, none, none, none, none)
        self._ops.set_blocks(self.table, none, none, none)
        if self.lookahead:
            self._ops.find_ends(none, none.clone(), self._lens)
            self._extend(none, none)
        self._model.attention.copy(self._pool, none, none)
        self.sampler.adjust_nobody(none)
        for width in (1, 3, 7, 15, 31, 63):  # a kernel for each power of two
            if width < 2 * self.lookahead:
                bounds = torch.arange(2, dtype=torch.int32, device=none.device)
                self._ops.verify(none, none, none, bounds, self.history, 1 + width)
                drafts = torch.full((1, width), -1, dtype=torch.int32, device=none.device)
                self._ops.put_drafts(drafts, none, none, self.history, self.facts.vocab_size)
        if self._tree is not None:
            self._tree.touch(self.history, self.table, self._model.attention, self._own_pool)

    @torch.inference_mode()
    def exercise(self, rows: int, tokens: int) -> None:
        """An eager step on padding rows alone, with a draw. Then waits. The largest one needs the most workspace."""
        self._lane.bind()
        self._step_on_padding(rows, tokens)
        self._lane.synchronize()

    def _step_on_padding(self, rows: int, tokens: int, *, tree: bool = False) -> None:
        rows = min(rows, tokens)
        counts = np.full(rows, tokens // rows, np.int32)
        counts[0] += tokens - int(counts.sum())
        q_start = np.zeros(rows + 1, np.int32)
        np.cumsum(counts, out=q_start[1:])
        sent = self._columns.send(i32([-1] * rows), np.zeros(rows, np.int32), q_start, q_start[1:] - 1)
        if rows == tokens:
            columns = self._ops.decode_inputs(sent[0], sent[1], self.history, self.table, self.block_size)
        else:
            columns = self._ops.ragged_inputs(sent[0], sent[1], sent[2], self.history, self.table, self.block_size, tokens, rows // 2)
        if tree and self._tree is not None:
            columns = self._tree.columns(columns, torch.zeros_like(columns.positions))
        x, residual, _ = self._model.step(self._ops, self._caches, columns)
        hidden = self._model.final(self._ops, self._ops.take_rows(x, sent[3]), self._ops.take_rows(residual, sent[3]))
        logits = self._model.logits(hidden)
        raw = logits.clone()  # as where log-probabilities are wanted
        drawn = self.sampler.draw(logits, sent[0], sent[1], True)
        self._ops.write_tokens(sent[0], sent[1], drawn, self.history)
        del raw

    def close(self) -> None:
        """Wait for the device and let go of everything."""
        self._lane.bind()
        self._lane.synchronize()
        self._forwards.clear()
        self._samples.clear()
        self._masked.clear()
        self._masked_uses.clear()
        self._mixed.clear()
        self._launched = None


def _bound(body: Callable[..., Outputs], *given: object) -> Callable[[], Outputs]:
    return lambda: body(*given)


def _tokens_of(work: Forward) -> I32:
    """Token rows of the step that belong to its prompt_rows, one of these after the other."""
    ends = np.cumsum(work.counts)
    found = [np.arange(ends[row] - work.counts[row], ends[row], dtype=np.int32) for row in work.prompt_rows.tolist()]
    return np.concatenate(found)


def _flat(work: Forward) -> tuple[Forward, I32]:
    """The step with a row for each token of a decode row, which attention can split over its keys as it does any other; and _Launched.first for the rows as they were.
    Each sees what lies before it, since all keys and values are written before any is read; none sees a draft that comes behind it."""
    decode, rows = work.num_decode, len(work.slots)
    counts, first = work.counts[:decode], np.zeros(rows, np.int32)
    flat = int(counts.sum())
    np.cumsum(counts[:-1], out=first[1:decode])
    first[decode:] = np.arange(flat, flat + rows - decode)
    within = np.arange(flat, dtype=np.int32) - np.repeat(first[:decode], counts)
    changed = msgspec.structs.replace(
        work,
        slots=np.concatenate([np.repeat(work.slots[:decode], counts), work.slots[decode:]]),
        starts=np.concatenate([np.repeat(work.starts[:decode], counts) + within, work.starts[decode:]]),
        counts=np.concatenate([np.ones(flat, np.int32), work.counts[decode:]]),
        num_decode=flat,
        prompt_rows=first[work.prompt_rows],
    )
    return changed, first


def _unbound(work: Forward, asked: Forward) -> Forward:
    """The step with starts that loose rows count from the ends of their histories (DeviceOps.find_ends). `work` may have a row for each token of `asked`'s."""
    decode, loose = asked.num_decode, asked.loose > 0
    within = np.zeros(work.num_decode, np.int32)
    if work is not asked:
        each = np.repeat(np.arange(decode), asked.counts[:decode])
        within = work.starts[: work.num_decode] - asked.starts[each]
        loose = np.concatenate([loose[each], loose[decode:]])
    starts = work.starts.copy()
    starts[: work.num_decode] = np.where(loose[: work.num_decode], -1 - within, starts[: work.num_decode])
    return msgspec.structs.replace(work, starts=starts)


def _kept_of(work: Forward, q_start: I32, steps: I32) -> tuple[I32, I32]:
    """Token rows that may be drawn from: of decode rows all, of others the last; and for each row which of these is its first."""
    decode, drawn = work.num_decode, int(q_start[work.num_decode])
    if drawn == decode:
        return q_start[1:] - 1, steps[: len(work.slots)]
    kept = np.concatenate([steps[:drawn], q_start[decode + 1 :] - 1])
    return kept, np.concatenate([q_start[:decode], steps[drawn : len(kept)]])


@dataclass(frozen=True)
class _Drawn:
    """The draws of a step with drafts, flat: row r has those from bounds[r] to bounds[r + 1]."""

    bounds: I32
    row: I32
    ahead: I32
    """How many drafts of its row each has before it."""
    at: I32
    """Rows of _Launched.hidden."""
    slots: I32
    positions: I32
    """The last that they can be, where rows are loose."""
    places: I32
    """The same for the device: see DeviceOps.find_ends."""
    begins: I32
    """Of rows."""
    loose: Column
    """Of rows; empty: none is."""

    @staticmethod
    def of(work: Sample, before: Forward, first: I32, loose: Column = EMPTY_U8) -> _Drawn:
        """`first`: see _Launched. Raises EngineFailure for rows that draw where nothing was computed."""
        rows = work.rows
        ends = before.starts[rows] + before.counts[rows]
        widths = ends - work.positions + 1
        offset = np.where(rows < before.num_decode, work.positions - 1 - before.starts[rows], 0)
        if int(widths.min()) < 1 or int(offset.min()) < 0 or bool((widths[rows >= before.num_decode] > 1).any()):
            raise EngineFailure("A Sample names positions of which its Forward computed nothing.")
        if len(work.mask_rows) > len(rows):  # a row ends where it is not known what may follow
            unknown = work.mask_rows.reshape(len(rows), -1) < -1
            widths = np.minimum(widths, np.where(unknown.any(1), unknown.argmax(1), unknown.shape[1])).astype(np.int32)
        bounds = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(widths, out=bounds[1:])
        row = np.repeat(np.arange(len(rows), dtype=np.int32), widths)
        ahead = np.arange(len(row), dtype=np.int32) - bounds[row]
        at = (first[rows] + offset)[row] + ahead
        positions = (work.positions[row] + ahead).astype(np.int32)
        places, begins = positions, work.positions
        if len(loose):
            places = np.where(loose[row], -2 - ahead, positions).astype(np.int32)
            begins = np.where(loose, np.int32(-2), begins)
        return _Drawn(bounds, row, ahead, at.astype(np.int32), work.slots[row], positions, places, begins, loose)

    def masks(self, work: Sample) -> tuple[Column, Column]:
        """Sample.mask, and its row for each draw."""
        if len(work.mask_rows) > len(work.rows):
            return work.mask, work.mask_rows.reshape(len(work.rows), -1)[self.row, self.ahead].astype(np.int32)
        return work.mask, np.where(self.ahead == 0, work.mask_rows[self.row], -1).astype(np.int32)

    def landed(self, words: I32) -> tuple[I32, I32, I32, I32]:
        """(tokens, counts, the index of each draw among the tokens, what comes behind) of what `_verify` brought."""
        drawn, rows = len(self.row), len(self.bounds) - 1
        counts = words[drawn : drawn + rows]
        # Along a tree a row's own are those that have a token, and its first, which may be a bad one.
        left = (words[:drawn] >= 0) | (self.ahead == 0)
        named = np.where(left, np.cumsum(left) - 1, -1).astype(np.int32)
        return words[:drawn][left], counts.copy(), named, words[drawn + rows :]


def _joined(parts: list[LogprobColumns]) -> LogprobColumns:
    if not parts:
        return LogprobColumns()
    fields = ("rows", "positions", "counts", "ranks", "ids", "values")
    return LogprobColumns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})
