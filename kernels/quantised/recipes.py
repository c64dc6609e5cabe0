"""Instructions that widen four bytes of codes to 16-bit floats, as texts of PTX for Triton's inline assembly.

What it is: `RECIPES`, by (kind, whether to bfloat16). Two values are made at a time, by placing bits of a code in the mantissa or the exponent of a float (as in Kim
et al. 2022, arXiv 2211.10017) and one exact subtraction or multiplication: no conversion instruction, of which a multiprocessor has few. Values that are not finite
do not occur: readers refuse them.
What it does not know: tiles, weights.
"""

from __future__ import annotations

import torch

from penstock.kernels.linear.scheme import NF4

_SPREAD = "prmt.b32 p, $IN, 0, 0x4140; prmt.b32 q, $IN, 0, 0x4342;"  # four bytes into the low halves of two words
_RAISED = "prmt.b32 p, $IN, 0, 0x1404; prmt.b32 q, $IN, 0, 0x3424;"  # into the high halves


def _asm(body: str, outputs: int) -> str:
    return "{ .reg .b32 p, q, u, v, c; " + body.replace("$IN", f"${outputs}") + " }"


def _eight(shift: int, mask: int, kind: str, power: int) -> str:
    """For FP8: the sign stays where it is, the rest moves; then a multiplication with a power of two."""
    body = f"mov.b32 c, {power}; "
    for i, r in ((0, "p"), (1, "q")):
        body += f"and.b32 u, {r}, 0x80008000; shr.b32 v, {r}, {shift}; lop3.b32 u, v, {mask}, u, 0xEA; mul.rn.{kind} ${i}, u, c; "
    return _asm(_RAISED + body, 2)


def _looked_up(table: tuple[float, ...], dtype: torch.dtype) -> str:
    """Sixteen values, each rounded to `dtype`, looked up a byte of the value at a time: prmt picks four of eight bytes by four digits of three bits."""
    bits = torch.tensor(table).to(dtype).view(torch.int16).tolist()
    words = []  # low bytes of entries 0-3, 4-7, 8-11, 12-15, then high bytes
    for shift in (0, 8):
        for first in range(0, 16, 4):
            words.append(sum(((bits[first + i] >> shift) & 255) << 8 * i for i in range(4)))
    text = ".reg .b32 d, e, f, h, m; "
    for half, (low, high) in enumerate(
        (("$0", "$2"), ("$1", "$3"))
    ):  # bytes 0 and 1, then 2 and 3, of which each holds two codes: four digits
        text += f"shr.b32 d, $IN, {16 * half}; and.b32 e, d, 0x7777; "
        text += "shr.u32 f, d, 3; and.b32 f, f, 0x1111; prmt.b32 m, 0x0000FF00, 0, f; "  # bytes of ones where a code is 8 or more
        for byte, name in ((0, "p"), (4, "q")):
            text += f"mov.b32 u, {words[byte]:#x}; prmt.b32 u, u, {words[byte + 1]:#x}, e; "
            text += f"mov.b32 v, {words[byte + 2]:#x}; prmt.b32 v, v, {words[byte + 3]:#x}, e; lop3.b32 {name}, m, v, u, 0xCA; "
        text += f"prmt.b32 {low}, p, q, 0x6240; prmt.b32 {high}, p, q, 0x7351; "
    return text


def _recipes() -> dict[tuple[str, bool], str]:
    """Instructions that widen four bytes, by (kind, whether to bfloat16)."""
    out = {}
    for wide, one, half in ((True, 0x43004300, 0x43084308), (False, 0x64006400, 0x64086408)):
        kind = "bf16x2" if wide else "f16x2"
        low = "".join(f"lop3.b32 ${i}, {r}, 0x000F000F, {one}, 0xEA; " for i, r in ((0, "p"), (1, "q")))
        high = "".join(f"shr.b32 {r}, {r}, 4; lop3.b32 ${i}, {r}, 0x000F000F, {one}, 0xEA; " for i, r in ((2, "p"), (3, "q")))
        less = f"mov.b32 c, {half}; " + "".join(f"sub.rn.{kind} ${i}, ${i}, c; " for i in range(4))
        out["int4", wide] = _asm(_SPREAD + low + high + less, 4)
        # with zero points: the second operand holds 128 (or 1024) more than that of the first half, the third of the second
        less = "".join(f"sub.rn.{kind} ${i}, ${i}, ${5 + i}; " for i in range(4))
        out["int4z", wide] = _asm(_SPREAD + low + high + less, 4)
        less = "".join(f"sub.rn.{kind} ${i}, ${i}, ${5 + i % 2}; " for i in range(4))  # both halves have one
        out["int4r", wide] = _asm(_SPREAD + low + high + less, 4)
        if wide:  # low seven bits and sign apart: (128 + low) - (128 + 128 sign)
            parts = "".join(
                f"lop3.b32 u, {r}, 0x007F007F, {one}, 0xEA; lop3.b32 v, {r}, 0x00800080, {one}, 0xEA; sub.rn.{kind} ${i}, u, v; "
                for i, r in ((0, "p"), (1, "q"))
            )
        else:
            parts = "mov.b32 c, 0x64806480; " + "".join(
                f"lop3.b32 u, {r}, 0x00800080, {one}, 0xBE; sub.rn.{kind} ${i}, u, c; " for i, r in ((0, "p"), (1, "q"))
            )
        out["int8", wide] = _asm(_SPREAD + parts, 2)
        # sign, exponent and mantissa to their places; the exponents' bias by a multiplication with a power of two, which is exact
        shift, mask, power = (4, 0x07F007F0, 0x7B807B80) if wide else (1, 0x3F803F80, 0x5C005C00)
        out["fp8_e4m3", wide] = _eight(shift, mask, kind, power)
        out["fp8_e5m2", wide] = _eight(3, 0x0FE00FE0, kind, 0x77807780) if wide else _asm(_RAISED + "mov.b32 $0, p; mov.b32 $1, q;", 2)
        shift, mask, power = (6, 0x01C001C0, 0x7E807E80) if wide else (9, 0x0E000E00, 0x74007400)
        steps = ""
        for i, r, first in ((0, "p", ""), (1, "q", ""), (2, "p", "shr.b32 p, p, 4; "), (3, "q", "shr.b32 q, q, 4; ")):
            steps += first + f"shl.b32 u, {r}, 12; and.b32 u, u, 0x80008000; shl.b32 v, {r}, {shift}; lop3.b32 u, v, {mask}, u, 0xEA; "
            steps += f"mul.rn.{kind} ${i}, u, c; "
        out["fp4", wide] = _asm(_SPREAD + f"mov.b32 c, {power}; " + steps, 4)
        # with scales that are powers of two: the second operand holds those of the first half, the third of the second
        steps += "".join(f"mul.rn.{kind} ${i}, ${i}, ${5 + i}; " for i in range(4))
        out["fp4s", wide] = _asm(_SPREAD + f"mov.b32 c, {power}; " + steps, 4)
        out["nf4", wide] = _asm(_looked_up(NF4, torch.bfloat16 if wide else torch.float16), 4)
        for name, outputs, before in (
            ("int4", 4, 0),
            ("int4r", 4, 2),
            ("nf4", 4, 0),
            ("fp4", 4, 0),
            ("int8", 2, 0),
            ("fp8_e4m3", 2, 0),
            ("fp8_e5m2", 2, 0),
        ):
            # times a scale that is the sum of two 16-bit floats, the last two operands: all but exact before the one rounding of the last instruction
            times = "".join(
                f"mul.rn.{kind} u, ${i}, ${large + 2}; fma.rn.{kind} ${i}, ${i}, ${large}, u; "
                for i in range(outputs)
                for large in (outputs + 1 + before + i % 2,)
            )
            out[name + "q", wide] = out[name, wide].removesuffix("}") + times + "}"
    return out


RECIPES = _recipes()
