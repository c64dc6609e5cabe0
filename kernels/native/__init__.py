"""The C kernels' library: sources beside this file, built with the system's C compiler on first use.

What it is: `library()`, the loaded library or None where there is no working compiler (then every operation runs its torch reference).
What it does not know: what the kernels compute.
"""

from __future__ import annotations

from penstock.kernels.native.build import Native, describe, library

__all__ = ["Native", "describe", "library"]
