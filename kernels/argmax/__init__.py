"""Greedy choice over rows of logits."""

from penstock.kernels.argmax.api import argmax

__all__ = ["argmax"]
