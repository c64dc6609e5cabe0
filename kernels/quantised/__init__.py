"""Linear layers over quantised weights, on a CPU (api.py) and on a GPU (triton.py); what such a weight is: kernels/linear/scheme.py."""
