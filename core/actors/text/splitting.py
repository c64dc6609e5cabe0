"""An answer's text, taken apart.

What it is: `taken_apart`: the fragments that a piece of a choice's text brings, and how the choice ends, if it does; `quick_row`, the
same for a token in the middle.
What it does not know: formats, rows.
"""

from __future__ import annotations

from penstock.core.actors.text.ledger import Choice
from penstock.core.contract.formats import CONTENT, DONE, NAME, REASONING, Fragment

StopReason = int | str | None


def taken_apart(choice: Choice, text: str, finish: str, stop_reason: StopReason) -> tuple[list[Fragment], str, StopReason]:
    """What goes out now, why the choice ends ("" it goes on), and its stop reason. `finish` non-empty: it ends anyway, and all that was held back comes.
    A stop string cuts an answer off, an end token does not. An answer that may have one call ends with that. One that has a call whose arguments are
    not complete did not end as it should, whatever ended it ("length"); where a grammar governs it, whoever verifies it says so."""
    splitter = choice.splitter
    assert splitter is not None
    fragments = splitter.feed(text) if text else []
    if finish:
        fragments += splitter.flush(finish != "stop" or isinstance(stop_reason, str))
    if not choice.request.submit.parallel_calls and (end := _first_call_end(fragments)) is not None:
        del fragments[end:]
        if finish not in ("error", "abort"):
            finish, stop_reason = "stop", None
    _count(choice, fragments)
    if finish == "stop" and choice.said is None and choice.undone:
        finish, choice.unfinished = "length", True
    called = finish == "stop" and choice.made and not _named(choice)
    return fragments, "tool_calls" if called else finish, stop_reason


def _count(choice: Choice, fragments: list[Fragment]) -> None:
    """Calls that began, and those that are complete."""
    for fragment in fragments:
        if fragment.channel == DONE:
            choice.made = True
            choice.undone -= 1
        elif fragment.channel == NAME:
            choice.undone += 1


def _named(choice: Choice) -> bool:
    calling = choice.request.submit.calling
    return calling is not None and calling.named


def quick_row(choice: Choice, token: int, text: str) -> list[Fragment]:
    """A token in mode SPLIT, already in the ledger. Appends its row if it has at most one fragment that needs no more than that; otherwise gives the
    fragments, for rows of their own."""
    splitter = choice.splitter
    assert splitter is not None
    if splitter.channel == REASONING:
        choice.reasoned += 1
    fragments = splitter.feed(text)
    choice.undecoded = len(choice.outputs)
    if fragments:
        channel, call, text = fragments[0]
        if len(fragments) > 1 or channel in (NAME, DONE):
            _count(choice, fragments)
            return fragments
    else:
        channel, call, text = CONTENT, -1, ""
    batch = choice.batch
    if channel:
        batch.marked.append((len(batch.slots), channel, call))
    batch.slots.append(choice.slot)
    batch.texts.append(text)
    batch.tokens.append(token)
    batch.counts.append(1)
    batch.totals.append(choice.undecoded)
    batch.reasons.append("")
    choice.sent = choice.undecoded
    return []


def _first_call_end(fragments: list[Fragment]) -> int | None:
    """Where the first call is over (or, if it is broken, the second begins): what follows is none of the answer's."""
    for at, fragment in enumerate(fragments):
        if fragment.channel == DONE and fragment.call == 0:
            return at + 1
        if fragment.channel == NAME and fragment.call > 0:
            return at
    return None
