"""Linear layers of which weights and inputs have 8 bits, on a GPU."""
