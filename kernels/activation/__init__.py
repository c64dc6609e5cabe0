"""Gated activations of the MLP: act(gate) * up."""

from penstock.kernels.activation.api import ACTIVATIONS, Activation, gated

__all__ = ["ACTIVATIONS", "Activation", "gated"]
