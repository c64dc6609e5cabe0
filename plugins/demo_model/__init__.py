"""The shipped demo checkpoints: Brook, a tiny Llama-architecture chat model, and Brook-draft, its draft.

This package only says where the folders lie. Reading them is a model plugin's business, and how they were made is
in ``examples/demo_model``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["brook_path", "draft_path"]

_HERE = Path(__file__).resolve().parent


def brook_path() -> Path:
    """The Hugging Face folder of Brook."""
    return _HERE / "brook"


def draft_path() -> Path:
    """The Hugging Face folder of Brook-draft, which has Brook's tokenizer."""
    return _HERE / "brook-draft"
