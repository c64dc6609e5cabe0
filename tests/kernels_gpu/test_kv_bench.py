"""The bench's own arithmetic: slopes and break-even points of made-up times."""

from __future__ import annotations

import pytest

from penstock.kernels.kv_bench import WHAT, summary


def test_slopes_and_break_even_points() -> None:
    times = {"bf16": lambda context: 10 + 0.01 * context, "int8": lambda context: 14 + 0.005 * context, "fp8_e5m2": lambda context: 99.0}
    rows = [
        {"what": f"{WHAT}, {kind}", "case": f"{count} x {context}", "us": time(context)}
        for kind, time in times.items()
        for count in (1, 16)
        for context in (512, 1024, 4096, 8192)
    ]
    found = {row["case"]: row for row in summary([*rows, {"what": "copy", "case": "4 GiB", "us": 1.0}])}
    assert set(found) == {f"{kind}, {count} rows" for kind in ("int8", "fp8_e5m2") for count in (1, 16)}
    assert found["int8, 16 rows"]["of_bf16"] == pytest.approx(0.5)
    assert found["int8, 1 rows"]["us_1k_keys"] == pytest.approx(5.0)
    assert found["int8, 1 rows"]["faster_from"] == 1024
    assert found["fp8_e5m2, 1 rows"]["faster_from"] is None
