"""Measures quantised models under load on the cuda device: `python -m penstock.plugins.commands.bench.cuda_quantised_load OUT_FOLDER [CASE:WORD[:KV] ...]`.

What it is: the in-process engine with dummy weights that are rounded while they load, all requests at once. CASE is `burst` (8B, 1,000 requests of ShareGPT-like lengths),
`full` (8B, 1,000 tokens in and 1,000 out, 960 requests of which as many run at once as the cache holds), `large` or `crowd` (the 70B shape, 256 in and 256 out, 40 or 128 users); WORD one
of --quantization, or `none`; KV one of --kv-cache-dtype. Results go to load.json after each.
What it does not know: kernels, single steps (cuda_quantised.py), HTTP, quality.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from penstock.plugins.commands.bench.cuda_bench import LLAMA_8B, _serve, folder_of

LLAMA_70B: dict[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
USERS = {"large": 40, "crowd": 128}
CASES = ("burst:none", "burst:fp8", "full:none", "full:fp8", "large:fp8", "crowd:fp8", "large:int4", "crowd:int4")


def measure(case: str, word: str, kv: str, root: Path) -> dict[str, Any]:
    """One case. Raises KeyError for one that there is not."""
    over: dict[str, Any] = {} if word == "none" else {"quantization": word}
    over |= {"kv_cache_dtype": kv} if kv else {}
    if case in USERS:
        path, over = folder_of(LLAMA_70B, root, "llama-70b"), {**over, "gpu_memory_utilization": 0.95, "max_num_batched_tokens": 2048}
        return _serve(path, requests=USERS[case], max_num_seqs=USERS[case], input_len=256, output_len=256, **over)
    size = {
        "burst": {"requests": 1000, "max_num_seqs": 1000},
        # Steps of at most 2,048 tokens all have graphs, and need less memory than those of 8,192, which the cache gets.
        "full": {"requests": 960, "max_num_seqs": 768, "max_num_batched_tokens": 2048, "input_len": 1000, "output_len": 1000},
    }[case]
    return _serve(folder_of(LLAMA_8B, root, "llama-8b"), **size, **over)


def run(name: str, out: Path) -> None:
    """One case in this process, into load.json."""
    import torch

    file = out / "load.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"device": torch.cuda.get_device_name()}
    case, word, kv = (*name.split(":"), "")[:3]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found[name] = measure(case, word, kv, Path(scratch))
        except Exception as error:  # one that does not fit must not cost the others their figures
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    file.write_text(json.dumps(found, indent=1))
    print(name, json.dumps(found[name]), flush=True)


def main(arguments: list[str]) -> None:
    """Runs and prints, each case in a process of its own: what one leaves on the device must not bind the next."""
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    names = arguments[1:] or CASES
    if len(names) == 1:
        run(names[0], out)
        return
    for name in names:
        subprocess.run([sys.executable, "-m", "penstock.plugins.commands.bench.cuda_quantised_load", str(out), name], check=False)


if __name__ == "__main__":
    main(sys.argv[1:])
