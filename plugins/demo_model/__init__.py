"""The shipped demo checkpoints: Brook, a tiny Llama-architecture chat model, its draft model and its speculative heads.

This package only says where the folders lie. Reading them is a model plugin's business, and how they were made is
in ``examples/demo_model``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["brook_path", "draft_path", "eagle3_path", "medusa_path", "mtp_path"]

_HERE = Path(__file__).resolve().parent


def brook_path() -> Path:
    """The Hugging Face folder of Brook."""
    return _HERE / "brook"


def draft_path() -> Path:
    """The Hugging Face folder of Brook-draft, which has Brook's tokenizer."""
    return _HERE / "brook-draft"


def medusa_path() -> Path:
    """The folder of Brook-Medusa, three Medusa heads."""
    return _HERE / "brook-medusa"


def eagle3_path() -> Path:
    """The folder of Brook-EAGLE-3."""
    return _HERE / "brook-eagle3"


def mtp_path() -> Path:
    """The folder of Brook-MTP, a multi-token-prediction layer."""
    return _HERE / "brook-mtp"
