"""Root-mean-square normalisation, alone and fused with the residual add."""

from penstock.kernels.rmsnorm.api import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
