"""Tokenizers that fail in every way: only the request in hand feels it, and nothing after it waits for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from penstock.core.actors.text import worker as worker_module
from penstock.core.actors.text.careful import CarefulTokenizer, TokenizerFailed, ordinary
from penstock.core.actors.text.worker import TokenizerWorker
from penstock.core.protocol.errors import PluginFault
from penstock.core.protocol.messages import Encode, Encoded
from penstock.core.runtime.clock import SystemClock
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer, byte_alphabet


class Panic(BaseException):
    """As a library in Rust raises it."""


class Odd:
    """A tokenizer of bytes, with changes."""

    vocab_size, bos_id, eos_ids, special_ids, name, max_chars_per_token = 256, None, [0], frozenset({0}), "odd", 1

    def __init__(self, **changes: Any) -> None:
        self.__dict__.update(changes)

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> Any:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def token_text(self, token: int) -> str:
        return chr(token)

    def is_byte_exact(self) -> bool:
        return True

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(ids).decode()

    def info(self) -> dict[str, Any]:
        return {}


def panics(*args: Any, **kwargs: Any) -> Any:
    raise Panic("out of stack")


@pytest.mark.parametrize("name", ["encode_batch", "token_bytes", "token_text", "is_byte_exact", "decode", "info"])
def test_a_panic_of_any_method_is_an_ordinary_exception(name: str) -> None:
    careful = CarefulTokenizer(Odd(**{name: panics}))
    arguments: dict[str, Callable[[], Any]] = {
        "encode_batch": lambda: careful.encode_batch(["a"], add_special_tokens=False),
        "token_bytes": lambda: careful.token_bytes(1),
        "token_text": lambda: careful.token_text(1),
        "is_byte_exact": careful.is_byte_exact,
        "decode": lambda: careful.decode([1], skip_special_tokens=True),
        "info": careful.info,
    }
    with pytest.raises(TokenizerFailed, match="Panic: out of stack"):
        arguments[name]()


def test_the_end_of_the_process_is_not_a_tokenizers_failure() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ordinary(interrupted)


@pytest.mark.parametrize(
    "result",
    [
        [np.zeros((1, 2), np.int32)],
        [np.array([1.5])],
        [np.array(["a"])],
        [[2**40]],
        [[3, -1]],
        [np.array([3, 256], np.int32)],
        [np.array([2**64 - 1], np.uint64)],
        [],
        [np.zeros(1, np.int32)] * 2,
        [np.int32(3)],
        None,
    ],
    ids=["two dimensions", "floats", "texts", "too large", "negative", "beyond", "unsigned", "too few", "too many", "a number", "nothing"],
)
def test_what_is_no_row_of_ids_is_refused(result: Any) -> None:
    with pytest.raises((TokenizerFailed, TypeError)):
        CarefulTokenizer(Odd(encode_batch=lambda texts, add_special_tokens: result)).encode_batch(["a"], add_special_tokens=False)


@pytest.mark.parametrize("result", [[3, 4], np.array([3, 4]), np.array([3, 4], np.uint16), (3, 4)])
def test_rows_of_ids_of_any_kind_are_taken(result: Any) -> None:
    found = CarefulTokenizer(Odd(encode_batch=lambda texts, add_special_tokens: [result])).encode_batch(["a"], add_special_tokens=False)
    assert (found[0].dtype, found[0].tolist()) == (np.int32, [3, 4])
    empty = CarefulTokenizer(Odd(encode_batch=lambda texts, add_special_tokens: [[]])).encode_batch(["a"], add_special_tokens=False)
    assert (empty[0].dtype, empty[0].tolist()) == (np.int32, [])


def test_attributes_are_read_once_and_checked_at_start() -> None:
    class Moody(Odd):
        reads = 0

        @property
        def special_ids(self) -> frozenset[int]:  # type: ignore[override]
            self.reads += 1
            if self.reads > 1:
                raise Panic("no longer")
            return frozenset({7})

    careful = CarefulTokenizer(Moody())
    assert [careful.special_ids for _ in range(3)] == [frozenset({7})] * 3
    for name, value in {
        "vocab_size": "9",
        "bos_id": 1.0,
        "eos_ids": None,
        "special_ids": {"a"},
        "name": 3,
        "max_chars_per_token": -1,
        "bos_id ": 256,
        "special_ids ": {-1},
        "special_ids  ": {256},
    }.items():
        with pytest.raises(PluginFault, match=f"its '{name.strip()}' must be"):
            CarefulTokenizer(Odd(**{name.strip(): value}))
    with pytest.raises(PluginFault, match="'vocab_size' cannot be read"):
        CarefulTokenizer(type("Bare", (), {})())


def serve(tokenizer: Any, *texts: str, **more: Any) -> list[Encoded]:
    done: queue.SimpleQueue[Encoded] = queue.SimpleQueue()
    worker = TokenizerWorker(tokenizer, object(), done.put)  # type: ignore[arg-type]
    try:
        found = []
        for job, text in enumerate(texts):
            worker.submit(Encode(job=job, kind="completion", prompt=text, **more))
            found.append(done.get(timeout=20))
        return found
    finally:
        worker.close()


def test_a_real_panic_fails_one_request_and_the_next_is_served() -> None:
    """A pattern that backtracks beyond the library's limit: Onig's error is a panic in Rust."""
    fast = Tokenizer(models.BPE({char: index for index, char in enumerate(byte_alphabet())}, []))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"(\w+\s*)+$"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bad, good = serve(CarefulTokenizer(HuggingFaceTokenizer(fast, {}, [0], "odd")), "word " * 500 + "!", "a word")
    assert bad.error_status == 400
    assert "cannot be encoded" in bad.error
    assert (good.error, len(good.ids)) == ("", 6)
    (bad,) = serve(CarefulTokenizer(HuggingFaceTokenizer(fast, {}, [0], "odd")), "a word", bad_words=["ab", "word " * 500 + "!"])
    assert (bad.error_status, bad.error_param, bad.error.startswith("bad_words cannot be encoded")) == (400, "bad_words", True)


def test_even_a_fault_of_our_own_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(worker_module, "encode_batch", broken)
    first, second = serve(CarefulTokenizer(Odd()), "a", "b")
    assert first.error_status == second.error_status == 500
    assert "ZeroDivisionError: ours" in second.error


class Mute(Exception):
    """Asked for its text, it fails."""

    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, SystemExit, Panic, Mute])
@pytest.mark.parametrize("careful", [True, False])
def test_whatever_is_raised_fails_one_request_and_the_next_is_served(kind: type[BaseException], careful: bool) -> None:
    def moody(texts: list[str], *, add_special_tokens: bool) -> Any:
        if "bad" in texts:
            raise kind("now")
        return Odd().encode_batch(texts, add_special_tokens=add_special_tokens)

    own = Odd(encode_batch=moody)
    first, bad, last = serve(CarefulTokenizer(own) if careful else own, "a", "bad", "b")
    assert (first.error, last.error) == ("", "")
    assert (bad.error_status, "cannot be encoded" in bad.error) == (400, True)
    assert kind.__name__ in bad.error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Mute])
def test_others_of_its_batch_are_served(kind: type[BaseException]) -> None:
    def moody(texts: list[str], *, add_special_tokens: bool) -> Any:
        if "bad" in texts:
            raise kind
        return Odd().encode_batch(texts, add_special_tokens=add_special_tokens)

    batch = [Encode(job=job, kind="completion", prompt=text) for job, text in enumerate(["a", "bad", "b"])]
    found: list[list[Encoded]] = []
    thread = threading.Thread(
        target=lambda: found.append(
            worker_module.encode_batch(CarefulTokenizer(Odd(encode_batch=moody)), object(), batch, SystemClock())  # type: ignore[arg-type]
        )
    )
    thread.start()
    thread.join()
    assert [encoded.error_status if encoded.error else 200 for encoded in found[0]] == [200, 400, 200]


@pytest.mark.parametrize(
    ("name", "result", "what"),
    [
        ("token_bytes", "a", "not bytes"),
        ("token_text", b"a", "not a text"),
        ("token_text", None, "not a text"),
        ("is_byte_exact", "yes", "not True or False"),
        ("decode", b"a", "not a text"),
        ("info", [], "not a dictionary"),
        ("info", {"a": object()}, "no JSON"),
        ("info", {(1, 2): 3}, "no JSON"),
    ],
)
def test_results_of_another_type_are_refused(name: str, result: Any, what: str) -> None:
    careful = CarefulTokenizer(Odd(**{name: lambda *args, **kwargs: result}))
    arguments: dict[str, Any] = {"token_bytes": (1,), "token_text": (1,), "decode": ([1],)}
    with pytest.raises(TokenizerFailed, match=what):
        getattr(careful, name)(*arguments.get(name, ()), **({"skip_special_tokens": True} if name == "decode" else {}))


def test_texts_of_a_tokenizer_can_be_sent() -> None:
    class Text(str):
        pass

    odd = Odd(token_text=lambda token: Text("a\ud800"), info=lambda: {"a": ["\ud800", 10**30], "b": float("inf")})
    careful = CarefulTokenizer(odd)
    assert (careful.token_text(1), type(careful.token_text(1))) == ("a?", str)
    assert msgspec.json.encode(careful.info()).startswith(b'{"a":["?",1000000000')
    assert CarefulTokenizer(Odd(token_bytes=lambda token: bytearray(b"a"))).token_bytes(1) == b"a"


def test_half_a_surrogate_pair_never_leaves_text() -> None:
    """Frames are UTF-8: it would end the process that sends it."""

    def bad(texts: list[str], *, add_special_tokens: bool) -> Any:
        raise ValueError("bad \ud800 text")

    first, second = serve(CarefulTokenizer(Odd(encode_batch=bad)), "a", "b")
    for encoded in (first, second):
        assert encoded.error_status == 400
        assert "bad ? text" in encoded.error
    careful = CarefulTokenizer(Odd(decode=lambda ids, skip_special_tokens: "a\ud800z"))
    assert careful.decode([1], skip_special_tokens=True) == "a?z"
