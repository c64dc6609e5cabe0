"""A whole decoder-only transformer as one program: one call a step."""

from penstock.kernels.decoder.api import DecoderProgram
from penstock.kernels.decoder.parts import DecoderLayer

__all__ = ["DecoderLayer", "DecoderProgram"]
