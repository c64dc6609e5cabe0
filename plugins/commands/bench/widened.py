"""Writes what a quantised folder's weights mean as an ordinary checkpoint: `python -m penstock.plugins.commands.bench.widened QUANTISED OUT`.

What it is: for programs that read wide checkpoints alone, such as `examples/demo_model/evaluate.py`; one file, float32, each quantised layer as what the reader that serves it
makes of it.
What it does not know: formats.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def widened(folder: Path, out: Path) -> int:
    """The number of layers that were quantised."""
    import torch
    from safetensors.torch import save_file

    from penstock.plugins.commands.quant.comparing import Loaded

    tensors: dict[str, torch.Tensor] = {}

    class Noted:
        """A quantizer that writes down what it read."""

        def __init__(self, own: Any) -> None:
            self._own = own

        def __getattr__(self, name: str) -> Any:
            return getattr(self._own, name)

        def read(self, weights: Any, layer: str, *rest: Any) -> Any:
            from penstock.kernels.linear.scheme import dequantise

            q = self._own.read(weights, layer, *rest)
            tensors[f"{layer}.weight"] = dequantise(q)
            return q

    Loaded(folder, longest=16, wrap=Noted)
    count = len(tensors)
    from penstock.plugins.weights.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder, torch.float32)
    for name in checkpoint.names():
        tensor = checkpoint.raw(name)
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and name not in tensors and _ordinary(name, tensors):
            tensors[name] = tensor.float()
    out.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in folder.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return count


def _ordinary(name: str, quantised: dict[str, Any]) -> bool:
    """Not a part of a quantised layer: its scales and the like."""
    layer = name.rpartition(".")[0]
    return f"{layer}.weight" not in quantised and name.endswith((".weight", ".bias")) and layer not in quantised


def main(arguments: Sequence[str]) -> None:
    """Writes, and says what."""
    folder, out = (Path(argument) for argument in arguments)
    print(f"{out}: {widened(folder, out)} layers in full width")


if __name__ == "__main__":
    main(sys.argv[1:])
