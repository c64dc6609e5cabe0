"""Penstock: an LLM inference server. `from penstock import LLM, SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.version import __version__

__all__ = ["LLM", "Beam", "BeamSearchParams", "GuidedDecodingParams", "SamplingParams", "StructuredOutputsParams", "__version__"]

if TYPE_CHECKING:
    from penstock.core.llm import LLM
    from penstock.core.protocol.sampling import Beam, BeamSearchParams, GuidedDecodingParams, SamplingParams, StructuredOutputsParams


def __getattr__(name: str) -> Any:
    # Lazy: `penstock --help` and the root process must not pay for what only the Python API needs.
    if name == "LLM":
        from penstock.core.llm import LLM

        return LLM
    if name in __all__ and name != "__version__":
        from penstock.core.protocol import sampling

        return getattr(sampling, name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
