"""The C kernels' library: sources beside this file, built with the system's C compiler on first use.

What it is: `library()`, the loaded library or None where there is no working compiler (then every operation runs its torch reference), and
`describe()`, one line for the start-up report.
What it does not know: what the kernels compute.
"""

from penstock.kernels.native.bind import Layer, Native, Program, Step, Weight, describe, library

__all__ = ["Layer", "Native", "Program", "Step", "Weight", "describe", "library"]
