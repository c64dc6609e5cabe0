"""Row-wise kernels in Triton against the references: norm, rotation and cache write, activations, gathers, argmax, block copies."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.activation import reference as activation_reference
from penstock.kernels.activation import triton as activation
from penstock.kernels.argmax import reference as argmax_reference
from penstock.kernels.argmax import triton as argmax
from penstock.kernels.attention import triton as attention
from penstock.kernels.embedding import triton as embedding
from penstock.kernels.rmsnorm import reference as norm_reference
from penstock.kernels.rmsnorm import triton as rmsnorm
from penstock.kernels.rope import reference as rope_reference
from penstock.kernels.rope import triton as rope
from penstock.kernels.slots import triton as slots

ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, often: float = 0.05) -> None:
    """At most two roundings apart (exp and rsqrt differ by devices, and some results are rounded twice), and rarely."""
    got, want = got.cpu().double(), want.cpu().double()
    assert not got.isnan().any()
    assert ((got - want).abs() <= 2 * ULP[dtype] * want.abs() + 1e-6).all()
    assert (got != want).float().mean() < often


@pytest.mark.parametrize("k", [64, 100, 1536])
def test_norms(k: int, dtype: torch.dtype, device: str) -> None:
    x, residual, weight = ((torch.randn(*shape) * 2).to(dtype).to(device) for shape in ((5, k), (5, k), (k,)))
    out = torch.full_like(x, torch.nan)
    assert rmsnorm.rms_norm(x, weight, 1e-5, out) is out
    near(out, norm_reference.rms_norm(x.cpu(), weight.cpu(), 1e-5), dtype)
    total = residual + x
    got = rmsnorm.add_rms_norm(x, residual, weight, 1e-5)
    near(residual, total, dtype)
    near(got, norm_reference.rms_norm(total.cpu(), weight.cpu(), 1e-5), dtype)
    alone = rmsnorm.rms_norm(x[3:4], weight, 1e-5)
    assert torch.equal(alone[0], out[3])
    strided = torch.zeros(5, 2 * k, dtype=dtype, device=device)
    strided[:, :k] = x
    assert torch.equal(rmsnorm.rms_norm(strided[:, :k], weight, 1e-5), out)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
def test_gated(kind: str, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(3, 2 * 333) * 4).to(dtype).to(device)
    x[0, 0] = -30.0
    out = torch.full((3, 333), torch.nan, dtype=dtype, device=device)
    activation.gated(kind, x, out)
    gate, up = x.cpu().double().chunk(2, -1)  # in float64: torch's own float32 gelu loses the far negative tail to cancellation
    near(out, (activation_reference.act(kind, gate).to(dtype).double() * up).to(dtype), dtype, 0.2)  # the far tail of 1 + erf in float32


def test_gathers(dtype: torch.dtype, device: str) -> None:
    table = torch.randn(9, 70).to(dtype).to(device)
    ids = torch.tensor([8, 0, -1, 3, 3], dtype=torch.int32, device=device)
    got = embedding.embedding(ids, table, torch.full((5, 70), torch.nan, dtype=dtype, device=device))
    assert torch.equal(got[[0, 1, 3, 4]], table[[8, 0, 3, 3]])
    assert (got[2] == 0).all()
    assert torch.equal(embedding.gather_rows(table[:, :33], ids[:2]), table[[8, 0], :33])


@pytest.mark.parametrize(("dim", "rotary", "norms"), [(64, 64, False), (80, 80, True), (64, 32, True), (96, 96, False)])
def test_rope_and_cache(dim: int, rotary: int, norms: bool, dtype: torch.dtype, device: str) -> None:
    heads, kv_heads, tokens, size = 5, 2, 6, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype).to(device)
    angles = torch.rand(40, rotary // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1).to(device)
    positions = torch.tensor([0, 39, 5, 6, 7, 0], dtype=torch.int32, device=device)
    where = torch.tensor([17, 0, 31, 47, 33, -1], dtype=torch.int32, device=device)
    q_norm, k_norm = (torch.randn(dim).to(dtype).to(device) if norms else None for _ in range(2))
    caches = [torch.full((3, kv_heads, size, dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    out = torch.full((tokens, heads, dim), torch.nan, dtype=dtype, device=device)
    kept = torch.full((tokens, kv_heads, dim), torch.nan, dtype=dtype, device=device)
    rope.rope_and_cache(qkv, positions, table, *caches, where, heads, kv_heads, q_norm, k_norm, 1e-6, out, k_out=kept)
    split = qkv.cpu().view(tokens, -1, dim)
    q, k, v = split[:, :heads], split[:, heads:-kv_heads], split[:, -kv_heads:]
    if q_norm is not None and k_norm is not None:
        q, k = norm_reference.rms_norm(q, q_norm.cpu(), 1e-6), norm_reference.rms_norm(k, k_norm.cpu(), 1e-6)
    turned = table.cpu()[positions.cpu().long()]
    near(out, rope_reference.rotate(q, turned), dtype)
    near(kept, rope_reference.rotate(k, turned), dtype)
    assert torch.equal(attention.read_kv(caches[0], where[:5]), kept[:5])
    assert torch.equal(attention.read_kv(caches[1], where[:5]).cpu(), v[:5])
    assert sum(int(cache.isnan().sum()) for cache in caches) == 2 * kv_heads * dim * (3 * size - 5)


@pytest.mark.parametrize("vocab", [1, 255, 700])
def test_argmax(vocab: int, device: str) -> None:
    logits = torch.randn(7, vocab)
    logits[1] = 2.0
    logits[2] = -torch.inf
    logits[3, vocab // 2] = torch.nan
    logits[4, 0] = torch.inf
    if vocab > 2:
        logits[5] = -torch.inf
        logits[5, [vocab - 2, vocab - 1]] = -3.0
    out = torch.full((7,), -7, dtype=torch.int32, device=device)
    argmax.argmax(logits.to(device), out)
    assert torch.equal(out.cpu(), argmax_reference.argmax(logits))


def test_copy_blocks(dtype: torch.dtype, device: str) -> None:
    pool = torch.randn(4, 6, 2, 16, 20).to(dtype).to(device)
    before = pool.clone()
    source, target = (torch.tensor(ids, dtype=torch.int32, device=device) for ids in ([0, 0, 4, -1], [1, 5, 2, 3]))
    slots.copy_blocks(pool, source, target)
    want = before.clone()
    want[:, [1, 5, 2]] = before[:, [0, 0, 4]]
    assert torch.equal(pool, want)
    layers = before.clone()
    slots.copy_blocks(layers.transpose(0, 1)[1:4].transpose(0, 1), source[:1] + 2, target[:1])
    want = before.clone()
    want[:, 2] = before[:, 3]
    assert torch.equal(layers, want)
