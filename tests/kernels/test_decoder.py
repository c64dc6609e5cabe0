"""The decoder program: equal to the separate operations bit for bit, whatever shares the step, over wide and quantised weights and caches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from penstock.kernels.argmax import argmax
from penstock.kernels.attention import Scales
from penstock.kernels.decoder import DecoderLayer, DecoderProgram, reference
from penstock.kernels.linear import PackedGated, PackedLinear, pack, pack_gated
from penstock.kernels.linear.scheme import Scheme, quantise
from penstock.kernels.quantised.api import pack_quantised, pack_quantised_gated


def i32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Case:
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    inter: int = 100
    vocab: int = 77
    layers: int = 2
    qk_norm: bool = False
    bias: bool = False
    windows: tuple[int, ...] = (0, 0)
    block: int = 16
    rotary: int = 32
    act: str = "silu"
    schemes: tuple[Scheme | None, ...] = (None, None, None, None, None)  # of qkv, o, gate and up, down, head
    kv: str = ""  # of codes.KINDS
    fixed: tuple[float, float] | None = None


CASES = {
    "llama": Case(),
    "qwen3": Case(qk_norm=True, heads=6, kv_heads=2, dim=16, rotary=16, act="gelu_tanh"),
    "qwen2-sliding": Case(bias=True, windows=(40, 0), hidden=50, heads=3, kv_heads=1, dim=80, rotary=40, block=32),
    "int8": Case(bias=True, schemes=(Scheme("int8"),) * 5),
    "mixed": Case(
        qk_norm=True,
        heads=6,
        kv_heads=2,
        dim=16,
        rotary=16,
        schemes=(Scheme("int4", 32, 1, True), None, Scheme("nf4", 24), Scheme("fp8_e4m3", 48, 64), None),
    ),
    "kv-int8": Case(kv="int8"),
    "kv-e4m3": Case(kv="fp8_e4m3", qk_norm=True, heads=6, kv_heads=2, dim=16, rotary=16, windows=(40, 0)),
    "kv-e5m2": Case(kv="fp8_e5m2", hidden=50, heads=3, kv_heads=1, dim=80, rotary=40, block=32, fixed=(0.01, 0.02)),
}


def linear(scheme: Scheme | None, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    return pack(weight, bias) if scheme is None else pack_quantised([quantise(weight, scheme)], bias)


def gated(scheme: Scheme | None, gate: Tensor, up: Tensor, act: str) -> PackedGated:
    if scheme is None:
        return pack_gated(gate, up, act)  # type: ignore[arg-type]
    return pack_quantised_gated(quantise(gate, scheme), quantise(up, scheme), act)  # type: ignore[arg-type]


def build(case: Case, dtype: torch.dtype, blocks: int = 24) -> DecoderProgram:
    def rand(*shape: int, scale: float = 0.2) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype)

    width = (case.heads + 2 * case.kv_heads) * case.dim
    qkv, o, gate_up, down, head = case.schemes
    layers = [
        DecoderLayer(
            attn_norm=1 + rand(case.hidden),
            qkv=linear(qkv, rand(width, case.hidden), rand(width) if case.bias else None),
            o=linear(o, rand(case.hidden, case.heads * case.dim)),
            mlp_norm=1 + rand(case.hidden),
            gate_up=gated(gate_up, rand(case.inter, case.hidden), rand(case.inter, case.hidden), case.act),
            down=linear(down, rand(case.hidden, case.inter)),
            q_norm=1 + rand(case.dim) if case.qk_norm else None,
            k_norm=1 + rand(case.dim) if case.qk_norm else None,
            window=case.windows[index],
        )
        for index in range(case.layers)
    ]
    shape = (case.layers, 2, case.kv_heads, case.block, case.dim)  # as a pool: all layers' in a block
    if case.kv:
        codes = torch.Size(shape).numel()
        pool = torch.full((blocks, codes + codes // case.dim * 2), 0xFF, dtype=torch.uint8)  # a NaN, whatever it is taken for
        pages, of_pages = pool[:, :codes].view(-1, *shape), pool[:, codes:].view(torch.bfloat16).view(-1, *shape[:-1])
        scales = [Scales(case.kv, of_pages[:, index, 0], of_pages[:, index, 1], case.fixed) for index in range(case.layers)]
    else:
        pages, scales = torch.full((blocks, *shape), torch.nan, dtype=dtype), []
    caches = [[pages[:, index, which] for index in range(case.layers)] for which in range(2)]
    angle = torch.rand(400, case.rotary // 2) * 6
    return DecoderProgram(
        embedding=rand(case.vocab, case.hidden, scale=1.0), layers=layers, final_norm=1 + rand(case.hidden), lm_head=linear(head, rand(case.vocab, case.hidden)),
        num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim, eps=1e-5, cos_sin=torch.cat((angle.cos(), angle.sin()), 1),
        k_caches=caches[0], v_caches=caches[1], scales=scales,
    )  # fmt: skip


def memory(program: DecoderProgram) -> list[Tensor]:
    """Everything that a step may leave behind."""
    parts = program.parts
    return parts.k_caches + parts.v_caches + [tensor for scales in parts.scales if scales is not None for tensor in scales[1:3]]


def poison(program: DecoderProgram) -> None:
    for held in memory(program):
        held.fill_(torch.nan if held.is_floating_point() else 0xFF)


class Sequence:
    """A sequence of random tokens with its own blocks."""

    def __init__(self, program: DecoderProgram, length: int, blocks: list[int]) -> None:
        self.block = program.parts.k_caches[0].shape[2]
        self.tokens = torch.randint(0, program.parts.embedding.shape[0], (length,)).int()
        self.blocks = [blocks.pop() for _ in range(-(-length // self.block))]


def arguments(parts: list[tuple[Sequence, int, int]], every: bool = True) -> list[Tensor]:
    """Step arguments for positions [begin, end) of each sequence; results for every token, or for the last of each part."""
    width = max(len(s.blocks) for s, _, _ in parts)
    tokens = torch.cat([s.tokens[a:b] for s, a, b in parts])
    positions = torch.cat([torch.arange(a, b) for _, a, b in parts])
    slots = torch.cat([i32(s.blocks)[torch.arange(a, b) // s.block] * s.block + torch.arange(a, b) % s.block for s, a, b in parts])
    tables = i32([s.blocks + [10**6] * (width - len(s.blocks)) for s, _, _ in parts])
    starts = i32([0, *torch.tensor([b - a for _, a, b in parts]).cumsum(0).tolist()])
    rows = torch.arange(len(tokens)) if every else starts[1:] - 1
    return [tokens, positions.int(), slots.int(), tables, starts, i32([b for _, _, b in parts]), rows.int()]


def run(program: DecoderProgram, args: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    count, vocab = args[-1].shape[0], program.parts.lm_head.n
    logits = torch.full((count, vocab), torch.nan)
    hidden = torch.full((count, program.parts.embedding.shape[1]), torch.nan, dtype=program.parts.embedding.dtype)
    greedy = torch.full((count,), -9, dtype=torch.int32)
    program(*args, logits=logits, hidden=hidden, greedy=greedy)
    return logits, hidden, greedy


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_separate_operations(dtype: torch.dtype, name: str) -> None:
    program = build(CASES[name], dtype)
    free = torch.randperm(24).tolist()
    a, b, c = Sequence(program, 70, free), Sequence(program, 90, free), Sequence(program, 12, free)
    for parts in ([(a, 0, 66), (b, 0, 3)], [(a, 66, 67), (b, 3, 90), (c, 0, 12)], [(a, 67, 68)], [(a, 68, 69), (c, 11, 12)]):
        args = arguments(parts)
        logits, hidden, greedy = run(program, args)
        cached = [held.clone() for held in memory(program)]
        states = reference.hidden_states(program.parts, *args)
        assert torch.equal(hidden, states)
        assert torch.equal(logits, reference.logits(program.parts, states))
        assert torch.equal(greedy, argmax(logits))
        assert not torch.isnan(logits).any()
        for held, before in zip(memory(program), cached, strict=True):
            assert torch.equal(held.nan_to_num(), before.nan_to_num())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", CASES)
def test_solo_batched_chunked_and_decoded_are_equal(dtype: torch.dtype, name: str) -> None:
    program = build(CASES[name], dtype)
    free = torch.randperm(24).tolist()
    a, b = Sequence(program, 100, free), Sequence(program, 60, free)
    whole, _, _ = run(program, arguments([(a, 0, 100)]))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for cuts in ([100], [1, 2, 3, 10, 64, 65, 99, 100], [50, *range(51, 101)]):
            poison(program)
            begin, other = 0, 0
            for end in cuts:
                parts = [(a, begin, end)]
                if other < 60:
                    parts.insert(0, (b, other, other + 7 if other + 7 < 60 else 60))
                got, _, _ = run(program, arguments(parts))
                assert torch.equal(got[-(end - begin) :], whole[begin:end]), (threads, begin, end)
                begin, other = end, parts[0][2] if len(parts) == 2 else other
    last, _, _ = run(program, arguments([(a, 60, 100), (b, 59, 60)], every=False))
    assert torch.equal(last[0], whole[99])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_streams_between_layers_are_kept_as_they_are(dtype: torch.dtype, name: str) -> None:
    """In front of a layer those of all tokens, behind the last one those of the rows that are wanted; and nothing else changes."""
    program = build(CASES[name], dtype)
    free = torch.randperm(24).tolist()
    a, b = Sequence(program, 70, free), Sequence(program, 90, free)
    for parts, layers in (([(a, 0, 66), (b, 0, 3)], [0, 1, 2]), ([(a, 66, 67), (b, 3, 7)], [1]), ([(a, 67, 68)], [0, 2])):
        args = arguments(parts, every=2 in layers)
        hidden = torch.empty(len(args[-1]), program.parts.embedding.shape[1], dtype=dtype)
        taps = torch.full((len(args[0]), len(layers), hidden.shape[1]), torch.nan, dtype=dtype)
        plain = torch.empty_like(hidden)
        program(*args, hidden=plain)
        program(*args, hidden=hidden, tap_layers=i32(layers), taps=taps)
        assert torch.equal(hidden, plain)
        wanted = torch.empty_like(taps)
        reference.hidden_states(program.parts, *args, {layer: wanted[:, at] for at, layer in enumerate(layers)})
        assert torch.equal(taps, wanted)
    args = arguments([(a, 68, 70)], every=False)
    taps = torch.empty(2, 1, hidden.shape[1], dtype=dtype)
    for layer in (-1, 3):
        with pytest.raises(IndexError, match="a tap names no layer"):
            program(*args, hidden=hidden[:1], tap_layers=i32([layer]), taps=taps)
    with pytest.raises(ValueError, match="belong together"):
        program(*args, hidden=hidden[:1], taps=taps)


@pytest.mark.usefixtures("compiled")
def test_a_layer_that_is_given_what_it_reads(dtype: torch.dtype) -> None:
    """In place of embeddings and of the first norm, of another width; without wanted rows keys and values are written all the same."""
    whole = build(CASES["qwen3"], dtype)
    parts, case = whole.parts, CASES["qwen3"]
    wide = pack((torch.randn((case.heads + 2 * case.kv_heads) * case.dim, 2 * case.hidden) * 0.2).to(dtype))
    program = DecoderProgram(
        embedding=parts.embedding, layers=[replace(parts.layers[0], qkv=wide), parts.layers[1]], final_norm=parts.final_norm, lm_head=parts.lm_head,
        num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim, eps=parts.eps, cos_sin=parts.cos_sin, k_caches=parts.k_caches,
        v_caches=parts.v_caches,
    )  # fmt: skip
    free = torch.randperm(24).tolist()
    a, b = Sequence(program, 70, free), Sequence(program, 30, free)
    for steps in ([(a, 0, 66), (b, 0, 3)], [(a, 66, 67), (b, 3, 7)]):
        args = arguments(steps, every=False)
        given = tuple(torch.randn(len(args[0]), width).to(dtype) for width in (case.hidden, 2 * case.hidden))
        hidden = torch.empty(len(args[-1]), case.hidden, dtype=dtype)
        behind = torch.empty(len(args[0]), 1, case.hidden, dtype=dtype)
        program(*args, hidden=hidden, tap_layers=i32([2]), taps=behind, given=given)  # type: ignore[arg-type]
        wanted = torch.empty_like(behind)
        states = reference.hidden_states(program.parts, *args, {2: wanted[:, 0]}, given)  # type: ignore[arg-type]
        assert torch.equal(hidden, states)
        assert torch.equal(behind[: len(hidden)], wanted[: len(hidden)])
        cached = [held.clone() for held in memory(program)]
        program(*args[:-1], i32([]), given=given)  # type: ignore[arg-type]
        for held, before in zip(memory(program), cached, strict=True):
            assert torch.equal(held.nan_to_num(), before.nan_to_num())
    with pytest.raises(ValueError, match="must be given"):
        program(*args, hidden=hidden)


def test_more_rows_than_one_mlp_chunk(dtype: torch.dtype) -> None:
    program = build(CASES["llama"], dtype, blocks=64)
    free = torch.randperm(64).tolist()
    sequences = [Sequence(program, 330, free), Sequence(program, 300, free)]
    parts = [(s, 0, len(s.tokens)) for s in sequences]
    together, _, _ = run(program, arguments(parts, every=False))
    apart = torch.cat([run(program, arguments([part], every=False))[0] for part in parts])
    torch.testing.assert_close(together, apart, rtol=0, atol=0 if program._cpu is not None else 0.1)


def test_more_rows_than_tokens(dtype: torch.dtype) -> None:
    """A token's result may be wanted more than once; the workspace holds that too."""
    program = build(CASES["llama"], dtype, blocks=64)
    sequence = Sequence(program, 40, torch.randperm(64).tolist())
    every = arguments([(sequence, 0, 40)])
    truth = run(program, every)
    rows = torch.cat([torch.tensor([39]), torch.arange(40), torch.arange(40)]).int()
    got = run(program, [*every[:-1], rows])
    for mine, theirs in zip(got, truth, strict=True):
        torch.testing.assert_close(mine, theirs[rows.long()], rtol=0, atol=0)


def test_agrees_with_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model against torch alone (separate operations without the C library)."""
    from penstock.kernels.native import bind

    torch.manual_seed(3)
    fast = build(CASES["llama"], dtype)
    parts = arguments([(Sequence(fast, 80, list(range(24))), 0, 80)])
    got, _, _ = run(fast, parts)
    bind._load.cache_clear()
    try:
        monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
        torch.manual_seed(3)
        slow = build(CASES["llama"], dtype)
        assert slow._cpu is None
        wanted, _, _ = run(slow, parts)
    finally:
        monkeypatch.undo()
        bind._load.cache_clear()
    spread = float(wanted.std())
    assert float((got - wanted).abs().max()) < spread * (0.15 if dtype == torch.bfloat16 else 1e-4)


def test_bad_steps_are_refused(dtype: torch.dtype) -> None:
    program = build(CASES["llama"], dtype)
    good = arguments([(Sequence(program, 20, list(range(24))), 0, 20)])
    run(program, good)
    for index, value, match in (
        (0, 77, "token id"),
        (1, 400, "position"),
        (2, 24 * 16, "slot"),
        (3, 24, "block"),
        (5, 19, "kv_len"),
        (6, 20, "wanted row"),
    ):
        bad = [t.clone() for t in good]
        bad[index].view(-1)[0] = value
        if program._cpu is None:
            continue
        with pytest.raises(IndexError, match=match):
            run(program, bad)
    with pytest.raises(ValueError, match="logits must have shape"):
        program(*good, logits=torch.empty(3, 77))


def test_a_step_without_results_still_writes_the_cache(dtype: torch.dtype) -> None:
    program = build(CASES["llama"], dtype)
    a = Sequence(program, 40, list(range(24)))
    whole, _, _ = run(program, arguments([(a, 0, 40)], every=False))
    poison(program)
    args = arguments([(a, 0, 39)])
    args[-1] = i32([])
    run(program, args)
    got, _, greedy = run(program, arguments([(a, 39, 40)], every=False))
    torch.testing.assert_close(got, whole, rtol=0, atol=0 if program._cpu is not None else 0.1)
    only = torch.empty(1, dtype=torch.int32)
    program(*arguments([(a, 39, 40)], every=False), greedy=only)
    assert torch.equal(only, greedy)


def test_layers_that_gather_their_inputs_are_refused() -> None:
    parts = build(CASES["llama"], torch.float32).parts
    weight = quantise(torch.randn(64, 128), Scheme("int4", 32))
    gathers = pack_quantised([weight._replace(scheme=Scheme("int4", 32, permuted=True), perm=torch.randperm(128).int())])
    with pytest.raises(ValueError, match="in order"):
        DecoderProgram(
            embedding=parts.embedding, layers=[replace(layer, o=gathers) for layer in parts.layers], final_norm=parts.final_norm,
            lm_head=parts.lm_head, num_heads=4, num_kv_heads=2, head_dim=32, eps=1e-5, cos_sin=parts.cos_sin, k_caches=parts.k_caches,
            v_caches=parts.v_caches,
        )  # fmt: skip
