"""Nodes of trees of drafts, in Triton: from a row's word of ancestors to positions and places.

What it is: functions of Triton kernels. Of the 64 entries up to its own a row sees those whose bit is 1 in its word, bit i being the entry i places before. Those that it sees are
at the positions up to its own, one each: its position is its place less the number of entries that it does not see, and the entry b positions before it is that of bit b among those that are 1.
Written with shifts and sums alone, which the interpreter has as well.
What it does not know: keys, pages.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="no-any-return"

import triton
import triton.language as tl


@triton.jit
def seen_of(words):
    """How many bits of int64 words are 1."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x += x >> 8
    x += x >> 16
    x += x >> 32
    return (x & 127).to(tl.int32)


@triton.jit
def _bit(words, n):
    """Where bit n (from 0, below 64) is among those that are 1; 63 or what is there if there are not so many."""
    at = (words * 0 + n * 0).to(tl.int32)
    left = at + n
    for log in tl.static_range(5, -1, -1):
        below = seen_of((words >> at.to(tl.int64)) & ((1 << (1 << log)) - 1))
        up = left >= below
        left -= tl.where(up, below, 0)
        at += tl.where(up, 1 << log, 0)
    return at


@triton.jit
def lowest(words, count):
    """The words with no more bits than the lowest `count` (from 1) that are 1."""
    many = seen_of(words)
    at = _bit(words, tl.minimum(count, 63))
    kept = words & ((words * 0 + 1 << at.to(tl.int64)) - 1)
    return tl.where(many > count, kept, words)


@triton.jit
def shortened(length, word):
    """Positions up to its own of a row whose place is `length` - 1; 0 of none."""
    return tl.maximum(length - 64 + seen_of(word), 0)


@triton.jit
def place_of(word, place, positions):
    """Where the row at `place` finds the entries at `positions` up to its own."""
    seen = seen_of(word)
    back = tl.maximum(place - 64 + seen - positions, 0)
    near = _bit(word, tl.minimum(back, 63))
    return tl.where(back < seen, tl.maximum(place - near, 0), positions)
