"""Blocks on the host: what was computed goes out, comes back elsewhere, and a sequence goes on from it as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.messages import Control, Forward, Move, Sample, SlotSampling
from penstock.core.protocol.sampling import SamplingParams

Load = Callable[..., Any]
GREEDY = SamplingParams(temperature=0.0, logprobs=5)


def move(runner: Any, blocks: list[int], pages: list[int], out: bool) -> None:
    runner.move(Move(engine=0, epoch=1, owner="test", id=1, blocks=i32(blocks), pages=i32(pages), out=out))()


def control(runner: Any, name: str, data: bytes = b"") -> bytes:
    done: bytes = runner.control(Control(engine=0, epoch=1, owner="test", id=1, name=name, data=data))
    return done


def go(runner: Any, slot: int, start: int, count: int, blocks: list[int], tokens: list[int] | None = None) -> Any:
    """One step of one sequence: its blocks anew, its tokens where they are given."""
    place = {"place_slots": i32([slot]), "place_counts": i32([len(tokens)]), "place_tokens": i32(tokens)} if tokens else {}
    named = {"block_slots": i32([slot] * len(blocks)), "block_index": i32(range(len(blocks))), "block_ids": i32(blocks)}
    columns = {"slots": i32([slot]), "starts": i32([start]), "counts": i32([count])}
    runner.forward(Forward(engine=0, epoch=1, step=1, **columns, num_decode=int(count == 1), **place, **named))
    places = [SlotSampling(slot=slot, choice=0, prompt_len=40, params=GREEDY)] if tokens else []
    rows = {"rows": i32([0]), "slots": i32([slot]), "positions": i32([start + count])}
    return runner.sample(Sample(engine=0, epoch=1, step=1, **rows, places=places))()


@pytest.mark.parametrize("attention", ["native", "torch"])
def test_a_sequence_goes_on_from_blocks_that_were_away(folder: Path, load: Load, attention: str) -> None:
    prompt = (np.arange(40) * 7 % 90).tolist()
    truth = load(folder, attention_backend=attention)
    first = go(truth, 0, 0, 40, [0, 1, 2], prompt)
    second = go(truth, 0, 40, 1, [0, 1, 2])
    runner = load(folder, attention_backend=attention)
    page = runner._pool.nbytes // runner.num_blocks
    assert control(runner, "host_pages", b"5") == str(5 * page).encode()
    assert go(runner, 0, 0, 40, [0, 1, 2], prompt).tokens.tolist() == first.tokens.tolist()
    move(runner, [0, 1, 2], [4, 0, 3], out=True)
    runner._pool.fill_(255)
    move(runner, [7, 5, 6], [4, 0, 3], out=False)
    found = go(runner, 3, 40, 1, [7, 5, 6], [*prompt, int(first.tokens[0])])
    assert found.tokens.tolist() == second.tokens.tolist()
    assert found.logprobs.values.tobytes() == second.logprobs.values.tobytes()
    assert (runner._pool[:5] == 255).all()


def test_what_is_not_there_is_refused_and_copies_nothing(folder: Path, load: Load) -> None:
    runner = load(folder)
    runner._pool.fill_(7)
    control(runner, "host_pages", b"2")
    for blocks, pages, wrong in (([0, 1], [0, 2], "pages"), ([0, runner.num_blocks], [0, 1], "blocks"), ([-1], [0], "blocks")):
        with pytest.raises(InvalidRequest, match=f"names {wrong} beyond"):
            move(runner, blocks, pages, out=True)
        with pytest.raises(InvalidRequest, match=f"names {wrong} beyond"):
            move(runner, blocks, pages, out=False)
    assert (runner._pool == 7).all()
    with pytest.raises(UnsupportedFeature, match=r"'sleep'.*Known: host_pages"):
        control(runner, "sleep")
    with pytest.raises(InvalidRequest, match="decimal digits"):
        control(runner, "host_pages", b"-3")
    move(runner, [], [], out=True)
