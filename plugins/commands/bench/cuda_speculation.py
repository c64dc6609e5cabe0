"""Measures drafts on the cuda device: `python -m penstock.plugins.commands.bench.cuda_speculation OUT_FOLDER [rows ...]`.

What it is: the 8B shape on dummy weights whose every token is 0 (its last norm is set to zeros, which costs what any other would), and a drafter that knows it, and lies as
often as it is told: so that acceptance is what the bench says, and times are those of the real kernels. Tokens a second without drafts, then with K drafts a row and step, in
turns, two steps in flight, as the scheduler has it, and where one is named so one; a 1B shape as draft model, whose drafts are all right; and a tree. Results go to speculation.json.
What it does not know: how apt real drafters are; the scheduler.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from penstock.plugins.commands.bench.cuda_bench import LLAMA_1B, LLAMA_8B, decode, fill, folder_of, load
from penstock.plugins.drafters.api import NoLayers, Seen
from penstock.plugins.drafters.trees import Tree

CONTEXT = 1024
WIDTHS = (2, 4, 8)
LIES = (0.0, 0.2, 0.5)
STEPS = 40
TREE = "[(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0)]"


class Oracle(NoLayers):
    """Drafts 0, the right token, but 1 with a chance of `lies` for each position; in a tree 0 along the first children."""

    name = "oracle"
    max_lookahead = max(WIDTHS)

    def __init__(self, lies: float = 0.0, tree: Tree | None = None) -> None:
        self.lies, self.tree = lies, tree
        self.told: dict[Any, Any] = {}

    def propose(self, seen: Seen, out: Any) -> None:
        """See Drafter."""
        import torch

        assert seen.proposal is not None
        if self.tree is not None:
            told = self.told.get(out.device)
            if told is None:
                told = self.told[out.device] = torch.tensor(firsts(self.tree), dtype=torch.int32, device=out.device)
            out.copy_(told.expand_as(out))
            return
        place = (
            seen.proposal.ends[:, None].long() + torch.arange(out.shape[1], device=out.device) + 7919 * seen.proposal.slots[:, None].long()
        )
        # Mixed twice: once would spread the lies of neighbours evenly, one in each five, so that more of them fall together in a step's drafts or in none.
        for _ in range(2):
            place = place * 2654435761 % 4294967296
            place = place ^ place >> 15
        chance = place.float() / 4294967296
        out.copy_((chance < self.lies).int())


def drafted(runner: Any, rows: int, width: int, steps: int, in_flight: int = 2) -> dict[str, float]:
    """`steps` steps of decode rows with `width` drafts each, so many at once under way: tokens a second, milliseconds a step, tokens a row and step, and the share
    of time in which the device had nothing to do."""
    from penstock.core.protocol.columns import EMPTY_U8, i32
    from penstock.core.protocol.messages import Forward, Sample
    from penstock.plugins.devices.runner import Counters

    slots, order = i32(range(rows)), i32(range(rows))
    starts, counts = np.full(rows, CONTEXT - 1, np.int32), np.ones(rows, np.int32)
    waiting: list[tuple[Any, Any]] = []
    tokens = 0
    begun = 0.0

    def land() -> None:
        nonlocal starts, counts, tokens
        planned, wait = waiting.pop(0)
        done = wait()
        took = done.counts if len(done.counts) else np.ones(rows, np.int32)
        tokens += int(took.sum())
        starts = starts - (planned - took)  # they were bounds
        if not waiting:
            counts = (done.drafts.reshape(rows, width) >= 0).sum(1).astype(np.int32) + 1

    for step in range(steps + 3):
        if step == 3:
            while waiting:
                land()
            runner._lane.synchronize()
            runner.counters, runner._last_end, runner.timed = Counters(), None, True
            begun, tokens = time.perf_counter(), 0
        loose = np.ones(rows, np.uint8) if waiting else EMPTY_U8
        named: dict[str, Any] = {"engine": 0, "epoch": 0, "step": step, "lookahead": width if step else 0}
        runner.forward(Forward(slots=slots, starts=starts, counts=counts, num_decode=rows, loose=loose, **named))
        waiting.append((counts, runner.sample(Sample(rows=order, slots=slots, positions=starts + 1, drafts=width, **named))))
        starts, counts = starts + counts, np.full(rows, 1 + width, np.int32)
        if len(waiting) == in_flight:
            land()
    while waiting:
        land()
    seconds = time.perf_counter() - begun
    counters, runner.timed = runner.counters, False
    return {
        "tokens_s": round(tokens / seconds, 1),
        "ms_a_step": round(seconds / steps * 1e3, 4),
        "tokens_a_row_and_step": round(tokens / steps / rows, 3),
        "device_idle": round(counters.idle_ns / max(1, counters.busy_ns + counters.idle_ns), 4),
    }


def silenced(runner: Any) -> None:
    """Every token is 0 from now on."""
    runner._model.plain.final_norm.zero_()


def measure(path: str, many: list[int], out: dict[str, Any]) -> None:
    """Without and with, in turns."""
    import torch

    from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig

    asked = SpeculationConfig(methods=[DraftConfig(method="ngram", num_speculative_tokens=max(WIDTHS))])
    runner, seconds, _ = load(path, load_format="dummy", max_num_seqs=64, max_model_len=4096, speculation=asked)
    silenced(runner)
    oracle = Oracle()
    ngram, runner._drafters = runner._drafters, [oracle]
    runner.drafters = ("oracle",)
    out["load_s"], few = round(seconds, 1), min(4, max(WIDTHS))
    for rows in many:
        found: dict[str, Any] = {}
        fill(runner, rows, CONTEXT)
        found["off"] = decode(runner, rows, CONTEXT, 80)
        found["off"]["tokens_s"] = round(rows / found["off"]["ms_a_step"] * 1e3, 1)
        for width in WIDTHS:
            for lies in LIES:
                oracle.lies = lies
                fill(runner, rows, CONTEXT)
                drafted(runner, rows, width, 8)
                fill(runner, rows, CONTEXT)
                one = drafted(runner, rows, width, STEPS)
                one["gain"] = round(one["tokens_s"] / found["off"]["tokens_s"], 3)
                found[f"K{width}_lies{lies}"] = one
            fill(runner, rows, CONTEXT)
            found[f"K{width}_lies{LIES[-1]}_one_in_flight"] = drafted(runner, rows, width, STEPS, 1)
        runner._drafters = ngram
        fill(runner, rows, CONTEXT)
        drafted(runner, rows, few, 8)
        fill(runner, rows, CONTEXT)
        found[f"ngram_K{few}"] = drafted(runner, rows, few, STEPS)
        runner._drafters = [oracle]
        fill(runner, rows, CONTEXT)
        again = decode(runner, rows, CONTEXT, 80)
        found["off_again_ms"] = again["ms_a_step"]
        out[f"rows_{rows}"] = found
        print(rows, json.dumps(found), flush=True)
    runner.close()
    del runner
    gc.collect()
    torch.cuda.empty_cache()


def trees(path: str, many: list[int], out: dict[str, Any], mode: str = "", **over: Any) -> None:
    """What a step takes with eight drafts in a row's tree, of which the first children are right, and with the same eight as a chain. `over`: other RunnerConfig fields,
    and `mode`, their name."""
    from unittest import mock

    import torch

    from penstock.plugins.devices import cuda

    for name, tree in (("chain", None), ("tree", Tree.of(TREE))):
        oracle = Oracle(tree=tree)
        with (
            mock.patch.object(cuda, "load_drafters", return_value=([oracle], max(WIDTHS))),
            mock.patch.object(cuda, "most_drafts", return_value=max(WIDTHS)),
        ):
            runner, _, _ = load(path, load_format="dummy", max_num_seqs=64, max_model_len=4096, **over)
        silenced(runner)
        for rows in many:
            fill(runner, rows, CONTEXT)
            drafted(runner, rows, max(WIDTHS), 8, 1)
            fill(runner, rows, CONTEXT)
            out[f"{mode}{name}_rows_{rows}"] = one = drafted(runner, rows, max(WIDTHS), STEPS, 1)
            print(f"{mode}{name}", rows, json.dumps(one), flush=True)
        runner.close()
        del runner
        gc.collect()
        torch.cuda.empty_cache()


def firsts(tree: Tree) -> list[int]:
    """The oracle's token for each node but the root: 0, the right one, where every node on the way is its parent's first child, and 1 elsewhere."""
    wrong = [False]
    for parent, rank in zip(tree.parents[1:].tolist(), tree.ranks[1:].tolist(), strict=True):
        wrong.append(wrong[parent] or rank > 0)
    return [int(one) for one in wrong[1:]]


def draft_model(path: str, draft: str, many: list[int], out: dict[str, Any]) -> None:
    """A smaller model that is always right: what its own steps cost."""
    from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig

    asked = SpeculationConfig(methods=[DraftConfig(method="draft_model", model=draft, num_speculative_tokens=4)])
    runner, _, _ = load(path, load_format="dummy", max_num_seqs=64, max_model_len=4096, speculation=asked)
    silenced(runner)
    runner._drafters[0]._model.plain.final_norm.zero_()
    for rows in many:
        fill(runner, rows, CONTEXT)
        off = decode(runner, rows, CONTEXT, 80)
        found: dict[str, Any] = {"off_ms": off["ms_a_step"]}
        for width in (2, 4):
            fill(runner, rows, CONTEXT)
            drafted(runner, rows, width, 12)
            fill(runner, rows, CONTEXT)
            found[f"K{width}"] = one = drafted(runner, rows, width, STEPS)
            one["gain"] = round(one["tokens_s"] / (rows / off["ms_a_step"] * 1e3), 3)
        out[f"draft_1b_rows_{rows}"] = found
        print("draft", rows, json.dumps(found), flush=True)


def main(arguments: list[str]) -> None:
    """Runs and prints."""
    import torch

    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    many = [int(word) for word in arguments[1:]] or [1, 16, 64]
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "context": CONTEXT}
    with tempfile.TemporaryDirectory() as scratch:
        path = folder_of(LLAMA_8B, Path(scratch), "llama-8b")
        measure(path, many, found)
        (out / "speculation.json").write_text(json.dumps(found, indent=1))
        draft_model(path, folder_of(LLAMA_1B, Path(scratch), "llama-1b"), many[:2], found)
        (out / "speculation.json").write_text(json.dumps(found, indent=1))
        trees(path, many, found)
        trees(path, many, found, "eight_bits_", kv_cache_dtype="fp8_e4m3")
        trees(path, many, found, "deterministic_", deterministic=True)
        (out / "speculation.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
