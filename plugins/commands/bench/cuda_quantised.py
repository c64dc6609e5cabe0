"""Measures quantised weights on the cuda device: `python -m penstock.plugins.commands.bench.cuda_quantised OUT_FOLDER [word of --quantization | none ...]`.
`int4+int8` is int4 with an output head in int8; behind "/" stands one of --kv-cache-dtype if that is to be measured, too: `none/fp8_e4m3`.

What it is: the 8B shape on dummy weights, once wide and once for each word, in one run: milliseconds a decode step at 1, 16 and 64 rows, one at a long context, an 8k prefill, the bytes of the
weights and their share of the measured copy bandwidth. Results go to quantised.json after each; a table is printed last.
What it does not know: kernels one by one, quality.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from penstock.plugins.commands.bench.cuda_bench import LLAMA_8B, ceilings, decode, fill, folder_of, load

WORDS = ("none", "int8", "int8+int8", "int8-w8a8", "fp8", "int4", "int4+int8", "int4+int4", "mxfp4")
CASES = ((1, 1024), (16, 1024), (64, 1024), (16, 8192))
"""Rows of a decode step, and their context."""
PREFILL = 8192


def measure(path: str, word: str, copy_tb_s: float) -> dict[str, Any]:
    """One scheme."""
    import torch

    weight, _, kv = word.partition("/")
    layers, _, head = weight.partition("+")
    runner, seconds, _ = load(
        path,
        load_format="dummy",
        max_num_seqs=64,
        max_model_len=2 * PREFILL,
        max_num_batched_tokens=PREFILL,
        quantization=None if layers == "none" else layers,
        lm_head_quantization=head or None,
        kv_cache_dtype=kv or "auto",
    )
    weights = int(runner.memory.weights)
    out: dict[str, Any] = {"load_and_warm_up_s": round(seconds, 1), "weights_gb": round(weights / 1e9, 3), "kv_blocks": runner.num_blocks}
    table = runner.facts.vocab_size * runner.facts.hidden_size * 2  # of which a step reads a row
    for rows, context in CASES:
        fill(runner, rows, context)
        one = decode(runner, rows, context, 100)
        one["roofline_share"] = round((weights - table) / copy_tb_s / 1e9 / one["ms_a_step"], 3)
        out[f"rows_{rows}" if context == 1024 else f"rows_{rows}_context_{context}"] = one
    out["prefill_8k_ms"] = round(prefill(runner), 2)
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    return out


def prefill(runner: Any) -> float:
    """Milliseconds of a step with one prompt of PREFILL tokens, median of five."""
    from penstock.core.protocol.columns import i32
    from penstock.core.protocol.messages import Forward, Sample

    times = []
    for step in range(6):
        fill(runner, 1, PREFILL)
        runner._lane.synchronize()
        begun = time.perf_counter()
        runner.forward(Forward(engine=0, epoch=0, step=step, slots=i32([0]), starts=i32([0]), counts=i32([PREFILL]), num_decode=0))
        runner.sample(Sample(engine=0, epoch=0, step=step, rows=i32([0]), slots=i32([0]), positions=i32([PREFILL])))()
        times.append((time.perf_counter() - begun) * 1e3)
    return sorted(times[1:])[2]


def main(arguments: list[str]) -> None:
    """Runs and prints."""
    import torch

    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = folder_of({**LLAMA_8B, "max_position_embeddings": 2 * PREFILL}, Path(scratch), "llama-8b")
        found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "ceilings": ceilings(Path(scratch), {})}
        for word in arguments[1:] or WORDS:
            found[word] = measure(path, word, found["ceilings"]["copy_tb_s"])
            (out / "quantised.json").write_text(json.dumps(found, indent=1))
            print(word, json.dumps(found[word]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
