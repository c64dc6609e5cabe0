"""Logging in each format, in a process of its own (it is global)."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import logging, sys
from penstock.core.telemetry.logs import configure_logging
log = configure_logging("info", sys.argv[1], "edge-3")
log.debug("hidden")
log.info("hello", key=5)
logging.getLogger("some.library").warning("from %s", "outside")
logging.getLogger("httpx").info("hidden too")
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("oops", exc_info=error)
"""


def lines(format: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE, format], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_lines_are_whole_and_name_the_process() -> None:
    for format in ("json", "auto"):  # no terminal here
        first, second, third = map(json.loads, lines(format))
        assert (first["event"], first["key"], first["level"], first["process"]) == ("hello", 5, "info", "edge-3")
        assert first["timestamp"].endswith("Z")
        assert (second["event"], second["logger"], second["process"]) == ("from outside", "some.library", "edge-3")
        assert "ZeroDivisionError" in third["exception"]


def test_console_lines_are_for_people() -> None:
    said = lines("console")
    assert "hello" in said[0]
    assert "key=5" in said[0]
    assert "edge-3" in said[0]
    assert "\x1b" not in said[0]  # colours on terminals only
    assert any("ZeroDivisionError" in line for line in said)
    assert not any("hidden" in line for line in said)
