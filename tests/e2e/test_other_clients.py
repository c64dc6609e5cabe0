"""Clients that this project does not depend on, each in a virtual environment of its own: CLIENT_VENVS/NAME (by default .clients/NAME) has the
Python that runs tests/clients/smoke_NAME.py. A client without one is skipped."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "tests" / "clients").glob("smoke_*.py"))
HOME = Path(os.environ.get("CLIENT_VENVS") or ROOT / ".clients")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_client_gets_what_it_asks_for(server: Any, script: Path) -> None:
    python = HOME / script.stem.removeprefix("smoke_") / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no {python}")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run([python, script, f"{server.url}/v1"], capture_output=True, text=True, timeout=150, env=env, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
