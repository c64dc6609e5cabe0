"""Measures a whole server on the GPU: `python -m penstock.plugins.commands.bench.cuda_serve_bench OUT_FOLDER [section ...]`.

What it is: what needs real processes, or a look at single steps: the 8B load over HTTP with Poisson arrivals, the timeline of a few steps, loading a
checkpoint from disk, the first ever start. Sections run as cuda_bench's do (own process, own time limit, results merged into engine.json,
a table printed last); cuda_bench's sections may be named too. It runs from a source folder that nobody installed. Environment:
RATE requests/s (default: 70 % of what serve_8b measured, which then runs first), HTTP_S seconds of load (65), EDGES edge processes (2),
SERVE_ARGS more options for `penstock serve`, BENCH_BUDGET_S for the whole run.
What it does not know: the device's kernels, how a server is built. It is long because each section is a short script.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import random
import re
import shlex
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from penstock.plugins.commands.bench import cuda_bench
from penstock.plugins.commands.bench.cuda_bench import LLAMA_1B, LLAMA_8B

LIMITS_S = {"http_8b": 190, "timeline": 80, "weights": 90, "cold": 150, "schema_8b": 190}
"""Sections in order, and their longest time."""
LOAD_SHARE = 0.7
PUBLISHED = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "h200-engine.json"
EDGE_S = 8.0
"""The steady span begins so long after the first arrival and ends with the last one."""


# ------------------------------------------------------------------ a model folder whose every token has text


def synthetic_tokenizer(path: Path, size: int, seed: int = 0) -> None:
    """A byte-level BPE tokenizer.json with exactly `size` (>= 256) tokens: the 256 bytes, then letters merged into ever longer strings, so that
    whatever ids random weights draw, turning them into text is real work. Not trained on anything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from penstock.plugins.tokenizers.hugging_face import byte_alphabet

    vocab = {char: index for index, char in enumerate(byte_alphabet())}
    letters = list("etaoinshrdlucmfwypvbgkjqxz")
    random.Random(seed).shuffle(letters)
    merges: list[tuple[str, str]] = []
    stems = ["\u0120", *letters]  # the alphabet's space, so that a part of the tokens begins words
    for stem in stems:
        for letter in letters:
            if len(vocab) >= size:
                break
            if stem + letter not in vocab:
                vocab[stem + letter] = len(vocab)
                merges.append((stem, letter))
                stems.append(stem + letter)
        if len(vocab) >= size:
            break
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path), pretty=False)


def synthetic_folder(shape: dict[str, Any], root: Path, name: str) -> str:
    """As cuda_bench.folder_of, with a tokenizer as large as the model's vocabulary."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).write_text("{}")
    synthetic_tokenizer(folder / "tokenizer.json", int(shape["vocab_size"]))
    return str(folder)


def entry_points(root: Path) -> None:
    """Make the built-in plugins known to this process and its children where Penstock runs from a source folder without being installed."""
    if list(metadata.entry_points(group="penstock.root")):
        return
    import penstock

    source = Path(penstock.__file__).resolve().parents[2]
    groups = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    info = root / f"penstock-{penstock.__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: penstock\nVersion: {penstock.__version__}\n")
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in names.items()) for group, names in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    paths = [str(root), str(source / "src"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    sys.path.append(str(root))


# ------------------------------------------------------------------ who used how much CPU


def cpu_by_process(pids: Sequence[int]) -> dict[str, float]:
    """ "name" or "name/thread-number" -> CPU seconds. Threads of the engine's process apart (0: the loop), other processes as one."""
    found: dict[str, float] = {}
    for pid in pids:
        with suppress(OSError, ValueError):
            name, seconds = _stat(Path(f"/proc/{pid}/stat"))
            found[name] = found.get(name, 0.0) + seconds
            if name.startswith("pk-engine"):
                for number, thread in enumerate(sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())):
                    found[f"{name}/{number}"] = _stat(Path(f"/proc/{pid}/task/{thread}/stat"))[1]
    return found


def _stat(file: Path) -> tuple[str, float]:
    head, _, tail = file.read_text().rpartition(")")
    fields = tail.split()
    return head.partition("(")[2], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------ the server's own histograms


def histograms(page: str) -> dict[str, dict[float, float]]:
    """name -> upper bound -> cumulative count, summed over labels, of an exposition's `penstock_*` histograms."""
    found: dict[str, dict[float, float]] = {}
    for name, labels, value in re.findall(r"^(penstock_\w+)_bucket\{(.*)\} (\S+)$", page, re.MULTILINE):
        bound = re.search(r'le="([^"]+)"', labels)
        if bound:
            key = float(bound[1].replace("+Inf", "inf"))
            kept = found.setdefault(name, {})
            kept[key] = kept.get(key, 0.0) + float(value)
    return found


def quantile(before: dict[float, float], after: dict[float, float], share: float) -> float | None:
    """The value below which `share` of what came between two readings lies, interpolated within its bucket; None for nothing."""
    counts = sorted((bound, count - before.get(bound, 0.0)) for bound, count in after.items())
    if not counts or counts[-1][1] <= 0:
        return None
    wanted, low, below = share * counts[-1][1], 0.0, 0.0
    for bound, count in counts:
        if count >= wanted:
            return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / max(1e-9, count - below)
        low, below = bound, count
    return None


# ------------------------------------------------------------------ sections


def http_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """The load of serve_8b over HTTP: Poisson arrivals at 70 % of the requests/s that it reached, 2,048-token steps, prefix cache as it comes."""
    rate = float(os.environ.get("RATE") or 0) or offered_rate(known, PUBLISHED)
    args = [synthetic_folder(LLAMA_8B, root, "llama-8b"), "--device", "cuda", "--load-format", "dummy", "--max-model-len", "4096"]
    args += ["--max-num-batched-tokens", "2048", "--max-num-seqs", "512", "--edge-workers", os.environ.get("EDGES", "2")]
    args += shlex.split(os.environ.get("SERVE_ARGS", ""))
    return over_http(args, rate=rate, seconds=float(os.environ.get("HTTP_S", "65")), vocab=LLAMA_8B["vocab_size"])


def schema_8b(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """64 rows of the 8B shape that obey a JSON schema, beside 64 that are free, in turns on one server."""
    from penstock.plugins.commands.bench.grammars import in_turns
    from penstock.plugins.commands.bench.server import started

    shape = {**LLAMA_8B, "eos_token_id": 128_000}  # an end token that no JSON needs
    args = [synthetic_folder(shape, root, "llama-8b"), "--device", "cuda", "--load-format", "dummy", "--max-model-len", "4096"]
    args += ["--max-num-seqs", "64", *shlex.split(os.environ.get("SERVE_ARGS", ""))]
    with started(args) as url:
        return in_turns(url, rows=64, tokens=int(os.environ.get("TOKENS", "384")), turns=9)


def offered_rate(known: dict[str, Any], published: Path | None = None) -> float:
    """Requests/s: LOAD_SHARE of what serve_8b reached, in this run or, if it failed here, in the published one. Raises ValueError without either."""
    measured = known.get("serve_8b", {})
    if "output_tokens_s" not in measured and published is not None and published.exists():
        measured = json.loads(published.read_text(encoding="utf-8")).get("serve_8b", {})
    if "output_tokens_s" not in measured:
        raise ValueError("set RATE, or run serve_8b first (its result is not in engine.json)")
    return float(LOAD_SHARE * measured["output_tokens_s"] * measured["requests"] / measured["output_tokens"])


def over_http(
    args: list[str], *, rate: float, seconds: float, vocab: int, warm: int = 192, start: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Start `penstock serve ARGS`, send that load, report both ends. `start` stands in for bench's `started` in tests."""
    from penstock.plugins.commands.bench import report, workload
    from penstock.plugins.commands.bench.client import Client, Record
    from penstock.plugins.commands.bench.client import run as on_loop
    from penstock.plugins.commands.bench.command import run_load
    from penstock.plugins.commands.bench.footprint import tree
    from penstock.plugins.commands.bench.server import started

    count = max(8, round(rate * seconds))
    load = workload.make(count=count, vocab=vocab, seed=1, rate=rate, max_len=4096)
    before: dict[str, Any] = {}

    def others() -> list[int]:
        return [pid for pid in tree(os.getpid()) if pid != os.getpid()]

    async def late(lags: list[float]) -> None:
        """How late this loop comes: a client that cannot keep up would measure itself."""
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.01)
            lags.append(time.perf_counter() - begun - 0.01)

    async def measure(url: str) -> tuple[list[Record], float, dict[str, Any]]:
        client = Client(url)
        client.model, _ = await client.first_model()
        small = workload.make(count=warm, vocab=vocab, seed=1001, rate=rate * 2, input_len=200, output_len=48)
        await run_load(client, small, None, lambda: None)
        before["page"] = (await client.get("/metrics"))[1]
        before["cpu"], before["own"] = cpu_by_process(others()), time.process_time()
        lags: list[float] = []
        probe = asyncio.get_running_loop().create_task(late(lags))
        gc.collect()
        gc.disable()  # a pause of this process is no pause of the server
        records, wall = await run_load(client, load, None, lambda: None)
        gc.enable()
        probe.cancel()
        own = time.process_time() - before["own"]
        used = {name: round((value - before["cpu"].get(name, 0.0)) / wall, 3) for name, value in cpu_by_process(others()).items()}
        used = {name: share for name, share in sorted(used.items()) if share >= 0.01}
        page = (await client.get("/metrics"))[1]
        ends = histograms(before["page"]), histograms(page)
        server = {
            name.removeprefix("penstock_"): {
                f"p{share * 100:.0f}": quantile(ends[0].get(name, {}), kept, share) for share in (0.5, 0.95, 0.99)
            }
            for name, kept in ends[1].items()
        }
        wanted = ("time_to_first_token_seconds", "inter_token_latency_seconds", "queue_seconds", "prefill_seconds", "encode_seconds")
        return (
            records,
            wall,
            {
                "server_says": {name: server[name] for name in (*wanted, "step_tokens") if name in server},
                "cpu_cores_used": {"client": round(own / wall, 3), **used},
                "client_loop_late_ms": report.spread(lags),
            },
        )

    begun = time.perf_counter()
    with (start or started)(args) as url:
        ready = time.perf_counter() - begun
        records, wall, seen = on_loop(measure(url))
    return {
        "serve_args": args[1:],
        "rate_offered": round(rate, 2),
        "ready_s": round(ready, 2),
        **(_rounded(steady(records, load)) if records else {}),
        "whole_run": _rounded(report.summarise(records, wall, {})),
        **_rounded(seen),
    }


def steady(records: Sequence[Any], load: Any) -> dict[str, Any]:
    """The figures of requests sent between EDGE_S and the last arrival; tokens/s of that span, whoever's tokens they are."""
    from penstock.plugins.commands.bench import report

    first, last = min(EDGE_S, load.requests[-1].at / 4), load.requests[-1].at
    span = max(1e-9, last - first)
    inside = [r for r in records if first <= r.scheduled <= last]
    found = report.summarise(inside, span, {})
    tokens = sum(first <= at <= last for r in records for at in r.tokens)
    p50, p95 = (found["itl_ms"].get(name, math.nan) for name in ("p50", "p95"))
    own = {name: found[name] for name in ("requests", "completed", "failed", "short", "errors", "ttft_ms", "itl_ms", "e2e_ms")}
    return {
        **own,
        "span_s": span,
        "rate_sent": len(inside) / span,
        "output_tokens_per_s": tokens / span,
        "in_flight": sum(r.e2e for r in inside if r.ok) / span,
        "itl_p95_over_p50": p95 / p50 if p50 else math.nan,
        "sent_late_ms": report.spread([r.sent - r.scheduled for r in inside]),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return (None if math.isnan(value) else round(value, 4)) if isinstance(value, float) else value


def timeline(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """64 rows of the 8B shape through the in-process engine, two steps in flight; every step's launch, device work and result on one clock. A few
    consecutive steps go to OUT/h200-timeline.json, from which docs/timeline.py draws."""
    from penstock.plugins.commands.bench.cuda_timeline import trace

    found, kept = trace(cuda_bench.folder_of(LLAMA_8B, root, "llama-8b"), rows=64)
    (Path(os.environ["BENCH_OUT"]) / "h200-timeline.json").write_text(json.dumps(kept, indent=1) + "\n")
    return found


def weights(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the 1B shape (untied: 3 GB) in four shards on disk, loaded as users' are, its pages in the cache; beside dummy weights."""
    return loading({**LLAMA_1B, "tie_word_embeddings": False}, root)


def loading(shape: dict[str, Any], root: Path, **over: Any) -> dict[str, Any]:
    path = cuda_bench.folder_of(shape, root, "checkpoint")
    begun = time.perf_counter()
    written = write_checkpoint(shape, Path(path))
    out: dict[str, Any] = {"bytes": written, "write_s": round(time.perf_counter() - begun, 2)}
    size = {"max_num_seqs": 4, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28, **over}
    for name, form in (("first", "auto"), ("again", "auto"), ("dummy", "dummy")):
        seconds = load_seconds(path, load_format=form, **size)
        out[name] = {"load_s": round(seconds, 3), "gb_s": round(written / seconds / 1e9, 2)}
    return out


def load_seconds(path: str, **over: Any) -> float:
    """From the first to the last word about loading weights, the device's work included."""
    import torch

    from penstock.plugins.devices.cuda import CudaDevice

    times: list[float] = []

    def tell(phase: str, fraction: float) -> None:
        if phase == "loading weights":
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    runner = CudaDevice().load(cuda_bench.settings(path, **over), tell)
    runner.close()
    del runner
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return times[-1] - times[0]


def write_checkpoint(shape: dict[str, Any], folder: Path, shards: int = 4) -> int:
    """Random weights under a Llama checkpoint's names, in bfloat16, layers dealt over the shards; returns their bytes."""
    import torch
    from safetensors.torch import save_file

    from penstock.plugins.weights.dummy import DummyWeights

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = DummyWeights(dtype=torch.bfloat16, seed=0, device=device)
    hidden, inner, size = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * size, shape["num_key_value_heads"] * size
    within = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = shape["num_hidden_layers"]
    table = (shape["vocab_size"], hidden)
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    parts[0]["model.embed_tokens.weight"] = table
    for layer in range(layers):
        parts[layer * shards // layers] |= {f"model.layers.{layer}.{name}.weight": form for name, form in within.items()}
    parts[-1]["model.norm.weight"] = (hidden,)
    if not shape["tie_word_embeddings"]:
        parts[-1]["lm_head.weight"] = table
    total = 0
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        tensors = {name: source.take(name, form).cpu() for name, form in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return total


def cold(root: Path, known: dict[str, Any]) -> dict[str, Any]:
    """`penstock serve` as processes, 8B dummy weights, nothing else running: the first start with empty kernel caches, then twice with warm ones;
    seconds from exec to readiness and to the first streamed token."""
    args = [synthetic_folder(LLAMA_8B, root, "llama-8b"), "--device", "cuda", "--load-format", "dummy", "--max-model-len", "4096"]
    return starts([*args, "--max-num-seqs", "256"], root)


def starts(args: list[str], root: Path, measure: Callable[..., dict[str, Any]] | None = None) -> dict[str, Any]:
    """`measure` stands in for bench's footprint in tests."""
    from penstock.plugins.commands.bench import footprint

    os.environ["TRITON_CACHE_DIR"] = str(root / "triton")
    os.environ["CUDA_CACHE_PATH"] = str(root / "cuda")
    out: dict[str, Any] = {}
    for name in ("cold", "warm", "warm_again"):
        run = (measure or footprint.measure)(args, idle_s=0.0, timeout_s=120.0)
        out[name] = {key: round(run[key], 2) for key in ("ready_s", "first_token_s")} | {"exit_status": run["exit_status"]}
        files = [file for file in (root / "triton").rglob("*") if file.is_file()]
        out[name] |= {"cache_files": len(files), "cache_mib": round(sum(file.stat().st_size for file in files) / 2**20, 1)}
    return out


# ------------------------------------------------------------------ running


def order(wanted: Sequence[str], known: dict[str, Any]) -> list[str]:
    """The sections to run; serve_8b first where http_8b needs its rate."""
    names = list(wanted) or list(LIMITS_S)
    if "http_8b" in names and not os.environ.get("RATE") and "serve_8b" not in {*names[: names.index("http_8b")], *known}:
        names = ["serve_8b", *(name for name in names if name != "serve_8b")]
    return names


def main(arguments: list[str]) -> None:
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    if len(arguments) > 2 and arguments[1] == "--one":
        cuda_bench.run_section(arguments[2], out, Path(arguments[3]), globals())
        return
    budget, first = float(os.environ.get("BENCH_BUDGET_S", "560")), time.perf_counter()
    file = out / "engine.json"
    known = json.loads(file.read_text()) if file.exists() else {"date": time.strftime("%Y-%m-%d")}
    file.write_text(json.dumps(known))
    os.environ["BENCH_OUT"] = str(out.resolve())
    names = order(arguments[1:], known)
    with tempfile.TemporaryDirectory() as scratch:
        entry_points(Path(scratch) / "site")
        for name in names:
            left = budget - (time.perf_counter() - first)
            if left < 8:
                print(f"{name}: left out, the time is used up", flush=True)
            elif name in LIMITS_S:
                cuda_bench.run_together([name], out, Path(scratch), left, "cuda_serve_bench", LIMITS_S)
            else:
                cuda_bench.run_together([name], out, Path(scratch), left)
    found = json.loads(file.read_text())
    for name in names:
        shown = {key: value for key, value in found.get(name, {}).items() if key not in ("said", "whole_run")}
        print(name, json.dumps(shown)[:2600])


if __name__ == "__main__":
    main(sys.argv[1:])
