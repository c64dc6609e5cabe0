"""Starts a Penstock server for one benchmark run and stops it.

What it is: a context manager around `python -m penstock serve` on a free loopback port. What it does not know: what is measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import click


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(args: list[str], *, timeout_s: float = 180.0) -> Iterator[str]:
    """Yield the base URL of a ready server; SIGTERM it afterwards."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "serve", *args, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PENSTOCK_LOG_LEVEL": os.environ.get("PENSTOCK_LOG_LEVEL", "warning")},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            if process.poll() is not None:
                raise click.ClickException(f"The server left with status {process.returncode} before it was ready.")
            if time.monotonic() > deadline:
                raise click.ClickException(f"The server was not ready within {timeout_s:.0f} s.")
            try:
                with urllib.request.urlopen(url + "/health/ready", timeout=2):
                    break
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
