"""Makes the scripts of ``examples/demo_model`` importable: they are run as files, not installed."""

from __future__ import annotations

import sys
from pathlib import Path

_SCRIPTS = str(Path(__file__).resolve().parents[2] / "examples" / "demo_model")
if _SCRIPTS not in sys.path:
    sys.path.append(_SCRIPTS)
