"""Embedding look-up."""

from penstock.kernels.embedding.api import embedding

__all__ = ["embedding"]
