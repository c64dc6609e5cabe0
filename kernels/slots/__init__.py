"""The device's slots: token histories and block tables, and the index tensors of a step made from them. GPU only; see triton.py."""
