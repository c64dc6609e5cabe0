"""The forms in which a GGUF file stores numbers.

What it is: for each number of a form its name, how many values a block of it holds, and in how many bytes.
What it does not know: what the bytes mean.
"""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """One way to store a row of values."""

    name: str
    values: int
    """In a block; a row is a whole number of blocks."""
    nbytes: int
    """Of a block."""

    def row_bytes(self, values: int) -> int:
        """Of a row of so many values, a multiple of `self.values`."""
        return values // self.values * self.nbytes


FORMS = {
    0: Form("F32", 1, 4),
    1: Form("F16", 1, 2),
    2: Form("Q4_0", 32, 18),
    3: Form("Q4_1", 32, 20),
    6: Form("Q5_0", 32, 22),
    7: Form("Q5_1", 32, 24),
    8: Form("Q8_0", 32, 34),
    10: Form("Q2_K", 256, 84),
    11: Form("Q3_K", 256, 110),
    12: Form("Q4_K", 256, 144),
    13: Form("Q5_K", 256, 176),
    14: Form("Q6_K", 256, 210),
    30: Form("BF16", 1, 2),
}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Forms of plain numbers -> config.json's names."""
OTHERS = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
"""Names of forms that cannot be read here."""
