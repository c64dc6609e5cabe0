"""What strangers raise, made safe to speak of and to pass on; and errors that can be sent whatever a plugin gives them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.core.contract.guard import fault
from penstock.core.processes.supervisor import failure_of
from penstock.core.protocol.errors import InvalidRequest, PenstockError, Wild, described, shown, tamed


class Mute(Exception):
    """Nobody gets a word out of it."""

    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class NoText(Exception):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


class Half(Exception):
    def __str__(self) -> str:
        return "bad \ud800 text"


def test_any_exception_can_be_said() -> None:
    assert described(ValueError("no such thing")) == "ValueError: no such thing"
    assert described(KeyError()) == "KeyError"
    assert described(Mute()) == "Mute: (no text: asking for it raised SystemExit)"
    assert described(NoText()) == "NoText: (no text: asking for it raised TypeError)"
    assert described(Half()) == "Half: bad ? text"
    assert len(described(ValueError("x" * 10**6), 300)) == 300
    assert shown(Mute()) == "a Mute that cannot be shown"
    assert shown("\ud800") == r"'\ud800'"


def test_what_speaks_of_a_plugin_uses_it() -> None:
    assert "broken: order() failed with Mute: (no text" in fault("The policy", "order", Mute(), "Fix it.").message
    assert "failed with Mute: (no text" in msgspec.json.decode(failure_of(Mute()))["message"]

    class Own(Exception):
        message = "mine, without a code"

    assert "failed with Own" in msgspec.json.decode(failure_of(Own()))["message"]


@pytest.mark.parametrize("message", ["bad \ud800", 3, None, Mute(), KeyError("x"), ""])
def test_an_error_of_a_plugin_can_always_be_sent(message: Any) -> None:
    error = InvalidRequest(message, param=message, code=message)
    assert error.message, "none would look like success"
    msgspec.json.encode([error.message, error.param, error.code])


def test_an_error_whose_init_forgets_ours_has_words_too() -> None:
    class Own(PenstockError):
        def __init__(self) -> None:
            pass

    assert Own().message
    assert Own().code == "internal_error"


def on_a_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(1), GeneratorExit(), BaseException("panic")])
def test_nothing_that_a_plugin_raises_ends_a_thread(raised: BaseException) -> None:
    found = on_a_thread(lambda: tamed(raised))
    assert isinstance(found, Wild)
    assert str(found).startswith(type(raised).__name__)


def test_an_exception_stays_what_it_is() -> None:
    error = ValueError("x")
    assert tamed(error) is error


def test_ctrl_c_is_the_users_where_somebody_listens_to_it() -> None:
    with pytest.raises(KeyboardInterrupt):
        tamed(KeyboardInterrupt())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a child of root: then it can only be a plugin's
    try:
        assert isinstance(tamed(KeyboardInterrupt()), Wild)
    finally:
        signal.signal(signal.SIGINT, before)
