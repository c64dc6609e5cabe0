"""`penstock bench grammars`: what masks, compiling and obeying cost.

What it is: over schemas of many kinds, for a vocabulary: microseconds a mask, milliseconds until a schema's first mask (in a process as the server's own
compiles it, and again as the engine does), and with --turns the tokens/s of a batch with a schema against free answers, over HTTP, in turns.
What it does not know: devices; how a server masks.
"""

from __future__ import annotations

import json
import queue
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

from penstock.core.contract.host import PluginHost
from penstock.core.processes.grammars import GrammarWorker
from penstock.core.protocol.columns import i32
from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.messages import CheckGrammar, Grammar, GrammarChecked, Vocabulary
from penstock.plugins.commands.bench.report import percentile
from penstock.plugins.tokenizers.hugging_face import byte_alphabet

MOST_TOKENS = 200
"""Of an answer that are walked."""
PERSON = {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"}}
FILLS = {
    "type": "array",
    "items": {"type": "object", "properties": PERSON, "required": [*PERSON], "additionalProperties": False},
    "minItems": 10_000,
}
"""No answer that fits is whole, so that all have the same length."""


def trained(size: int, folders: Iterable[Path]) -> Any:
    """A byte-level BPE of so many tokens, learnt from the texts of these folders: as long and as mixed as large models' tokens are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    kinds = {".py", ".pyi", ".txt", ".json", ".md", ".rst"}
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in kinds and path.is_file())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8", errors="replace") for path in files[:8000]), trainer)
    return tokenizer


def vocabulary_of(tokenizer: Any) -> tuple[list[bytes], list[int]]:
    """The bytes of each token of a byte-level tokenizer, and which are special."""
    byte_of = byte_alphabet()
    special = sorted(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    spelled = [tokenizer.id_to_token(id) or "" for id in range(tokenizer.get_vocab_size())]
    return [b"" if id in special else bytes(byte_of.get(char, 63) for char in token) for id, token in enumerate(spelled)], special


class _Waiter:
    """A grammar worker that is waited for."""

    def __init__(self, tokens: list[bytes], special: list[int], backend: str) -> None:
        self._answers: queue.SimpleQueue[GrammarChecked] = queue.SimpleQueue()
        vocabulary = Vocabulary(data=b"".join(tokens), counts=i32([len(token) for token in tokens]), special=i32(special))
        self._worker = GrammarWorker(None, vocabulary, self._answers.put, backend=backend)  # type: ignore[arg-type]
        self.compile("{}")  # its process has started

    def compile(self, source: str) -> GrammarChecked:
        self._worker.submit(CheckGrammar(job=0, grammar=Grammar(kind="json", source=source, field="schema")))
        return self._answers.get()

    def close(self) -> None:
        self._worker.close()


def masks(tokenizer: Any, pairs: Iterable[tuple[str, str, str]], backend: str = "llguidance") -> dict[str, Any]:
    """Each schema is compiled in the worker's process, then made again and walked along its answer as an engine does. Raises ConfigError for a backend that
    is not there."""
    tokens, special = vocabulary_of(tokenizer)
    spec = PluginHost("text").load().grammars(backend)
    assert spec is not None
    engine, other, worker = spec.factory(tokens, special), spec.factory(tokens, special), _Waiter(tokens, special, backend)
    own = 0
    out = np.zeros(-(-len(tokens) // 32), np.int32)
    took: list[float] = []
    busy: list[float] = []
    firsts: list[float] = []
    firsts_busy: list[float] = []
    compiles: list[float] = []
    kinds: Counter[str] = Counter()
    seen: set[str] = set()
    try:
        for kind, schema, answer in pairs:
            if schema in seen:
                continue
            seen.add(schema)
            began = time.perf_counter()
            checked = worker.compile(schema)
            compiled = time.perf_counter()
            if checked.error:
                kinds[f"{kind}, not taken"] += 1
                continue
            cpu = time.thread_time()
            matcher = engine.matcher(checked.compiled)
            matcher.mask(out)
            first = time.perf_counter()
            other.compile("json", schema)
            firsts_busy.append(time.thread_time() - cpu)
            kinds[kind] += 1
            own += checked.compiled[:1] in (b"x", b"X")
            compiles.append(compiled - began)
            firsts.append(first - began)
            for token in tokenizer.encode(answer, add_special_tokens=False).ids[:MOST_TOKENS]:
                at, cpu = time.perf_counter(), time.thread_time()
                try:
                    matcher.mask(out)
                except PenstockError:
                    break
                took.append(time.perf_counter() - at)
                busy.append(time.thread_time() - cpu)
                if not matcher.consume(token):
                    break  # an answer of the suite that is right in other spellings only
    finally:
        worker.close()
    return {
        "backend": backend,
        "by_xgrammar": own,
        "vocabulary": len(tokens),
        "schemas": len(firsts),
        "kinds": dict(sorted(kinds.items())),
        "masks": len(took),
        "mask_us": {name: percentile(took, share) * 1e6 for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        "mask_cpu_us": {name: percentile(busy, share) * 1e6 for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        "compile_ms": {name: percentile(compiles, share) * 1e3 for name, share in (("p50", 0.5), ("p99", 0.99))},
        "first_mask_cpu_ms": {name: percentile(firsts_busy, share) * 1e3 for name, share in (("p50", 0.5), ("p99", 0.99))},
        "first_mask_ms": {name: percentile(firsts, share) * 1e3 for name, share in (("p50", 0.5), ("p99", 0.99))},
    }


def _children_s() -> float:
    import psutil

    used = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in used)


def in_turns(url: str, *, rows: int, tokens: int, turns: int) -> dict[str, Any]:
    """Bursts of `rows` equal requests, free and with a schema in turns, each first every second time; a first pair is not counted. CPU time is that of all
    child processes of this one. Raises ClickException where an answer ends early."""

    def ask(body: dict[str, Any]) -> int:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            return int(json.loads(reply.read())["usage"]["completion_tokens"])

    rates: dict[str, list[float]] = {"free": [], "schema": []}
    cpu: dict[str, list[float]] = {"free": [], "schema": []}
    for turn in range(turns + 1):
        for kind in sorted(rates, reverse=turn % 2 == 1):
            more: dict[str, Any] = {"ignore_eos": True} if kind == "free" else {"guided_json": FILLS}
            bodies = [
                {"prompt": f"Tell of river {row}:", "max_tokens": tokens, "temperature": 1.0, "seed": turn * rows + row, **more}
                for row in range(rows)
            ]
            with ThreadPoolExecutor(rows) as pool:
                before, began = _children_s(), time.perf_counter()
                counts = list(pool.map(ask, bodies))
                wall, used = time.perf_counter() - began, _children_s() - before
            if set(counts) != {tokens}:
                raise click.ClickException(f"A {kind} answer has {min(counts)} tokens instead of {tokens}: nothing was measured.")
            if turn:
                rates[kind].append(rows * tokens / wall)
                cpu[kind].append(used / tokens * 1e3)
    return {
        "rows": rows,
        "tokens_each": tokens,
        "tokens_per_s": rates,
        "ratios": (ratios := [schema / free for free, schema in zip(rates["free"], rates["schema"], strict=True)]),
        "schema_over_free": statistics.median(ratios),
        "cpu_ms_a_step": {kind: statistics.median(some) for kind, some in cpu.items()},
    }
