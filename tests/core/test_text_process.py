"""The text process: where messages to engines go."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest

from penstock.core.processes import text_process
from penstock.core.processes.text_process import TextProcess
from penstock.core.protocol.columns import i64
from penstock.core.protocol.config import build
from penstock.core.protocol.control import Boot, Message
from penstock.core.protocol.messages import Abort, Extension


class Link:
    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)


def test_an_extension_to_an_engine_that_is_not_there_is_told_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text_process, "configure_logging", lambda *_: None)
    mine, other = socket.socketpair()
    with mine, other, caplog.at_level(logging.WARNING):
        process: Any = TextProcess(Boot(role="text", id=0, epoch=1, config=build({}), run_dir="", root_pid=0, module=""), mine)
        extension = Extension(kind="t.ask", data=b"")
        process._to_engine(extension, None)
        link = process._engines[1] = Link()
        for index in (7, 7, 1, None):
            process._to_engine(extension, index)
        process._to_engine(Abort(seqs=i64([1])), 7)  # an engine that was lost: text knows, and deals with its requests
    assert link.sent == [extension, extension]
    assert caplog.messages == [
        "an extension of the kind 't.ask' to any engine is dropped: none is connected",
        "an extension of the kind 't.ask' to engine 7 is dropped: none is connected",
    ]
    assert process._lost.count == 3
