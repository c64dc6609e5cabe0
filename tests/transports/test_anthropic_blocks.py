"""Anthropic's answers in blocks: thinking, text and calls, whole and streamed, in the order in which the model says them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from edge_kit import Edge, delta, finished
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import ARGUMENTS, CONTENT, DONE, NAME, REASONING, Message, Submit, TextDelta
from penstock.transports import anthropic_replies as replies
from penstock.transports.anthropic_thinking import UNSIGNED, sealed, unsealed
from penstock.transports.anthropic_voice import MessagesVoice, input_json
from penstock.transports.gateway import Batch
from penstock.transports.voice import Choice, Head, Prompt, Usage

PATH = "/v1/messages"
TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
HI: dict[str, Any] = {"model": "brook", "max_tokens": 2000, "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
OMITTED = {"thinking": {"type": "adaptive", "display": "omitted"}}

Row = tuple[int, int, str]
ROWS: list[Row] = [
    (REASONING, -1, "Hm"),
    (REASONING, -1, "."),
    (CONTENT, -1, "I look."),
    (NAME, 0, "f"),
    (ARGUMENTS, 0, '{"a":'),
    (ARGUMENTS, 0, '"ä"}'),
    (DONE, 0, ""),
    (NAME, 1, "g"),
    (ARGUMENTS, 1, "{}"),
    (DONE, 1, ""),
]


@pytest.fixture(scope="module")
def edge(shared_edge: Edge) -> Edge:
    return shared_edge


def batch(key: int, rows: list[Row]) -> TextDelta:
    """Rows of one delta; one without channels where all are text."""
    made = delta(
        *({"key": key, "text": text, **({"extra": {"call_id": f"call_{call}"}} if channel == NAME else {})} for channel, call, text in rows)
    )
    if all(channel == CONTENT for channel, _, _ in rows):
        return made
    return msgspec.structs.replace(made, channels=np.array([row[0] for row in rows], np.uint8), calls=i32([row[1] for row in rows]))


def says(
    rows: list[Row], sizes: list[int], reason: str = "tool_calls", reasoned: int = 2, extra: dict[str, Any] | None = None
) -> Callable[[Submit], list[Message]]:
    """ROWS in deltas of so many rows, and the end."""

    def play(submit: Submit) -> list[Message]:
        out: list[Message] = []
        at = 0
        for size in [*sizes, len(rows)]:
            if some := rows[at : at + size]:
                out.append(batch(submit.key, some))
            at += size
        end = msgspec.structs.replace(finished(submit.key, output=9), reasoning_tokens=reasoned)
        return [*out, delta({"key": submit.key, "tokens": [], "reason": reason, **({"extra": extra} if extra else {})}), end]

    return play


def ask(edge: Edge, play: Any, **fields: Any) -> tuple[Any, list[Any]]:
    """The whole reply and the events of the stream, of one answer."""
    edge.text.script = play
    headers = {"x-request-id": "same"}
    whole = edge.kept.post(PATH, json=HI | fields, headers=headers)
    stream = edge.kept.post(PATH, json={**HI, **fields, "stream": True}, headers=headers)
    assert (whole.status_code, stream.status_code) == (200, 200), whole.text
    msgspec.convert(whole.json(), replies.MessageReply)
    return whole.json(), list(named(stream.text))


def named(text: str) -> Iterator[Any]:
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n", 1)
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        msgspec.convert(event, replies.MessageEvent)
        yield event


def folded(events: list[Any]) -> Any:
    """The message that a client makes of a stream, which must begin and end each block once, in order."""
    message: dict[str, Any] = {}
    inputs: list[str] = []
    going: int | None = None
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert (going, event["index"]) == (None, len(message["content"]))
                going = event["index"]
                message["content"].append(dict(event["content_block"]))
                inputs.append("")
            case "content_block_delta":
                assert event["index"] == going
                block, (kind, *_) = message["content"][going], event["delta"].values()
                field = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}.get(kind)
                if field is None:
                    assert (kind, block["type"]) == ("input_json_delta", "tool_use")
                    inputs[going] += event["delta"]["partial_json"]
                else:
                    block[field] += event["delta"][field]
            case "content_block_stop":
                assert event["index"] == going
                if message["content"][going]["type"] == "tool_use":
                    message["content"][going]["input"] = input_json(inputs[going])
                going = None
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert going is None
    assert events[-1] == {"type": "message_stop"}
    return message


BLOCKS = [
    {"type": "thinking", "thinking": "Hm.", "signature": UNSIGNED},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": "ä"}},
    {"type": "tool_use", "id": "call_1", "name": "g", "input": {}},
]


@pytest.mark.parametrize("sizes", [[], [1] * 9, [3, 4], [2, 1, 3]])
def test_blocks_in_order(edge: Edge, sizes: list[int]) -> None:
    whole, events = ask(edge, says(ROWS, sizes))
    assert whole["content"] == BLOCKS
    assert whole["stop_reason"] == "tool_use"
    assert whole["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
    assert folded(events) == whole


def test_golden_events(edge: Edge) -> None:
    _, events = ask(edge, says(ROWS[:7], [1] * 6))
    assert [{name: value for name, value in event.items() if name != "type"} for event in events[1:-2]] == [
        {"index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm"}},
        {"index": 0, "delta": {"type": "thinking_delta", "thinking": "."}},
        {"index": 0, "delta": {"type": "signature_delta", "signature": UNSIGNED}},
        {"index": 0},
        {"index": 1, "content_block": {"type": "text", "text": ""}},
        {"index": 1, "delta": {"type": "text_delta", "text": "I look."}},
        {"index": 1},
        {"index": 2, "content_block": {"type": "tool_use", "id": "call_0", "name": "f", "input": {}}},
        {"index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"a":'}},
        {"index": 2, "delta": {"type": "input_json_delta", "partial_json": '"ä"}'}},
        {"index": 2},
    ]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_thinking_that_is_omitted_is_in_its_signature(edge: Edge) -> None:
    whole, events = ask(edge, says(ROWS, [1] * 9), **OMITTED)
    assert whole["content"] == [{"type": "thinking", "thinking": "", "signature": sealed("Hm.")}, *BLOCKS[1:]]
    assert folded(events) == whole
    assert "thinking_delta" not in json.dumps(events)
    assert unsealed(sealed("Hm. ä")) == "Hm. ä"
    assert unsealed("of somebody else") is None
    with pytest.raises(ValueError, match="padding"):
        unsealed(sealed("Hm.")[:-1])


def test_an_answer_of_nothing_is_an_empty_text(edge: Edge) -> None:
    whole, events = ask(edge, says([], [], "stop"))
    assert whole["content"] == [{"type": "text", "text": ""}]
    assert folded(events) == whole


def test_thinking_alone_is_one_block(edge: Edge) -> None:
    whole, events = ask(edge, says(ROWS[:2], [], "length"))
    assert (whole["content"], whole["stop_reason"]) == (BLOCKS[:1], "max_tokens")
    assert folded(events) == whole


@pytest.mark.parametrize(
    ("stop_reason", "named", "expected"),
    [(None, True, "tool_use"), (7, True, "tool_use"), ("x", True, "tool_use"), (None, False, "end_turn")],
)
def test_a_call_that_was_named_is_the_stop_reason(edge: Edge, stop_reason: Any, named: bool, expected: str) -> None:
    """Chats end with "stop" where the request named the function."""

    def voice(*batches: TextDelta) -> tuple[str, str]:
        """stop_reason of the whole, and of the stream."""
        one, two, choice = MessagesVoice(tool_named=named), MessagesVoice(tool_named=named), Choice()
        head = Head("r0", 1, "brook", None)
        one.begin(head)
        two.begin(head)
        for message in batches:
            found = Batch(message)
            for row, text in enumerate(message.texts):
                choice.take(text, row, found)
                list(two.piece(0, text, row, found))
                if reason := message.reasons[row]:
                    choice.reason, choice.stop_reason = reason, stop_reason
                    list(two.closed(0, reason, None, row, found))
        whole = json.loads(one.whole([Prompt()], [choice], Usage(1, 1, 0), None))
        last = json.loads(next(iter(two.ended(Usage(1, 1, 0), None))))
        return whole["stop_reason"], last["delta"]["stop_reason"]

    end = delta({"key": 1, "tokens": [], "reason": "stop", "extra": {"stop_reason": stop_reason}})
    assert voice(batch(1, ROWS[3:7]), end) == (expected, expected)
    if stop_reason is None:
        assert voice(batch(1, ROWS[2:3]), end) == ("end_turn", "end_turn")


@pytest.mark.parametrize(
    ("rows", "reason", "extra", "expected"),
    [
        (ROWS[3:5], "length", {}, ("max_tokens", None)),
        (ROWS[3:5], "length", {"stop_reason": "x", "unfinished": True}, ("stop_sequence", "x")),
        (ROWS[3:5], "length", {"unfinished": True}, ("end_turn", None)),
        (ROWS[3:7], "tool_calls", {"stop_reason": "</tool_call>"}, ("tool_use", "</tool_call>")),
        (ROWS[:3], "stop", {"stop_reason": "x"}, ("stop_sequence", "x")),
        (ROWS[:3], "stop", {"stop_reason": 7}, ("end_turn", None)),
    ],
)
def test_what_ended_an_answer_is_said_and_whether_its_call_may_be_run(
    edge: Edge, rows: list[Row], reason: str, extra: dict[str, Any], expected: tuple[str, str | None]
) -> None:
    whole, events = ask(edge, says(rows, [1] * 9, reason, extra=extra))
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected
    assert folded(events) == whole


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("{}", {}),
        (' {"a": 1}', {"a": 1}),
        ("[1, 2]", {"arguments": [1, 2]}),
        ('"x"', {"arguments": "x"}),
        ("7", {"arguments": 7}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": [1, {"b": "}"', {"a": [1, {"b": "}"}]}),
        ('{"a": 1, "b": 2', {"a": 1, "b": 2}),
        ('{"city": "', {}),
        ('{"city": "Os', {}),
        ('{"a": "\\"", "b": {"c": 1}', {"a": '"', "b": {"c": 1}}),
        ("{'a': 1}", {}),
        ('{"a": 1}}', {"a": 1}),
        ("[1, [2", {"arguments": [1, [2]]}),
        ("no JSON", {}),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_arguments_as_an_object(edge: Edge, text: str, expected: Any, done: bool) -> None:
    assert input_json(text) == expected
    rows: list[Row] = [(NAME, 0, "f"), *((ARGUMENTS, 0, char) for char in text), *([(DONE, 0, "")] if done else [])]
    whole, events = ask(edge, says(rows, [1, 2], "tool_calls" if done else "length"))
    assert whole["content"] == [{"type": "tool_use", "id": "call_0", "name": "f", "input": expected}]
    valid = text not in ("[1, [2",)  # no call is done with such
    if valid if done else text not in ("7", '"x"'):  # whether such a one is complete, only the end of the call tells
        assert folded(events) == whole


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    st.data(),
)
def test_what_is_left_of_cut_arguments_is_part_of_them(value: Any, data: st.DataObject) -> None:
    text = json.dumps({"v": value}, ensure_ascii=False)
    assert input_json(text) == {"v": value}
    cut = data.draw(st.integers(0, len(text)))
    assert part_of(input_json(text[:cut]), {"v": value})


def part_of(part: Any, value: Any) -> bool:
    """Numbers as far as they go."""
    if type(part) is type(value) is int:
        return str(value).startswith(str(part))
    if isinstance(part, dict) and isinstance(value, dict):
        return all(name in value and part_of(one, value[name]) for name, one in part.items())
    if isinstance(part, list) and isinstance(value, list):
        return len(part) <= len(value) and all(part_of(one, other) for one, other in zip(part, value, strict=False))
    return bool(part == value)


# ------------------------------------------------------------------ whatever comes, the stream is the whole


@st.composite
def answers(draw: st.DrawFn) -> list[Row]:
    """Rows as splitters make them."""
    rows: list[Row] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from("rrtttc"), max_size=8)):
        if kind == "c":
            rows.append((NAME, calls, draw(st.text(max_size=3))))
            text = draw(st.sampled_from(["{}", '{"a": "ä", "b": [1]}', "[1]", '{"a": {"b": 1', "{'a'", ""]))
            cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
            rows += [(ARGUMENTS, calls, text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            if draw(st.booleans()) or text.endswith(("}", "]")):
                rows.append((DONE, calls, ""))
            calls += 1
        else:
            rows.append((REASONING if kind == "r" else CONTENT, -1, draw(st.text(max_size=4))))
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=answers(), sizes=st.lists(st.integers(1, 4), max_size=8), omit=st.booleans())
def test_the_stream_is_the_whole(edge: Edge, rows: list[Row], sizes: list[int], omit: bool) -> None:
    whole, events = ask(edge, says(rows, sizes), **(OMITTED if omit else {}))
    assert folded(events) == whole
    texts = "".join(block["text"] for block in whole["content"] if block["type"] == "text")
    assert texts == "".join(text for channel, _, text in rows if channel == CONTENT)
    thoughts = "".join(unsealed(block["signature"]) or block["thinking"] for block in whole["content"] if block["type"] == "thinking")
    assert thoughts == "".join(text for channel, _, text in rows if channel == REASONING)
    kinds = [block["type"] for block in whole["content"]]
    assert kinds.count("tool_use") == sum(channel == NAME for channel, _, _ in rows)
    assert all(pair[0] != pair[1] or pair[0] == "tool_use" for pair in itertools.pairwise(kinds))
