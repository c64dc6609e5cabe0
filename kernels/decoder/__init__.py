"""A whole decoder-only transformer as one program: one call a step."""

from penstock.kernels.decoder.api import DecoderLayer, DecoderProgram

__all__ = ["DecoderLayer", "DecoderProgram"]
