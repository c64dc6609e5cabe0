"""Linear layers over quantised weights on a GPU; what such a weight is: kernels/linear/scheme.py."""
