"""The KV manager: who holds which block of the KV cache.

What it is: a pure actor over paged blocks: reference counts, a prefix cache keyed by hash chains (core/protocol/hashing.py), least-recently-used
eviction of blocks that nobody references, fork with copy-on-write of the partial last block, exact counters, and an invariant that is
checked after every step (free + cached + referenced + quarantined = total). A block that breaks the invariant is taken out of service
and counted; the server goes on.
What it does not know: the device's memory, token positions in flight, scheduling. When a block's holder may let it go is the scheduler's
business; here a release is final.

A block is in exactly one state: free (no content), cached (content under a hash, no references), referenced (held by >= 1 sequences, with
or without a hash) or quarantined. Sequences release their blocks last first, and a sequence that holds a block holds all blocks before
it, so that the eviction order always takes the later blocks of a chain before the earlier ones.
A little over 400 lines, because the invariants and what checks them belong beside what could break them.
Copy-on-write as in PagedAttention (Kwon et al., 2023); hash chains as in prefix caching of vLLM and radix trees of SGLang, in one dict.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from penstock.core.protocol.columns import EMPTY_I32, EMPTY_I64, EMPTY_U8, Column, i32, i64, u8
from penstock.core.protocol.hashing import HASH_BYTES, next_hash
from penstock.core.protocol.messages import KvGrant, KvStep, Message

DENIED, GRANTED = 0, 1
DEFERRED = -1
"""In KvGrant.lookup_cached: the next block is being computed by another sequence."""


class _Table:
    """What one sequence holds. `chain`: hashes of its blocks as far as known; the first `hashed` of them are registered."""

    __slots__ = ("blocks", "chain", "hashed", "incarnation", "root")

    def __init__(self, incarnation: int, root: bytes, chain: list[bytes]) -> None:
        self.incarnation = incarnation
        self.root = root
        self.chain = chain
        self.hashed = 0
        self.blocks: list[int] = []


class _Rows:
    """The grant's block rows while they are collected."""

    __slots__ = ("ids", "index", "seqs")

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.index: list[int] = []
        self.ids: list[int] = []

    def add(self, seq: int, first: int, blocks: list[int]) -> None:
        self.seqs += [seq] * len(blocks)
        self.index += range(first, first + len(blocks))
        self.ids += blocks


class KvManager:
    """Takes KvStep, gives KvGrant. Blocks are numbered 0..num_blocks-1 and hold `block_size` tokens each."""

    name = "kv"
    takes: frozenset[type[Message]] = frozenset({KvStep})
    gives: frozenset[type[Message]] = frozenset({KvGrant})

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a KV pool needs at least one block of at least one token")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._lru: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._pending: dict[bytes, int] = {}
        """Hashes of prompt blocks that are reserved but not yet given to the device -> the sequence that will compute them."""
        self._tables: dict[int, _Table] = {}
        self._referenced = 0
        self._quarantined: set[int] = set()
        self.prefix_queries = 0
        """Tokens looked up, once per request."""
        self.prefix_hits = 0
        """Tokens found, once per request."""

    # -------------------------------------------------------------- the message

    def handle(self, message: Message) -> Iterable[Message]:
        assert isinstance(message, KvStep)
        return (self.step(message),)

    def step(self, work: KvStep) -> KvGrant:
        rows = _Rows()
        if work.commit_seqs.size:
            self._commit_rows(work)
        if work.release_seqs.size:
            drops = work.release_drop.tolist() or [0] * work.release_seqs.size
            for seq, incarnation, drop in zip(work.release_seqs.tolist(), work.release_incarnations.tolist(), drops, strict=True):
                self._release(seq, incarnation, bool(drop))
        forked = EMPTY_U8
        copy_src: list[int] = []
        copy_dst: list[int] = []
        if work.fork_dst.size:
            forked = u8(
                [
                    self._fork(src, dst, length, rows, copy_src, copy_dst)
                    for src, dst, length in zip(work.fork_src.tolist(), work.fork_dst.tolist(), work.fork_lens.tolist(), strict=True)
                ]
            )
        granted = EMPTY_U8
        cached = EMPTY_I32
        if work.lookup_seqs.size:
            granted, cached = self._reserve_with_lookups(work, rows)
        elif work.reserve_seqs.size:
            granted = u8(
                [
                    self._reserve(seq, length, rows)
                    for seq, length in zip(work.reserve_seqs.tolist(), work.reserve_lens.tolist(), strict=True)
                ]
            )
        if len(self._free) + len(self._lru) + self._referenced + len(self._quarantined) != self.num_blocks:
            self._repair()
        return KvGrant(
            step=work.step,
            granted=granted,
            forked=forked,
            lookup_cached=cached,
            block_seqs=i64(rows.seqs) if rows.seqs else EMPTY_I64,
            block_index=i32(rows.index) if rows.index else EMPTY_I32,
            block_ids=i32(rows.ids) if rows.ids else EMPTY_I32,
            copy_src=i32(copy_src) if copy_src else EMPTY_I32,
            copy_dst=i32(copy_dst) if copy_dst else EMPTY_I32,
            free_blocks=len(self._free),
            cached_blocks=len(self._lru),
            total_blocks=self.num_blocks,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            quarantined=len(self._quarantined),
        )

    # -------------------------------------------------------------- blocks

    def _available(self) -> int:
        return len(self._free) + len(self._lru)

    def _take(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller has made sure that they are there. Oldest cached ones go last."""
        free, refs = self._free, self._refs
        blocks: list[int] = []
        for _ in range(count):
            if free:
                block = free.pop()
            else:
                block, _none = self._lru.popitem(last=False)
                key = self._hash_of[block]
                if key is not None:
                    del self._by_hash[key]
                    self._hash_of[block] = None
            refs[block] = 1
            blocks.append(block)
        self._referenced += count
        return blocks

    def _share(self, blocks: list[int]) -> None:
        refs, lru = self._refs, self._lru
        for block in blocks:
            if refs[block] == 0:
                del lru[block]
                self._referenced += 1
            refs[block] += 1

    def _unref(self, block: int) -> None:
        refs = self._refs[block]
        if block in self._quarantined:
            self._refs[block] = max(0, refs - 1)
        elif refs <= 0:  # released more often than taken: it may be in use elsewhere, so nobody gets it again
            self._quarantine(block)
        else:
            self._refs[block] = refs - 1
            if refs == 1:
                self._referenced -= 1
                if self._hash_of[block] is not None:
                    self._lru[block] = None
                else:
                    self._free.append(block)

    def _forget(self, block: int) -> None:
        """Its content can no longer be found."""
        key = self._hash_of[block]
        if key is not None:
            self._hash_of[block] = None
            del self._by_hash[key]
            if block in self._lru:
                del self._lru[block]
                self._free.append(block)

    # -------------------------------------------------------------- commit, release, fork

    def _commit_rows(self, work: KvStep) -> None:
        at = 0
        data = work.commit_tokens.astype("<i4", copy=False).tobytes() if work.commit_tokens.size else b""
        counts = work.commit_counts.tolist() or [0] * work.commit_seqs.size
        for seq, length, count in zip(work.commit_seqs.tolist(), work.commit_lens.tolist(), counts, strict=True):
            table = self._tables.get(seq)
            if table is not None and self.caching:
                self._commit(seq, table, length, data[4 * at : 4 * (at + count)])
            at += count

    def _commit(self, seq: int, table: _Table, length: int, tokens: bytes) -> None:
        """Register the blocks that `length` completes. `tokens` belong to the last of them, as far as their hashes are not known yet."""
        width = 4 * self.block_size
        last = min(length // self.block_size, len(table.blocks))
        told = last - len(tokens) // width
        chain = table.chain
        for index in range(table.hashed, last):
            if index < len(chain):
                key = chain[index]
            elif index >= told:
                start = (index - told) * width
                key = next_hash(chain[-1] if chain else table.root, tokens[start : start + width])
                chain.append(key)
            else:  # a gap: what follows cannot be named
                return
            table.hashed = index + 1
            block = table.blocks[index]
            if key not in self._by_hash and self._hash_of[block] is None and block not in self._quarantined:
                self._by_hash[key] = block
                self._hash_of[block] = key
            if self._pending.get(key) == seq:
                del self._pending[key]

    def _release(self, seq: int, incarnation: int, drop: bool) -> None:
        table = self._tables.get(seq)
        if table is None or table.incarnation != incarnation:
            return
        del self._tables[seq]
        if self._pending:
            for key in table.chain[table.hashed :]:
                if self._pending.get(key) == seq:
                    del self._pending[key]
        for block in reversed(table.blocks):
            if drop:
                self._forget(block)
            self._unref(block)

    def _fork(self, src: int, dst: int, length: int, rows: _Rows, copy_src: list[int], copy_dst: list[int]) -> int:
        parent = self._tables.get(src)
        full, rest = divmod(length, self.block_size)
        if parent is not None and dst in self._tables:
            return self._branch(parent, dst, self._tables[dst], full, bool(rest), rows, copy_src, copy_dst)
        if parent is None or len(parent.blocks) < full + bool(rest) or (rest and not self._available()):
            return DENIED
        child = _Table(parent.incarnation, parent.root, parent.chain[:full])
        child.hashed = min(parent.hashed, full)
        child.blocks = parent.blocks[:full]
        self._share(child.blocks)
        if rest:
            own = self._take(1)
            copy_src.append(parent.blocks[full])
            copy_dst += own
            child.blocks += own
        self._tables[dst] = child
        rows.add(dst, 0, child.blocks)
        return GRANTED

    def _branch(
        self, parent: _Table, dst: int, child: _Table, full: int, rest: bool, rows: _Rows, copy_src: list[int], copy_dst: list[int]
    ) -> int:
        """A fork into a sequence that has blocks, as long as its parent's: beams of one search. What it had where they differ goes back, its own last
        block takes the copy: it costs nothing."""
        count = full + rest
        mine, theirs = child.blocks, parent.blocks
        if child.incarnation != parent.incarnation or len(mine) < count or len(theirs) < count or (rest and self._refs[mine[full]] != 1):
            return DENIED
        first = full
        while first and mine[first - 1] != theirs[first - 1]:  # they never meet again behind where they part
            first -= 1
        self._share(theirs[first:full])
        for block in reversed(mine[first:full]):
            self._unref(block)
        mine[first:full] = theirs[first:full]
        child.chain = parent.chain[:full]
        child.hashed = min(parent.hashed, full)
        rows.add(dst, first, mine[first:full])
        if rest:
            copy_src.append(theirs[full])
            copy_dst.append(mine[full])
        return GRANTED

    # -------------------------------------------------------------- reserve and look-up

    def _reserve(self, seq: int, length: int, rows: _Rows) -> int:
        table = self._tables.get(seq)
        if table is None:
            return DENIED
        held = len(table.blocks)
        need = -(-length // self.block_size) - held
        if need > 0:
            if need > self._available():
                return DENIED
            blocks = self._take(need)
            table.blocks += blocks
            rows.add(seq, held, blocks)
        return GRANTED

    def _reserve_with_lookups(self, work: KvStep, rows: _Rows) -> tuple[Column, Column]:
        """Reserve rows, of which the last belong to looked-up sequences (in the same order)."""
        at = 0
        asked: dict[int, tuple[int, int, int, bytes, list[bytes], bool]] = {}
        again = work.lookup_again.tolist() or [0] * work.lookup_seqs.size
        for i, (seq, incarnation, most, count, seen) in enumerate(
            zip(
                work.lookup_seqs.tolist(),
                work.lookup_incarnations.tolist(),
                work.lookup_max.tolist(),
                work.lookup_counts.tolist(),
                again,
                strict=True,
            )
        ):
            hashes = work.lookup_hashes[at : at + count * HASH_BYTES]
            chain = [hashes[j : j + HASH_BYTES] for j in range(0, len(hashes), HASH_BYTES)] if self.caching else []
            asked[seq] = (i, incarnation, most, work.lookup_roots[i * HASH_BYTES : (i + 1) * HASH_BYTES], chain, bool(seen))
            at += count * HASH_BYTES
        granted: list[int] = []
        cached = [0] * len(asked)
        full = False
        for seq, length in zip(work.reserve_seqs.tolist(), work.reserve_lens.tolist(), strict=True):
            entry = asked.get(seq)
            if entry is None:
                granted.append(self._reserve(seq, length, rows))
                continue
            i, incarnation, most, root, chain, seen = entry
            if full:
                granted.append(DENIED)
                continue
            good, cached[i] = self._enter(seq, incarnation, root, chain, most, length, seen, work.keep_free, rows)
            granted.append(good)
            full = good == DENIED and cached[i] != DEFERRED
        return u8(granted), i32(cached)

    def _enter(
        self, seq: int, incarnation: int, root: bytes, chain: list[bytes], most: int, length: int, seen: bool, keep: int, rows: _Rows
    ) -> tuple[int, int]:
        """A new sequence with blocks for `length` tokens: granted or not, and tokens found in the cache (or DEFERRED)."""
        if seq in self._tables:  # its earlier life was not released yet
            return DENIED, 0
        usable = min(most // self.block_size, len(chain))
        found: list[int] = []
        for key in chain[:usable]:
            block = self._by_hash.get(key)
            if block is None:
                break
            found.append(block)
        hits = len(found)
        if hits < usable and chain[hits] in self._pending:
            return DENIED, DEFERRED
        need = -(-length // self.block_size) - hits
        idle_hits = sum(1 for block in found if self._refs[block] == 0)
        if need + idle_hits + keep > self._available():
            return DENIED, hits * self.block_size
        table = _Table(incarnation, root, chain)
        table.hashed = hits
        self._share(found)
        table.blocks = found + self._take(need)
        self._tables[seq] = table
        for key in chain[hits:]:
            self._pending.setdefault(key, seq)
        rows.add(seq, 0, table.blocks)
        if self.caching and most > 0 and not seen:
            self.prefix_queries += most + 1
            self.prefix_hits += hits * self.block_size
        return GRANTED, hits * self.block_size

    # -------------------------------------------------------------- invariants

    def counts(self) -> tuple[int, int, int, int]:
        """(free, cached, referenced, quarantined) blocks; their sum is num_blocks."""
        return len(self._free), len(self._lru), self._referenced, len(self._quarantined)

    def blocks_of(self, seq: int) -> list[int]:
        """The blocks that a sequence holds, in order (empty: none)."""
        table = self._tables.get(seq)
        return list(table.blocks) if table is not None else []

    def _quarantine(self, block: int) -> None:
        self._quarantined.add(block)
        key = self._hash_of[block]
        if key is not None:
            self._hash_of[block] = None
            if self._by_hash.get(key) == block:
                del self._by_hash[key]
        self._lru.pop(block, None)
        if block in self._free:
            self._free = [b for b in self._free if b != block]

    def _expected_refs(self) -> list[int]:
        expected = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table.blocks:
                expected[block] += 1
        return expected

    def _repair(self) -> None:
        """The sum is wrong (a bug): find the blocks whose state contradicts itself and take them out of service."""
        expected = self._expected_refs()
        for block in range(self.num_blocks):
            if block in self._quarantined:
                continue
            states = self._free.count(block) + (block in self._lru) + (self._refs[block] > 0)
            if states != 1 or self._refs[block] != expected[block]:
                self._refs[block] = expected[block]
                self._quarantine(block)
        self._referenced = sum(1 for block in range(self.num_blocks) if self._refs[block] > 0 and block not in self._quarantined)

    def check(self) -> list[str]:
        """Every broken invariant, in words (empty: all is well). O(blocks), for tests and post-mortems."""
        wrong: list[str] = []
        expected = self._expected_refs()
        free = set(self._free)
        if len(free) != len(self._free):
            wrong.append("a block is in the free list twice")
        for block in range(self.num_blocks):
            if block in self._quarantined:
                continue
            states = [s for s, is_in in (("free", block in free), ("cached", block in self._lru), ("held", self._refs[block] > 0)) if is_in]
            if len(states) != 1:
                wrong.append(f"block {block} is in states {states}")
            if self._refs[block] != expected[block]:
                wrong.append(f"block {block} has {self._refs[block]} references, {expected[block]} sequences hold it")
            key = self._hash_of[block]
            if key is not None and self._by_hash.get(key) != block:
                wrong.append(f"block {block} has a hash that does not lead to it")
            if block in free and key is not None:
                wrong.append(f"free block {block} has a hash")
            if block in self._lru and key is None:
                wrong.append(f"cached block {block} has no hash")
        for key, block in self._by_hash.items():
            if self._hash_of[block] != key:
                wrong.append(f"a hash leads to block {block}, which does not have it")
        for seq, table in self._tables.items():
            if len(set(table.blocks)) != len(table.blocks):
                wrong.append(f"sequence {seq} holds a block twice")
        for key, seq in self._pending.items():
            owner = self._tables.get(seq)
            if owner is None or key not in owner.chain[owner.hashed :]:
                wrong.append(f"sequence {seq} is said to compute a block, but does not")
        if self._referenced != sum(1 for b in range(self.num_blocks) if self._refs[b] > 0 and b not in self._quarantined):
            wrong.append("the count of referenced blocks is wrong")
        if sum(self.counts()) != self.num_blocks:
            wrong.append(f"{self.counts()} do not add up to {self.num_blocks}")
        return wrong
