"""The grammar worker: its processes compile, verify, are limited in time and memory, and may die."""

from __future__ import annotations

import http.server
import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from penstock.core.contract.layouts import Chain, Obey, Tag, Tags, Text, encode
from penstock.core.processes.grammar_child import Checker, load
from penstock.core.processes.grammars import GrammarWorker, Job, Setup
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Check, CheckGrammar, Grammar, GrammarChecked, Vocabulary

TOKENS = [bytes([byte]) for byte in range(256)] + [b"<end>"]
VOCABULARY = Vocabulary(data=b"".join(TOKENS), counts=i32([len(token) for token in TOKENS]), special=i32([256]))

TOKENIZER: Any = SimpleNamespace(
    decode=lambda ids, skip_special_tokens: bytes(id for id in ids if id < 256).decode("utf-8", "replace"),
    encode_batch=lambda texts, add_special_tokens: [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts],
)

SLOW = """
import os, time
from penstock.core.contract.hookspecs import GrammarSpec, hookimpl

class Odd:
    def __init__(self, tokens, special):
        assert len(tokens) == 257 and special == [256]
    def compile(self, kind, source):
        if source == "sleep":
            time.sleep(60)
        if source == "die":
            os._exit(3)
        if source == "grow":
            bytearray(3 << 30)
        if source == "raise":
            1 / 0
        if source == "text":
            return "x"
        if source == "nothing":
            return None
        print("said by a plugin")
        return f"{os.getpid()}".encode()
    def matcher(self, compiled):
        raise RuntimeError("no matcher")

@hookimpl
def register_grammars():
    return [GrammarSpec(name="odd", api_level=1, kinds=["regex"], factory=Odd, priority=5)]
"""

Ask = Callable[..., GrammarChecked]


@pytest.fixture
def ask(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """ask(kind, source, ...) waits for the worker's answer; with the marker `odd` its backend is the one above."""
    extra: list[str] = []
    if request.node.get_closest_marker("odd") or "odd" in request.node.name:
        (tmp_path / "odd_grammars.py").write_text(SLOW)
        monkeypatch.syspath_prepend(tmp_path)
        extra = ["odd_grammars"]
    answers: queue.Queue[GrammarChecked] = queue.Queue()
    worker = GrammarWorker(TOKENIZER, VOCABULARY, answers.put, extra=extra, compile_s=1.5, verify_s=5.0)
    number = iter(range(1000))

    def asked(kind: Any, source: str, **more: Any) -> GrammarChecked:
        job = next(number)
        worker.submit(CheckGrammar(job=job, grammar=Grammar(kind=kind, source=source, field="f"), **more))
        answer = answers.get(timeout=60)
        assert answer.job == job
        return answer

    yield asked
    worker.close()


def verify(ask: Ask, kind: str, source: str, text: str, stop: str = "", *, stays: bool = False) -> str:
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return ask(kind, source, verify=True, ids=ids, stop=stop, stop_stays=stays).error


def test_grammars_are_compiled_and_answers_verified(ask: Ask) -> None:
    schema = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"],"additionalProperties":false}'
    first = ask("json", schema)
    assert (first.error, bool(first.compiled)) == ("", True)
    assert ask("json", schema).compiled == first.compiled
    wrong = ask("json", '{"type":"object","not":{}}')
    assert (wrong.error_status, wrong.error_code, wrong.error_param) == (400, "unsupported_feature", "f")
    assert wrong.error == "f cannot be used: The schema's keyword 'not' at / is not supported."
    assert ask("regex", "(").error_code == "invalid_value"
    assert ask("json", '{"type":"string","minLength":-1}').error_status == 400

    assert verify(ask, "json", schema, '{"a": 1}') == ""
    assert verify(ask, "json", schema, '{"a": "x"}').startswith("The answer does not obey f. At /a:")
    assert "not valid JSON" in verify(ask, "json", schema, '{"a": 1')
    assert "'a' comes twice" in verify(ask, "json", schema, '{"a": 1, "\\u0061": 2}')
    assert "no number" in verify(ask, "json", '{"type":"number"}', "NaN")
    assert "2026-02-31" in verify(ask, "json", '{"type":"string","format":"date"}', '"2026-02-31"')
    assert verify(ask, "regex", "[a-z]+", "abc") == ""
    assert "not of the grammar" in verify(ask, "regex", "[a-z]+", "ab1")
    assert "too early" in verify(ask, "regex", "[a-z]{5}", "abc")
    assert verify(ask, "regex", "[a-z]+", "abcSTOP", stop="STOP") == ""
    assert verify(ask, "choice", '["yes","no"]', "yes") == ""


@pytest.mark.parametrize(
    ("kind", "source", "text", "stop", "whole", "cut"),
    [
        ("regex", "[a-z]+;", "abc;", ";", True, False),
        ("regex", "[a-z]+", "abc;", ";", False, True),
        ("json", '{"type":"object"}', '{"a": 1}', "}", True, False),
        ("json", '{"type":"array"}', "[1", "1", False, False),
    ],
)
def test_a_stop_string_that_stays_in_the_answer_is_judged_with_it(
    ask: Ask, kind: str, source: str, text: str, stop: str, whole: bool, cut: bool
) -> None:
    assert (verify(ask, kind, source, text, stop, stays=True) == "") is whole
    assert (verify(ask, kind, source, text, stop) == "") is cut


NUMBER = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"],"additionalProperties":false}'


def test_a_layout_is_compiled_and_its_errors_name_the_part(ask: Ask) -> None:
    def layout(schema: str) -> str:
        return encode(Chain([Text("<"), Obey("json", NUMBER, "one"), Obey("json", schema, "two")]))

    assert ask("layout", layout(NUMBER)).compiled
    wrong = ask("layout", layout('{"not":{}}'))
    assert (wrong.error_code, wrong.error_param) == ("unsupported_feature", "two")
    assert wrong.error == "two cannot be used: The schema's keyword 'not' at / is not supported."
    assert ask("layout", layout('{"type":"nonsense"}')).error_param == "two"
    assert ask("layout", layout("false")).error_param == "two"
    assert ask("layout", '{"type":"nonsense"}').error_param == "f"


def test_parts_of_an_answer_are_verified_each_by_its_own(ask: Ask) -> None:
    def verify(*parts: tuple[Any, str, str]) -> str:
        checks = [
            Check(grammar=Grammar(kind=kind, source=source, field=f"f{i}"), text=text) for i, (kind, source, text) in enumerate(parts)
        ]
        return ask("layout", "", verify=True, parts=checks).error

    good = ("json", NUMBER, '{"a": 1}')
    assert verify(good, ("regex", "[a-z]+", "abc"), ("choice", '["ü<","b"]', "ü<")) == ""
    assert verify(good, ("json", NUMBER, '{"a": "x"}')).startswith("The answer does not obey f1. At /a:")
    assert verify(("regex", "[a-z]+", "ab1"), good) == "The answer does not obey f0. Its text is not of the grammar."


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("no tag", ""),
        ('a <f>{"a": 1}</f> b <f>{"a":2}</f><g>12', ""),
        ('<f>{"a": 1}', "too early"),
        ('<f>{"a": "x"}</f>', "not of the grammar"),
        ("<fx", "not of the grammar"),
    ],
)
def test_structural_tags_are_verified(ask: Ask, text: str, wrong: str) -> None:
    tags = Tags(["<f", "<g>"], [Tag("<f>", Obey("json", NUMBER), "</f>"), Tag("<g>", Obey("regex", "[0-9]{2}"), "")])
    error = ask(
        "layout", encode(tags), verify=True, parts=[Check(grammar=Grammar(kind="layout", source=encode(tags), field="f"), text=text)]
    ).error
    assert wrong in error
    assert bool(wrong) == bool(error)


def test_the_json_in_tags_is_verified_twice() -> None:
    """By a backend that lets all through, and by JSON schema."""

    class Anything:
        def compile(self, kind: str, source: str) -> bytes:
            return b"any"

        def matcher(self, compiled: bytes) -> Any:
            return self

        def consume(self, token: int) -> bool:
            return True

        def may_end(self) -> bool:
            return True

    checker = Checker(Anything(), ["layout"], {})  # type: ignore[arg-type]
    source = encode(Tags(["<"], [Tag("<f>", Obey("json", NUMBER), "!")]))
    one = encode(Chain([Text("<f>"), Obey("json", NUMBER), Text("!")]))

    def error(text: str, source: str = source) -> str:
        return checker.do(Job("layout", source, verify=True, text=text)).error

    assert error('x <f> {"a": 1}! <f>{"a": 2}!') == ""
    assert error('<f>{"a": "x"}!').startswith("At /a")
    assert error('<f>{"a": 1}?') == "'!' does not follow."
    assert error('<f>{"a": ').startswith("It is not valid JSON after '<f>'")
    assert error('<f>{"a": 1}!', one) == ""
    assert error('<f>{"b": 1}!', one)


def test_odd_backends_cost_one_request_each(ask: Ask) -> None:
    one = ask("regex", "a")
    assert one.compiled
    assert ask("regex", "b").compiled == one.compiled  # the same process
    assert "more than 1.5 seconds" in ask("regex", "sleep").error
    assert "more than 1.5 seconds" in ask("regex", "sleep").error  # kept: nobody waits for it twice
    other = ask("regex", "c")
    assert other.compiled != one.compiled
    assert "memory" in ask("regex", "grow").error
    assert "ended" in ask("regex", "die").error
    assert ask("regex", "d").compiled
    assert ask("regex", "a").compiled == one.compiled  # kept, though its process is gone
    assert ask("json", "{}").error_code == "unsupported_feature"
    assert "no matcher" in verify(ask, "regex", "a", "a")
    assert ask("regex", "a").error_status == 400
    for source, said in {
        "raise": "compile() failed with ZeroDivisionError",
        "text": "compile() gave 'x': it must be bytes",
        "nothing": "compile() gave None: it must be bytes",
    }.items():
        answer = ask("regex", source)
        assert answer.error_status == 500
        assert answer.error_param is None
        assert answer.error.startswith("The grammar backend 'odd' (plugin 'odd_grammars' of package 'odd_grammars') is broken: " + said)
    assert ask("regex", "a").compiled


def test_a_plugin_that_its_process_cannot_load_is_no_clients_mistake() -> None:
    answers: queue.Queue[GrammarChecked] = queue.Queue()
    worker = GrammarWorker(TOKENIZER, VOCABULARY, answers.put, extra=["no_such_grammars"])
    worker.submit(CheckGrammar(job=1, grammar=Grammar(kind="regex", source="a", field="f")))
    answer = answers.get(timeout=60)
    worker.close()
    assert answer.error_status == 500
    assert "'no_such_grammars' of package 'no_such_grammars' cannot be loaded (ModuleNotFoundError" in answer.error


def test_a_child_knows_what_it_is_told() -> None:
    checker = load(Setup([], VOCABULARY.data, VOCABULARY.counts.tolist(), [256]))
    assert isinstance(checker, Checker)
    assert checker.do(Job("regex", "a+")).compiled
    assert checker.do(Job("regex", "a+", verify=True, ids=[97, 97], text="aa")).error == ""
    assert checker.do(Job("json", "[")).error


def test_nothing_that_a_schema_names_is_read(tmp_path: Path) -> None:
    """Neither from the network, in which the server may reach what the client does not, nor from files."""
    asked: list[str] = []

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"$id":"x","type":"integer"}')

        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "secret.json").write_text('{"type":"integer"}')
    tokens = [bytes([byte]) for byte in range(256)]
    checker = load(Setup([], b"".join(tokens), [1] * 256, []))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        schemas: list[dict[str, Any]] = [
            {"$ref": f"{base}/ref"},
            {"$ref": (tmp_path / "secret.json").as_uri()},
            {"$schema": f"{base}/draft-07/schema", "type": "string"},
            {"$id": f"{base}/id/", "$ref": "#/definitions/x", "definitions": {"x": {"$ref": "part.json"}}},
            {"$id": f"{base}/id/", "$dynamicRef": "part.json"},
            {"properties": {"a": {"$ref": f"{base}/inner"}}},
        ]
        for schema in schemas:
            for verify in (False, True):
                assert checker.do(Job("json", json.dumps(schema), verify=verify, text="1")).error, schema
        server.shutdown()
    assert asked == []
