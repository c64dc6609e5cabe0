"""The fake device is the referee of other tests: does it see what it must see?"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.core.contract.fake_device import FakeDevice, FakeOptions, FakeRunner, FakeViolation
from penstock.core.processes.engine import runner_config
from penstock.core.protocol.columns import EMPTY_I32, i32
from penstock.core.protocol.config import build
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Control, Forward, Move, Sample, SlotSampling, StepDone
from penstock.core.protocol.sampling import SamplingParams

BLOCK = 4
GREEDY = SamplingParams(temperature=0)


def runner(**options: Any) -> FakeRunner:
    config = msgspec.structs.replace(runner_config(build({"max_num_seqs": 4})), block_size=BLOCK)
    return FakeDevice(FakeOptions(**{"vocab_size": 97, "max_model_len": 64, "num_blocks": 32, **options})).load(config, lambda *_: None)


def forward(step: int, rows: list[tuple[int, int, int]], **columns: Any) -> Forward:
    slots, starts, counts = (i32([row[k] for row in rows]) for k in range(3))
    defaults: dict[str, Any] = {"num_decode": 0}
    for name in ("copy_src", "copy_dst", "place_slots", "place_counts", "place_tokens", "block_slots", "block_index", "block_ids"):
        defaults[name] = EMPTY_I32
    given = {name: i32(value) if isinstance(value, list) else value for name, value in columns.items()}
    return Forward(engine=0, epoch=1, step=step, slots=slots, starts=starts, counts=counts, **{**defaults, **given})


def sample(
    step: int, draws: list[tuple[int, int, int]], places: dict[int, tuple[int, SamplingParams]] | None = None, **more: Any
) -> Sample:
    rows, slots, positions = (i32([draw[k] for draw in draws]) for k in range(3))
    states = [SlotSampling(slot=s, choice=0, prompt_len=n, params=p) for s, (n, p) in (places or {}).items()]
    return Sample(engine=0, epoch=1, step=step, rows=rows, slots=slots, positions=positions, places=states, **more)


def prompt(fake: FakeRunner, tokens: list[int], blocks: list[int], *, slot: int = 0, params: SamplingParams = GREEDY) -> int:
    """Step 1: prefill one prompt whole; returns the token."""
    fake.forward(
        forward(
            1,
            [(slot, 0, len(tokens))],
            place_slots=[slot],
            place_counts=[len(tokens)],
            place_tokens=tokens,
            block_slots=[slot] * len(blocks),
            block_index=list(range(len(blocks))),
            block_ids=blocks,
        )
    )
    return int(fake.sample(sample(1, [(0, slot, len(tokens))], {slot: (len(tokens), params)}))().tokens[0])


def test_a_token_depends_on_the_history_alone() -> None:
    tokens = list(range(1, 11))
    whole = prompt(runner(), tokens, [0, 1, 2])
    other_blocks = prompt(runner(), tokens, [9, 3, 7], slot=2)
    assert whole == other_blocks
    chunked = runner()
    chunked.forward(
        forward(
            1,
            [(0, 0, 6)],
            place_slots=[0],
            place_counts=[10],
            place_tokens=tokens,
            block_slots=[0] * 3,
            block_index=[0, 1, 2],
            block_ids=[4, 5, 6],
        )
    )
    assert chunked.sample(sample(1, []))().tokens.size == 0
    chunked.forward(forward(2, [(0, 6, 4)]))
    assert int(chunked.sample(sample(2, [(0, 0, 10)], {0: (10, GREEDY)}))().tokens[0]) == whole
    assert prompt(runner(), [*tokens[:-1], 50], [0, 1, 2]) != whole


def test_seeds_and_choices_matter_unless_greedy() -> None:
    tokens = [1, 2, 3]
    drawn = {seed: prompt(runner(), tokens, [0], params=SamplingParams(seed=seed)) for seed in range(20)}
    assert len(set(drawn.values())) > 5
    assert drawn[3] == prompt(runner(), tokens, [0], params=SamplingParams(seed=3))


def test_decode_goes_on_from_drawn_tokens() -> None:
    fake = runner()
    first = prompt(fake, [1, 2, 3], [0])
    fake.forward(forward(2, [(0, 3, 1)], num_decode=1))
    second = int(fake.sample(sample(2, [(0, 0, 4)]))().tokens[0])
    assert second == prompt(runner(), [1, 2, 3, first], [0])


def test_a_prefix_hit_reads_what_was_written() -> None:
    fake = runner()
    tokens = list(range(1, 9))
    prompt(fake, [*tokens, 20], [0, 1, 2])
    place = {"place_slots": [1], "place_counts": [10], "block_slots": [1] * 3, "block_index": [0, 1, 2]}
    fake.forward(forward(2, [(1, 8, 2)], place_tokens=[*tokens, 30, 31], block_ids=[0, 1, 5], **place))
    token = int(fake.sample(sample(2, [(0, 1, 10)], {1: (10, GREEDY)}))().tokens[0])
    assert token == prompt(runner(), [*tokens, 30, 31], [0, 1, 2])


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"block_ids": [0, 3, 5]}, "foreign or missing KV at position 4"),  # a block nobody wrote
        ({"block_ids": [1, 0, 5]}, "foreign or missing KV at position 0"),  # the right blocks in the wrong order
        ({"block_ids": [0, 1, 1]}, "foreign or missing KV at position 4"),  # writes into the block that it reads
        ({"block_ids": [0, 1, 99]}, "out of range"),
        ({"block_ids": [0, 1, 5], "place_tokens": [9, 9, 3, 4, 5, 6, 7, 8, 30, 31]}, "foreign or missing KV at position 0"),  # a false hit
        ({"block_ids": [0, 1], "block_index": [0, 1], "block_slots": [1, 1]}, "no block"),
    ],
)
def test_wrong_blocks_are_seen(columns: dict[str, Any], what: str) -> None:
    fake = runner()
    prompt(fake, [*range(1, 9), 20], [0, 1, 2])
    place = {
        "place_slots": [1],
        "place_counts": [10],
        "place_tokens": [1, 2, 3, 4, 5, 6, 7, 8, 30, 31],
        "block_slots": [1] * 3,
        "block_index": [0, 1, 2],
    }
    with pytest.raises(FakeViolation, match=what):
        fake.forward(forward(2, [(1, 8, 2)], **{**place, **columns}))


def test_a_fork_needs_its_copy() -> None:
    def forked(copies: dict[str, Any]) -> None:
        fake = runner()
        prompt(fake, [1, 2, 3, 4, 5], [0, 1])
        blocks = {"block_slots": [1, 1], "block_index": [0, 1], "block_ids": [0, 6]}
        fake.forward(forward(2, [(1, 5, 1)], place_slots=[1], place_counts=[6], place_tokens=[1, 2, 3, 4, 5, 9], **blocks, **copies))

    forked({"copy_src": [1], "copy_dst": [6]})
    with pytest.raises(FakeViolation, match="position 4"):
        forked({})


def moved(fake: FakeRunner, blocks: list[int], pages: list[int], *, out: bool) -> None:
    fake.move(Move(engine=0, epoch=1, owner="t", id=1, blocks=i32(blocks), pages=i32(pages), out=out))()


def test_blocks_go_to_host_pages_and_come_back() -> None:
    def swapped(back: list[int]) -> int:
        """Blocks 0 and 1 leave; another sequence takes them; they return as 5 and 6, if the pages come back in the right order."""
        fake = runner()
        fake.control(Control(engine=0, epoch=1, owner="t", id=0, name="host_pages", data=b"3"))
        first = prompt(fake, [1, 2, 3, 4, 5], [0, 1])
        moved(fake, [0, 1], [2, 0], out=True)
        other = {"place_slots": [1], "place_counts": [5], "place_tokens": [9, 8, 7, 6, 5]}
        fake.forward(forward(2, [(1, 0, 5)], block_slots=[1, 1], block_index=[0, 1], block_ids=[0, 1], **other))
        fake.sample(sample(2, [(0, 1, 5)], {1: (5, GREEDY)}))
        moved(fake, [5, 6], back, out=False)
        fake.forward(forward(3, [(0, 5, 1)], num_decode=1, block_slots=[0, 0], block_index=[0, 1], block_ids=[5, 6]))
        token = int(fake.sample(sample(3, [(0, 0, 6)]))().tokens[0])
        assert token == prompt(runner(), [1, 2, 3, 4, 5, first], [0, 1])
        return token

    swapped([2, 0])
    with pytest.raises(FakeViolation, match="foreign or missing KV at position 0"):
        swapped([0, 2])


def test_impossible_moves_are_seen_or_refused() -> None:
    fake = runner()
    fake.control(Control(engine=0, epoch=1, owner="t", id=0, name="host_pages", data=b"2"))
    with pytest.raises(FakeViolation, match="out of range"):
        moved(fake, [99], [0], out=True)
    with pytest.raises(FakeViolation, match="one place twice"):
        moved(fake, [1, 2], [0, 0], out=True)
    with pytest.raises(InvalidRequest, match="There are 2 host pages"):
        moved(fake, [1], [2], out=True)
    with pytest.raises(UnsupportedFeature, match="'dream'"):
        fake.control(Control(engine=0, epoch=1, owner="t", id=0, name="dream"))


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([(0, 3, 2)], "not known"),  # beyond the history
        ([(0, 3, 1), (0, 3, 1)], "two rows name one slot"),
        ([(0, 3, 0)], "computes nothing"),
    ],
)
def test_impossible_rows_are_seen(rows: list[tuple[int, int, int]], what: str) -> None:
    fake = runner()
    prompt(fake, [1, 2, 3], [0])
    with pytest.raises(FakeViolation, match=what):
        fake.forward(forward(2, rows))


def test_draws_must_follow_their_rows() -> None:
    def drawn(draws: list[tuple[int, int, int]]) -> None:
        fake = runner()
        prompt(fake, [1, 2, 3], [0])
        fake.forward(forward(2, [(0, 3, 1)], num_decode=1))
        fake.sample(sample(2, draws))

    drawn([(0, 0, 4)])
    with pytest.raises(FakeViolation, match="not the one after"):
        drawn([(0, 0, 5)])
    with pytest.raises(FakeViolation, match="does not end where"):
        drawn([(0, 1, 4)])
    fake = runner()
    with pytest.raises(FakeViolation, match="without its Forward"):
        fake.sample(sample(1, []))
    with pytest.raises(FakeViolation, match="came after step 0"):
        fake.forward(forward(2, []))


def test_logprobs_and_prompt_logprobs_have_their_shape() -> None:
    fake = runner()
    params = SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1)
    blocks = {"block_slots": [0], "block_index": [0], "block_ids": [0]}
    fake.forward(forward(1, [(0, 0, 3)], place_slots=[0], place_counts=[3], place_tokens=[5, 6, 7], prompt_rows=[0], **blocks))
    done: StepDone = fake.sample(sample(1, [(0, 0, 3)], {0: (3, params)}, prompt_rows=i32([0]), prompt_topk=i32([1])))()
    assert done.logprobs is not None
    assert done.logprobs.counts.tolist() == [3]
    assert done.logprobs.ids[0] == done.tokens[0]
    assert done.logprobs.positions.tolist() == [3]
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs.positions.tolist() == [1, 2]
    assert done.prompt_logprobs.ids.reshape(2, 2)[:, 0].tolist() == [6, 7]


def test_min_tokens_allowed_ids_scripts_and_faults() -> None:
    forced = SamplingParams(temperature=0, allowed_token_ids=[42])
    assert prompt(runner(), [1, 2], [0], params=forced) == 42
    device = FakeDevice(FakeOptions(), script=lambda history, prompt_len: history[-1] + 1)
    fake = device.load(runner_config(build({})), lambda *_: None)
    assert prompt(fake, [1, 2], [0]) == 3
    assert device.launches == {"forward": 1, "sample": 1}
    broken = runner(fail_at_step=1)
    with pytest.raises(RuntimeError, match="injected"):
        prompt(broken, [1, 2], [0])
    assert np.all(np.asarray([prompt(runner(eos_every=1, eos=7), [1, n], [0]) for n in range(5)]) == 7)
