"""GGUF files: a whole model in one file, weights, sizes, tokenizer and chat template (the GGUF specification of the ggml project).

What it is: the name by which such a file is known. The parts that read it are imported by whoever needs them: the container (container.py), the
configuration that it stands for (config.py), the names of its tensors (names.py).
What it does not know: how blocks of numbers are read (plugins/quantizers/ggml.py), tokenizers, devices.
"""

from __future__ import annotations

from pathlib import Path

from penstock.core.protocol.model_files import GGUF


def is_gguf(path: str) -> bool:
    """Is this a file by the name of one? It is not looked into."""
    return path.endswith(GGUF) and not Path(path).is_dir()
