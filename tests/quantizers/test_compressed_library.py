"""Layers that the compressed-tensors library itself compressed, read as it decompresses them, bit by bit (NVFP4: within its bfloat16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.kernels.linear.scheme import dequantise
from penstock.plugins.quantizers.compressed import CompressedTensors
from penstock.plugins.weights.checkpoint import Checkpoint

SCHEMES: dict[str, dict[str, Any]] = {
    "pack-quantized 4 groups": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "pack-quantized 4 groups asym": {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    "pack-quantized 4 rows": {"num_bits": 4, "strategy": "channel"},
    "pack-quantized 8 groups": {"num_bits": 8, "strategy": "group", "group_size": 32},
    "pack-quantized 8 rows asym": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "int-quantized 8 rows": {"num_bits": 8, "strategy": "channel"},
    "float-quantized 8 rows": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "float-quantized whole": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(32, 64), (40, 96)], ids=str)
def test_layers_of_the_library_are_read_as_it_reads_them(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form, said = name.split()[0], {"symmetric": True, "type": "int", **SCHEMES[name]}
    args = QuantizationArgs(**said)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    weight = torch.randn(shape, generator=generator)
    groups = 1 if args.strategy == "channel" else shape[1] // args.group_size if args.group_size else 1
    rows = 1 if args.strategy == "tensor" else shape[0]
    largest = weight.view(rows, -1).abs().view(rows, groups, -1).amax(2)
    top = {"int": 2 ** (args.num_bits - 1) - 0.5, "float": 448.0 if args.num_bits == 8 else 6.0}[said["type"]]
    state = {"weight": weight, "weight_scale": largest / top}
    if form == "nvfp4-pack-quantized":
        state["weight_global_scale"] = 448.0 / (largest.max() / 6.0)[None]
        state["weight_scale"] = (state["weight_scale"] * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    elif form == "mxfp4-pack-quantized":
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(state["weight_scale"])))
    if not said["symmetric"]:
        low = -(2 ** (args.num_bits - 1))
        state["weight_zero_point"] = torch.randint(low, -low, state["weight_scale"].shape, generator=generator, dtype=torch.int8)
    compressor = BaseCompressor.load_from_registry(form)
    stored = compressor.compress(dict(state), scheme)
    meant = compressor.decompress(dict(stored), scheme)["weight"].float()

    (tmp_path / "config.json").write_text("{}")
    save_file({f"one.{end}": value.contiguous() for end, value in stored.items()}, tmp_path / "model.safetensors")
    weights = Checkpoint(tmp_path, torch.float32)
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": said}}}
    quantizer = CompressedTensors(config)
    found = quantizer.scheme(weights, "one", *shape)
    assert found is not None
    ours = dequantise(quantizer.read(weights, "one", found, *shape, torch.device("cpu")))
    rtol = 2**-7 if form == "nvfp4-pack-quantized" else 0.0  # which the library multiplies in bfloat16
    torch.testing.assert_close(ours, meant, rtol=rtol, atol=0)
    weights.finish()
