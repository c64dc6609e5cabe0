"""One actor a file: state and `handle`, no I/O, numpy at most."""
