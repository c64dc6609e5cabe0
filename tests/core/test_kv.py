"""The KV manager alone: sharing, eviction, forks, counters, and what it does with a broken invariant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from penstock.core.actors.kv import KvManager
from penstock.core.protocol.columns import i32, i64, u8
from penstock.core.protocol.hashing import CacheKey, chain
from penstock.core.protocol.messages import KvGrant, KvStep

ROOT = CacheKey(weights="w", layout="l").root()
BLOCK = 4


class Pool:
    """Calls in plain Python; every answer is checked."""

    def __init__(self, blocks: int, *, caching: bool = True) -> None:
        self.kv = KvManager(blocks, BLOCK, enable_prefix_caching=caching)
        self.step = 0

    def ask(self, **columns: Any) -> KvGrant:
        self.step += 1
        (grant,) = self.kv.handle(KvStep(step=self.step, **columns))
        assert isinstance(grant, KvGrant)
        assert self.kv.check() == []
        assert grant.step == self.step
        return grant

    def enter(self, *seqs: int, tokens: list[list[int]], most: list[int] | None = None, root: bytes = ROOT, **more: Any) -> KvGrant:
        hashes = [chain(root, i32(t), BLOCK) for t in tokens]
        return self.ask(
            lookup_seqs=i64(list(seqs)),
            lookup_incarnations=i32([0] * len(seqs)),
            lookup_max=i32(most or [len(t) - 1 for t in tokens]),
            lookup_counts=i32([len(h) // 16 for h in hashes]),
            lookup_hashes=b"".join(hashes),
            lookup_roots=root * len(seqs),
            reserve_seqs=i64(list(seqs)),
            reserve_lens=i32([len(t) for t in tokens]),
            **more,
        )

    def commit(self, seq: int, length: int, tokens: list[int] | None = None) -> KvGrant:
        return self.ask(
            commit_seqs=i64([seq]), commit_lens=i32([length]), commit_counts=i32([len(tokens or [])]), commit_tokens=i32(tokens or [])
        )

    def release(self, *seqs: int, drop: bool = False) -> KvGrant:
        return self.ask(release_seqs=i64(list(seqs)), release_incarnations=i32([0] * len(seqs)), release_drop=u8([drop] * len(seqs)))

    def reserve(self, seq: int, length: int) -> bool:
        return bool(self.ask(reserve_seqs=i64([seq]), reserve_lens=i32([length])).granted[0])


TEN = list(range(10))


def test_blocks_come_and_go() -> None:
    pool = Pool(4)
    grant = pool.enter(1, tokens=[TEN])
    assert grant.granted.tolist() == [1]
    assert grant.lookup_cached.tolist() == [0]
    assert grant.block_seqs.tolist() == [1, 1, 1]
    assert grant.block_index.tolist() == [0, 1, 2]
    assert len(set(grant.block_ids.tolist())) == 3
    assert (grant.free_blocks, grant.cached_blocks, grant.total_blocks) == (1, 0, 4)
    grant = pool.ask(reserve_seqs=i64([1]), reserve_lens=i32([12]))
    assert grant.block_ids.size == 0, "the third block has room"
    assert pool.reserve(1, 13)
    assert not pool.reserve(1, 17)
    assert pool.kv.counts() == (0, 0, 4, 0)
    assert pool.release(1).free_blocks == 4


def test_a_committed_prefix_is_hit_and_shared() -> None:
    pool = Pool(8)
    first = pool.enter(1, tokens=[TEN]).block_ids.tolist()
    pool.commit(1, 10)
    grant = pool.enter(2, tokens=[[*TEN[:8], 50, 51]])
    assert grant.lookup_cached.tolist() == [8]
    assert grant.block_ids.tolist()[:2] == first[:2]
    assert grant.block_ids.tolist()[2] != first[2]
    assert (grant.prefix_queries, grant.prefix_hits) == (20, 8)
    pool.release(1)
    assert pool.kv.blocks_of(2)[:2] == first[:2]
    grant = pool.release(2)
    assert (grant.free_blocks, grant.cached_blocks) == (6, 2)
    assert pool.enter(3, tokens=[TEN]).lookup_cached.tolist() == [8]


def test_a_hit_covers_at_most_all_but_one_token() -> None:
    pool = Pool(8)
    pool.enter(1, tokens=[TEN[:8]])
    pool.commit(1, 8)
    pool.release(1)
    assert pool.enter(2, tokens=[TEN[:8]]).lookup_cached.tolist() == [4]
    assert pool.enter(3, tokens=[TEN[:9]]).lookup_cached.tolist() == [8]


def test_no_look_up_for_those_who_must_compute_everything() -> None:
    pool = Pool(8)
    pool.enter(1, tokens=[TEN])
    pool.commit(1, 10)
    grant = pool.enter(2, tokens=[TEN], most=[0])
    assert grant.lookup_cached.tolist() == [0]
    assert (grant.prefix_queries, grant.prefix_hits) == (10, 0), "who does not look is not counted"


def test_another_root_is_another_cache() -> None:
    pool = Pool(8)
    pool.enter(1, tokens=[TEN])
    pool.commit(1, 10)
    other = CacheKey(weights="w", layout="l", tenant_salt="b").root()
    assert pool.enter(2, tokens=[TEN], root=other).lookup_cached.tolist() == [0]


def test_what_is_not_launched_cannot_be_hit_and_is_waited_for() -> None:
    pool = Pool(8)
    grant = pool.enter(1, 2, tokens=[TEN, TEN])
    assert grant.granted.tolist() == [1, 0]
    assert grant.lookup_cached.tolist() == [0, -1]
    assert grant.free_blocks == 5, "a deferred look-up keeps nothing"
    assert pool.enter(2, tokens=[TEN]).lookup_cached.tolist() == [-1]
    pool.commit(1, 4)
    assert pool.enter(2, tokens=[TEN]).lookup_cached.tolist() == [-1], "the second block is still on its way"
    pool.commit(1, 8)
    assert pool.enter(2, tokens=[TEN]).lookup_cached.tolist() == [8]


def test_nobody_waits_for_a_sequence_that_was_released() -> None:
    pool = Pool(8)
    pool.enter(1, tokens=[TEN])
    pool.release(1)
    assert pool.enter(2, tokens=[TEN]).lookup_cached.tolist() == [0]


def test_queries_are_counted_once_a_request() -> None:
    pool = Pool(3)
    pool.enter(1, tokens=[[70, 71, 72, 73, 74]])
    for _ in range(5):
        assert pool.enter(2, tokens=[TEN]).granted.tolist() == [0]
    assert pool.kv.prefix_queries == 5
    pool.release(1)
    pool.enter(2, tokens=[TEN])
    assert pool.kv.prefix_queries == 15
    pool.release(2)
    pool.enter(2, tokens=[TEN], lookup_again=u8([1]))
    assert pool.kv.prefix_queries == 15


def test_generated_blocks_are_hashed_from_their_tokens() -> None:
    pool = Pool(8)
    whole = [*TEN, 20, 21, 22, 23, 24, 25, 26]
    pool.enter(1, tokens=[TEN])
    pool.commit(1, 10)
    assert pool.reserve(1, 17)
    pool.commit(1, 16, whole[8:16])
    pool.release(1)
    grant = pool.enter(2, tokens=[whole])
    assert grant.lookup_cached.tolist() == [16]


def test_commit_and_release_in_one_step_keep_the_last_block() -> None:
    pool = Pool(8)
    pool.enter(1, tokens=[TEN])
    pool.ask(
        commit_seqs=i64([1]),
        commit_lens=i32([10]),
        commit_counts=i32([0]),
        release_seqs=i64([1]),
        release_incarnations=i32([0]),
    )
    assert pool.kv.counts() == (6, 2, 0, 0)


def test_eviction_takes_the_least_recently_used_and_later_blocks_first() -> None:
    pool = Pool(6)
    a, b = [1] * 9, [2] * 9
    for seq, tokens in ((1, a), (2, b)):
        pool.enter(seq, tokens=[tokens])
        pool.commit(seq, 8)
        pool.release(seq)
    assert pool.kv.counts() == (2, 4, 0, 0)
    pool.enter(3, tokens=[a])  # used again: now b is the older one
    pool.release(3)
    pool.enter(4, tokens=[[9] * 9])  # three blocks: two free ones, and the tail of b
    pool.release(4)
    assert pool.enter(5, tokens=[b]).lookup_cached.tolist() == [4]
    pool.release(5)
    assert pool.enter(6, tokens=[a]).lookup_cached.tolist() == [8]


def test_a_referenced_block_is_never_evicted() -> None:
    pool = Pool(4)
    pool.enter(1, tokens=[[1] * 9])
    pool.commit(1, 8)
    assert pool.enter(2, tokens=[[2] * 9]).granted.tolist() == [0]
    assert pool.kv.blocks_of(1) == [0, 1, 2]


def test_idle_hits_count_as_memory() -> None:
    """Three cached blocks and one free one: a request that hits two still needs two others."""
    pool = Pool(4)
    pool.enter(1, tokens=[[1] * 13])
    pool.commit(1, 12)
    pool.release(1)
    assert pool.kv.counts() == (1, 3, 0, 0)
    grant = pool.enter(2, tokens=[[*[1] * 8, *[2] * 9]])
    assert (grant.granted.tolist(), grant.lookup_cached.tolist()) == ([0], [8]), "denied, but told what was found"
    assert pool.kv.counts() == (1, 3, 0, 0)
    assert pool.enter(2, tokens=[[*[1] * 8, *[2] * 8]]).granted.tolist() == [1]
    assert pool.kv.counts() == (0, 0, 4, 0)


def test_nobody_overtakes_who_was_denied() -> None:
    pool = Pool(4)
    grant = pool.enter(1, 2, 3, tokens=[[1] * 5, [2] * 12, [3] * 2])
    assert grant.granted.tolist() == [1, 0, 0]
    assert pool.enter(3, tokens=[[3] * 2]).granted.tolist() == [1]


def test_room_is_kept_for_those_that_run() -> None:
    pool = Pool(4)
    assert pool.enter(1, tokens=[[1] * 9], keep_free=2).granted.tolist() == [0]
    assert pool.enter(1, tokens=[[1] * 9], keep_free=1).granted.tolist() == [1]


def test_a_fork_shares_full_blocks_and_copies_the_rest() -> None:
    pool = Pool(8)
    parent = pool.enter(1, tokens=[TEN]).block_ids.tolist()
    pool.commit(1, 10)
    grant = pool.ask(fork_src=i64([1, 1]), fork_dst=i64([2, 3]), fork_lens=i32([10, 10]), reserve_seqs=i64([2]), reserve_lens=i32([13]))
    assert grant.forked.tolist() == [1, 1]
    assert grant.granted.tolist() == [1]
    assert grant.copy_src.tolist() == [parent[2]] * 2
    own = grant.copy_dst.tolist()
    assert pool.kv.blocks_of(2)[:3] == [*parent[:2], own[0]]
    assert pool.kv.blocks_of(3) == [*parent[:2], own[1]]
    assert len({*own, *parent}) == 5
    pool.release(1, 2)
    assert pool.kv.counts()[2] == 3
    pool.release(3)
    assert pool.kv.counts() == (6, 2, 0, 0)


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    pool = Pool(2)
    pool.enter(1, tokens=[TEN[:8]])
    grant = pool.ask(fork_src=i64([1]), fork_dst=i64([2]), fork_lens=i32([8]))
    assert grant.forked.tolist() == [1]
    assert grant.copy_src.size == 0


def test_a_fork_without_memory_or_source_is_denied() -> None:
    pool = Pool(3)
    pool.enter(1, tokens=[TEN])
    grant = pool.ask(fork_src=i64([1, 9]), fork_dst=i64([2, 3]), fork_lens=i32([10, 4]))
    assert grant.forked.tolist() == [0, 0]
    assert pool.kv.counts() == (0, 0, 3, 0)


def test_release_is_keyed_by_incarnation() -> None:
    pool = Pool(4)
    pool.enter(1, tokens=[TEN])
    pool.ask(release_seqs=i64([1, 7]), release_incarnations=i32([5, 0]))
    assert pool.kv.counts()[2] == 3


def test_content_that_is_not_trusted_is_forgotten() -> None:
    pool = Pool(8)
    pool.enter(1, tokens=[TEN])
    pool.commit(1, 10)
    pool.enter(2, tokens=[TEN])
    pool.release(1, drop=True)
    assert pool.enter(3, tokens=[TEN]).lookup_cached.tolist() == [0]
    pool.release(2, 3)
    assert pool.kv.counts() == (8, 0, 0, 0)


def test_without_prefix_caching_nothing_is_kept() -> None:
    pool = Pool(4, caching=False)
    pool.enter(1, tokens=[TEN[:8]])
    pool.commit(1, 8)
    grant = pool.enter(2, tokens=[TEN[:8]])
    assert grant.granted.tolist() == [1]
    assert grant.lookup_cached.tolist() == [0]
    assert pool.release(1, 2).cached_blocks == 0
    assert pool.kv.prefix_queries == 0


def test_a_double_release_is_quarantined_not_fatal() -> None:
    pool = Pool(4)
    ids = pool.enter(1, tokens=[TEN]).block_ids.tolist()
    pool.kv._refs[ids[1]] = 0  # the bug
    (grant,) = pool.kv.handle(KvStep(step=1, release_seqs=i64([1]), release_incarnations=i32([0])))
    assert isinstance(grant, KvGrant)
    assert grant.quarantined == 1
    assert sum(pool.kv.counts()) == 4
    assert pool.kv.check() == []
    assert pool.enter(2, tokens=[[1] * 9]).granted.tolist() == [1]
    assert ids[1] not in pool.kv.blocks_of(2), "it may be in use elsewhere"


def test_a_lost_block_is_found_and_quarantined() -> None:
    pool = Pool(4)
    lost = pool.kv._free.pop()
    (grant,) = pool.kv.handle(KvStep(step=1))
    assert isinstance(grant, KvGrant)
    assert grant.quarantined == 1
    assert pool.kv.check() == []
    pool.enter(1, tokens=[TEN])
    assert lost not in pool.kv.blocks_of(1)


def test_check_finds_a_leak() -> None:
    pool = Pool(4)
    pool.enter(1, tokens=[TEN])
    del pool.kv._tables[1]
    assert any("references" in line for line in pool.kv.check())


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0)])
def test_an_empty_pool_is_refused(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        KvManager(blocks, size)


def test_columns_are_typed() -> None:
    pool = Pool(4)
    grant = pool.enter(1, tokens=[TEN])
    assert grant.granted.dtype == np.uint8
    assert {grant.block_index.dtype, grant.block_ids.dtype, grant.lookup_cached.dtype} == {np.dtype(np.int32)}
    assert grant.block_seqs.dtype == np.int64


def test_a_beam_branches_into_another_without_a_new_block() -> None:
    pool = Pool(9)
    pool.enter(1, tokens=[TEN[:6]])
    pool.ask(fork_src=i64([1, 1]), fork_dst=i64([2, 3]), fork_lens=i32([6, 6]))
    pool.ask(reserve_seqs=i64([1, 2, 3]), reserve_lens=i32([10, 10, 10]))
    before = sum(pool.kv.counts()[:2])
    grant = pool.ask(fork_src=i64([1]), fork_dst=i64([3]), fork_lens=i32([10]))
    assert grant.forked.tolist() == [1]
    assert grant.block_index.tolist() == [1], "what they had in common is not named again"
    assert (len(grant.copy_src), sum(pool.kv.counts()[:2])) == (1, before + 1)
    assert pool.ask(fork_src=i64([1]), fork_dst=i64([2]), fork_lens=i32([8])).copy_src.size == 0, "nothing to copy between blocks"
    assert pool.ask(fork_src=i64([9]), fork_dst=i64([2]), fork_lens=i32([8])).forked.tolist() == [0]
