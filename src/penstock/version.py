"""The version, in one place and free of imports, so that the build can read it."""

__version__ = "0.1.0"
