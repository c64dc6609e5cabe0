"""Makes the kit of other vocabularies importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "devices_gpu"))  # for vocabularies.py: pytest's importlib mode does not
