"""Compute kernels: one folder an operation, with a reference, the fast versions, and a checked entry. Imports torch, triton and numpy only."""
