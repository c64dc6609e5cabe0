"""GPTQ against its mathematics in float64, and as a method of `penstock quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from penstock.core.protocol.model_folder import demo_folder
from penstock.kernels.linear.scheme import Quantised, Scheme, dequantise, nearest, quantise
from penstock.plugins.commands.quant import calibrating, methods, writing
from penstock.plugins.commands.quant.command import quantize
from penstock.plugins.commands.quant.methods import DAMP, Rounded, awq, factor, gptq, gram, narrowed, smoothquant

SCHEMES = {
    "int4 groups": Scheme("int4", 32),
    "int4 rows": Scheme("int4"),
    "int8 rows": Scheme("int8"),
    "fp8 rows": Scheme("fp8_e4m3"),
    "fp8 blocks": Scheme("fp8_e4m3", 32, 8),
    "mxfp4": Scheme("fp4", 32),
}


def drawn(n: int = 24, k: int = 192, t: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs that depend on one another."""
    generator = torch.Generator().manual_seed(11)
    mixed = torch.randn(k // 4, k, generator=generator)
    x = torch.randn(t, k // 4, generator=generator) @ mixed + 0.3 * torch.randn(t, k, generator=generator)
    return torch.randn(n, k, generator=generator) * 0.1, x


def stepwise(weight: torch.Tensor, x: torch.Tensor, scheme: Scheme, scales: torch.Tensor) -> torch.Tensor:
    """One column after another by the definition: the best change of the columns that are left, from the inverse of their own Gram matrix."""
    h = x.double().T @ x.double()
    h += torch.eye(h.shape[0], dtype=torch.float64) * DAMP * h.diagonal().mean()
    left, n = weight.double().clone(), weight.shape[0]
    for j in range(weight.shape[1]):
        column = scales[:, j // scheme.group if scheme.group else 0].double().repeat_interleave(scheme.rows)[:n, None]
        rounded = nearest((left[:, j : j + 1] / column).float(), scheme.kind).double() * column
        error = left[:, j : j + 1] - rounded
        inverse = torch.linalg.inv(h[j:, j:])
        left[:, j + 1 :] -= error * inverse[0, None, 1:] / inverse[0, 0]
        left[:, j : j + 1] = rounded
    return left


@pytest.mark.parametrize("name", SCHEMES)
def test_gptq_is_its_definition_column_by_column(name: str) -> None:
    scheme = SCHEMES[name]
    weight, x = drawn()
    found = gptq(weight, factor(gram(x)), scheme, torch.float32)
    meant = stepwise(weight, x, scheme, found.scales)
    torch.testing.assert_close(dequantise(found).double(), meant, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_lose_less_than_by_rounding_to_the_nearest(name: str) -> None:
    scheme = SCHEMES[name]
    weight, x = drawn()

    def lost(q: Quantised) -> float:
        return float((x.double() @ (dequantise(q).double() - weight.double()).T).norm())

    assert lost(gptq(weight, factor(gram(x)), scheme, torch.float32)) < 0.8 * lost(quantise(weight, scheme))


def test_inputs_that_do_not_depend_on_one_another_leave_rounding_to_the_nearest() -> None:
    weight, _ = drawn()
    found = gptq(weight, factor(torch.eye(weight.shape[1], dtype=torch.float64)), SCHEMES["int4 groups"], torch.float32)
    assert torch.equal(dequantise(found), dequantise(quantise(weight, SCHEMES["int4 groups"])))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x = drawn()
    x[:, 5] = 0
    found = dequantise(gptq(weight, factor(gram(x)), SCHEMES["int4 groups"], torch.float32))
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(factor(torch.zeros(8, 8, dtype=torch.float64))).all())


def lost(found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (found.double() - weight.double()).T).norm())


def test_awq_moves_what_large_inputs_weigh_into_their_columns() -> None:
    weight, x = drawn()
    x[:, ::32] *= 30  # a few inputs are much larger than the others
    norm = torch.rand(weight.shape[1]).add(0.5).bfloat16()
    scheme = SCHEMES["int4 groups"]
    rounded = awq(x, [weight, -weight], scheme, norm, torch.float32)
    assert rounded.norm is not None
    assert rounded.norm.dtype == norm.dtype
    for q, meant in zip(rounded.weights, (weight, -weight), strict=True):
        as_read = x.double() / norm.double() * rounded.norm.double()  # the inputs that the written norm makes
        moved = float((as_read @ dequantise(q).double().T - x.double() @ meant.double().T).norm())
        assert moved < 0.7 * lost(dequantise(quantise(meant, scheme)), meant, x)
    assert float((rounded.norm / norm)[::32].mean()) < float((rounded.norm / norm).mean())


@pytest.mark.parametrize("name", SCHEMES)
def test_ranges_that_are_searched_for_lose_no_more(name: str) -> None:
    weight, x = drawn()
    h = torch.diag(gram(x).diagonal())
    found, plain = narrowed(weight, h, SCHEMES[name], torch.float32), quantise(weight, SCHEMES[name])
    damped = h + DAMP * h.diagonal().mean() * torch.eye(len(h))
    assert methods.loss(dequantise(found), weight, damped) <= methods.loss(dequantise(plain), weight, damped)
    assert SCHEMES[name].kind == "fp4" or (found.scales <= plain.scales).all()


def test_without_a_norm_awq_moves_nothing() -> None:
    weight, x = drawn()
    for norm in (None, torch.zeros(weight.shape[1])):
        rounded = awq(x, [weight], SCHEMES["int4 groups"], norm, torch.float32)
        assert rounded.norm is None
        assert torch.equal(dequantise(rounded.weights[0]), dequantise(narrowed(weight, gram(x), SCHEMES["int4 groups"], torch.float32)))


def test_smoothquant_makes_inputs_that_round_better() -> None:
    """Inputs in 8 bits a token with weights in 8 bits a row, in float64: as a server that rounds both multiplies them."""
    weight, x = drawn()
    x[:, ::32] *= 60
    norm = torch.rand(weight.shape[1]).add(0.5).bfloat16()
    scheme = SCHEMES["int8 rows"]

    def rounded(inputs: torch.Tensor) -> torch.Tensor:
        scales = inputs.abs().amax(1, keepdim=True) / 127
        return (inputs / scales).round() * scales

    meant = x.double() @ weight.double().T
    found = smoothquant(x, [weight], scheme, norm, torch.float32)
    assert found.norm is not None
    as_read = x.double() / norm.double() * found.norm.double()
    exact = as_read @ (weight.double() * norm.double() / found.norm.double()).T
    torch.testing.assert_close(exact, meant)
    smooth = float((rounded(as_read) @ dequantise(found.weights[0]).double().T - meant).norm())
    plain = float((rounded(x.double()) @ dequantise(quantise(weight, scheme)).double().T - meant).norm())
    assert smooth < 0.5 * plain
    without = smoothquant(x, [weight], scheme, None, torch.float32)
    assert without.norm is None
    assert torch.equal(without.weights[0].data, quantise(weight, scheme).data)


def test_smoothquant_is_for_rounded_inputs(tmp_path: Path) -> None:
    words = [str(demo_folder()), "--scheme", "w4a16", "--method", "smoothquant", "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(quantize, words)
    assert said.exit_code == 2
    assert "take gptq or awq" in said.output


PROMPTS = [[5, 9, 200, 31, 7, 80, 12], [400, 3, 77], list(range(40, 90))]


def written(out: Path, method: methods.Method) -> Path:
    plan = writing.plan(writing.open_source(demo_folder()), "w4a16", ["*layers.[1-7].*"])
    partial = writing.start(plan, out, {})
    calibrating.calibrate(plan, partial, method, PROMPTS, lambda done, count, what: None, 64)
    writing.finish(plan, partial, out)
    return out


def test_layers_get_the_inputs_that_the_rounded_ones_before_them_make(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def notes(x: torch.Tensor, weights: Sequence[torch.Tensor], scheme: Scheme, norm: torch.Tensor | None) -> Rounded:
        seen.append(x.float())
        return Rounded([quantise(weight, scheme, torch.bfloat16) for weight in weights])

    written(tmp_path / "out", notes)
    tokens = sum(map(len, PROMPTS))
    assert [tuple(x.shape) for x in seen] == [(tokens, 256), (tokens, 256), (tokens, 256), (tokens, 768)]  # qkv, o, gate and up, down
    again: list[torch.Tensor] = []

    def worse(x: torch.Tensor, weights: Sequence[torch.Tensor], scheme: Scheme, norm: torch.Tensor | None) -> Rounded:
        again.append(x.float())
        return Rounded([quantise(weight * 2, scheme, torch.bfloat16) for weight in weights])

    written(tmp_path / "worse", worse)
    assert torch.equal(seen[0], again[0])
    assert not torch.allclose(seen[1], again[1], rtol=0.1)


@pytest.mark.parametrize("make", [methods.gptq_of, methods.awq_of])
def test_an_ended_calibration_gives_what_a_whole_one_gives(make: Callable[[str], methods.Method], tmp_path: Path) -> None:
    plan = writing.plan(writing.open_source(demo_folder()), "w4a16", ["*layers.[2-7].*"])
    method, calls = make("w4a16"), []

    class Ended(Exception):
        pass

    def dies(x: torch.Tensor, weights: Sequence[torch.Tensor], scheme: Scheme, norm: torch.Tensor | None) -> Rounded:
        calls.append(x)
        if len(calls) == 6:
            raise Ended
        return method(x, weights, scheme, norm)

    def run(out: Path, method: methods.Method) -> Path:
        partial = writing.start(plan, out, {})
        calibrating.calibrate(plan, partial, method, PROMPTS, lambda done, count, what: None, 64)
        writing.finish(plan, partial, out)
        return out

    with pytest.raises(Ended):
        run(tmp_path / "ended", dies)
    finished = list((tmp_path / "ended.partial").glob("*.safetensors"))
    assert len(finished) == 1  # the first layer's
    ended, whole = run(tmp_path / "ended", method), run(tmp_path / "whole", method)
    for file in whole.iterdir():
        assert (ended / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_command_calibrates_with_the_users_texts(tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(["The river is long.", "", "What is 3 + 4?"]))
    words = [str(demo_folder()), "--scheme", "w4a16", "--method", "gptq", "--calibration", str(texts), "--ignore", "*layers.[1-7].*"]
    said = CliRunner().invoke(quantize, [*words, "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert "7 layers in w4a16 (gptq)" in said.output
    texts.write_text("[]")
    said = CliRunner().invoke(quantize, [*words, "--out", str(tmp_path / "none")])
    assert said.exit_code == 2
    assert "there is no text in it" in said.output
