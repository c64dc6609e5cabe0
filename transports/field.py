"""One line about one field.

What it is: `Field`, of which fields.py and api_fields.py hold tables.
What it does not know: which fields there are.
"""

from __future__ import annotations

from typing import NamedTuple

OPENAI, VLLM, SGLANG, PENSTOCK = "OpenAI", "vLLM", "SGLang", "Penstock"


class Field(NamedTuple):
    """`allowed`: "LOW to HIGH", "above LOW to HIGH" and "at most N ..." are held against the code by a test. `default`: what counts if it is left out, or
    null; "" is off. `of`: whose spelling it is."""

    does: str
    of: str = OPENAI
    allowed: str = ""
    default: str = ""

    @property
    def line(self) -> str:
        """All of it."""
        allowed = f" {self.allowed[:1].upper()}{self.allowed[1:]}." if self.allowed else ""
        return f"{self.does}{allowed}{f' Default: {self.default}.' if self.default else ''}"
