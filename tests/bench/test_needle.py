"""The model that is made to find needles finds them, less sharp questions find fewer, and a KV cache of 8 bits costs next to none: the real engine on a CPU, from prompt to token."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.plugins.commands.bench import needle

SMALL = needle.Shape(content=64, heads=4, kv_heads=2, dim=64)
FAINT = needle.Plan(needles=150, others=512, values=256, sharpness={2048: 5.0, 2032: 3.8})
TWINS = needle.Plan(needles=150, others=1024, values=256, sharpness={2048: 16.0}, twins=3)


def found(folder: Path, plan: needle.Plan, kind: str) -> list[int]:
    """Of each length."""
    cases = [needle.case(plan, length, 3) for length in plan.sharpness]
    return [sum(one) for one in needle.ask(folder, cases, kind, "cpu", 50)]


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """(the folder, what a wide cache finds)."""
    folder = needle.write(tmp_path_factory.mktemp("faint"), SMALL, FAINT, 3)
    return folder, found(folder, FAINT, "auto")


def test_less_sharp_questions_find_fewer(faint: tuple[Path, list[int]]) -> None:
    _, (sharp, dull) = faint
    assert 0.85 * 150 < sharp < 150  # some are lost: the test is none that nothing could fail
    assert dull < sharp - 15


@pytest.mark.parametrize("kind", ["fp8_e4m3", "int8"])
def test_eight_bits_find_what_sixteen_do(kind: str, faint: tuple[Path, list[int]]) -> None:
    folder, wide = faint
    assert all(abs(ours - other) <= 3 for ours, other in zip(found(folder, FAINT, kind), wide, strict=True))


def test_keys_that_resemble_a_needles_show_coarse_codes(tmp_path: Path) -> None:
    folder = needle.write(tmp_path, SMALL, TWINS, 3)
    (wide,), (fine,), (coarse,) = (found(folder, TWINS, kind) for kind in ("auto", "int8", "fp8_e5m2"))
    assert 80 < wide < 130
    assert abs(fine - wide) <= 4
    assert coarse < wide - 8


def test_a_case_has_each_needle_once_and_its_twins() -> None:
    one = needle.case(TWINS, 2048, 5)
    pairs = dict(zip(one.context[::2], one.context[1::2], strict=True))
    first = TWINS.vocab - TWINS.needles
    assert len(one.context) == 2048
    for question, answer in zip(one.questions, one.answers, strict=True):
        key = question - first
        assert one.context[::2].count(key) == 1
        assert pairs[key] == answer
        assert all(one.context[::2].count(key + twin * TWINS.needles) == 1 for twin in (1, 2, 3))


def test_needles_are_compared_one_by_one() -> None:
    rows = needle.summary({"auto": [[True, True, False, True]], "int8": [[True, False, True, True]]}, [64])["64"]
    assert rows["auto"] == {"found": 3, "of": 4, "by_thirds": [1, 1, 1]}
    assert (rows["int8"]["lost"], rows["int8"]["won"]) == (1, 1)
    low, high = rows["int8"]["difference"]
    assert low < 0 < high
