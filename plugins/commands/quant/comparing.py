"""Two models on the same texts: what is lost between them.

What it is: loading of a model through the CPU device's own parts (the layers, kernels and quantizers that serve it), the logits of whole prompts,
and what follows of them: the divergence of each token's distribution, agreement of the likeliest, perplexities; beside it the error of each quantised
weight, seen while it is read. All sums are float64.
What it does not know: the terminal, records, where texts come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from penstock.core.contract.devices import RunnerConfig
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.errors import ConfigError, UnsupportedFeature
from penstock.kernels.linear.scheme import Quantised, Scheme, dequantise
from penstock.plugins.commands.quant.forms import norm_before
from penstock.plugins.devices.cpu import DTYPES, set_threads
from penstock.plugins.devices.host_ops import HostOps
from penstock.plugins.devices.loading import choose, load_model
from penstock.plugins.models.api import Columns, Stream, Weights
from penstock.plugins.models.tied import HEAD, TABLE
from penstock.plugins.weights.checkpoint import Checkpoint

Tensor = torch.Tensor
BLOCK = 16
ROWS = 64
"""Rows of logits that exist at once."""
RESAMPLES = 1000


class Layer(NamedTuple):
    """A quantised layer: its bits, and ||quantised - wide|| / ||wide||."""

    name: str
    kind: str
    bits: int
    error: float


class Prompt(NamedTuple):
    """Of one text, a value a predicted token."""

    text: str
    kl: np.ndarray[Any, np.dtype[np.float64]]
    """KL(full || quantised), nats."""
    same: np.ndarray[Any, np.dtype[np.float64]]
    """1 where both have the same likeliest token."""
    loss: np.ndarray[Any, np.dtype[np.float64]]
    """-log p of the text's own next token, quantised."""
    loss_full: np.ndarray[Any, np.dtype[np.float64]]


class Summary(NamedTuple):
    """Over all tokens. Intervals are of 95 %, resampled over texts."""

    tokens: int
    kl_mean: float
    kl_p99: float
    top1: float
    ppl: float
    ppl_full: float
    kl_range: tuple[float, float]
    ppl_range: tuple[float, float]
    ppl_full_range: tuple[float, float]


class Watched:
    """A quantizer whose layers are compared with the wide ones as they are read."""

    def __init__(self, own: Any, wide: Checkpoint | None, architecture: str) -> None:
        self._own = own
        self._architecture = architecture
        self._wide = wide
        self.layers: list[Layer] = []
        self.method = own.method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def scheme(self, weights: Weights, layer: str, rows: int, inputs: int) -> Scheme | None:
        """See Quantizer."""
        found: Scheme | None = self._own.scheme(weights, layer, rows, inputs)
        return found

    def read(self, weights: Weights, layer: str, scheme: Scheme, rows: int, inputs: int, device: torch.device) -> Quantised:
        """See Quantizer."""
        q: Quantised = self._own.read(weights, layer, scheme, rows, inputs, device)
        name = f"{layer}.weight"
        if self._wide is not None and name == HEAD and not self._wide.has(name):
            name = TABLE  # tied
        if self._wide is not None and self._wide.has(name):
            found, meant = dequantise(q) * self._moved(weights, layer), self._wide.raw(name)
            if found.shape != meant.shape:
                raise ConfigError(
                    f"--against: its tensor {name!r} is {' x '.join(map(str, meant.shape))}, the quantised model's {' x '.join(map(str, found.shape))}. Name the"
                    " wide model that it was made of.",
                    param="against",
                )
            self.layers.append(Layer(layer, scheme.kind, scheme.bits, relative_error(found, meant)))
        return q

    def _moved(self, weights: Weights, layer: str) -> Tensor | float:
        """Factors that AWQ and SmoothQuant moved from the norm before a layer into its columns."""
        norm = norm_before(layer, self._architecture)
        if norm is None or self._wide is None or not self._wide.has(norm) or not hasattr(weights, "raw"):
            return 1.0
        ours, theirs = weights.raw(norm), self._wide.raw(norm)
        if ours.shape != theirs.shape or torch.equal(ours, theirs):  # another shape: bytes of a GGUF file, whose maker moves nothing
            return 1.0
        factors: Tensor = ours.float() / theirs.float()
        return factors


def relative_error(found: Tensor, meant: Tensor) -> float:
    """||found - meant|| / ||meant||, 0 where both are zero."""
    meant = meant.double()
    norm = float(meant.norm())
    return float((found.double() - meant).norm()) / norm if norm else float(found.double().norm() > 0)


class Loaded:
    """A model on the host that gives logits of whole prompts."""

    def __init__(
        self,
        path: Path,
        *,
        quantization: str | None = None,
        dtype: str = "auto",
        longest: int,
        against: Path | None = None,
        quantizer: Any = None,
        head: str | None = None,
        wrap: Callable[[Any], Any] | None = None,
        kv_cache_dtype: str = "auto",
    ) -> None:
        """`quantizer`: in place of the checkpoint's own, or `wrap` makes one of it; `head`: a word of --lm-head-quantization; `kv_cache_dtype`: as in
        RunnerConfig. Raises ConfigError, CheckpointError or UnsupportedFeature."""
        config = runner_config(path, quantization, dtype, head, kv_cache_dtype)
        choice = choose(config, "cpu", DTYPES, other="bfloat16")
        self.watched = None if choice.quantizer is None else Watched(choice.quantizer, _checkpoint(against), choice.facts.architecture)
        rounding = None if choice.rounding is None else Watched(choice.rounding, _checkpoint(against), choice.facts.architecture)
        own = self.watched if wrap is None or choice.quantizer is None else wrap(choice.quantizer)
        choice = choice._replace(quantizer=quantizer or own, rounding=rounding)
        set_threads(None)
        self.longest = min(longest, choice.facts.max_position)
        self.vocab = choice.facts.vocab_size
        self.scheme = "wide" if self.watched is None else str(self.watched.method)
        if kv_cache_dtype != "auto":
            self.scheme += f", KV cache of {choice.kv_name}"
        self.scheme += f"; output head {rounding.method}" if rounding is not None else ""
        self._ops = HostOps()
        self.model, _ = load_model(
            config, choice, self._ops, torch.device("cpu"), max_len=self.longest, max_rows=1, progress=lambda what, fraction: None
        )
        self.layers = [layer for one in (self.watched, rounding) if one is not None for layer in one.layers]
        if self.model.plain is None and hasattr(self.model, "program"):
            raise UnsupportedFeature(
                f"{path}: its model family runs whole steps by itself, and gives no logits to compare.", param="architectures"
            )

    def logits(self, tokens: Sequence[int]) -> Callable[[int, int], Tensor]:
        """After one pass over the prompt: rows `start` to `end` of its logits, [end - start, V] float32."""
        stream = self.run([tokens])
        hidden = self.model.final(self._ops, stream.x, stream.residual)
        return lambda start, end: self.model.logits(hidden[start:end].contiguous())

    def run(self, prompts: Sequence[Sequence[int]]) -> Stream:
        """All prompts as one step of as many sequences."""
        counts = [len(prompt) for prompt in prompts]
        widest, blocks = -(-max(counts) // BLOCK), [-(-count // BLOCK) for count in counts]
        caches = self.model.attention.caches(self.model.attention.allocate(sum(blocks)))
        table = torch.full((len(prompts), widest), -1, dtype=torch.int32)
        places, first = [], 0
        for row, (count, own) in enumerate(zip(counts, blocks, strict=True)):
            table[row, :own] = torch.arange(first, first + own)
            places.append(torch.arange(first * BLOCK, first * BLOCK + count, dtype=torch.int32))
            first += own
        lengths = torch.tensor(counts, dtype=torch.int32)
        columns = Columns(
            tokens=torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32),
            positions=torch.cat([torch.arange(count, dtype=torch.int32) for count in counts]),
            places=torch.cat(places),
            slots=torch.arange(len(prompts), dtype=torch.int32),
            kv_len=lengths,
            q_start=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            table=table,
            num_decode=0,
            dense=True,
        )
        return self.model.step(self._ops, caches, columns)


def runner_config(path: Path, quantization: str | None, dtype: str, head: str | None, kv_cache_dtype: str) -> RunnerConfig:
    """Of a model that is only looked at, on the host."""
    return RunnerConfig(
        model_path=str(path.absolute()),
        dtype=dtype,
        max_model_len=None,
        block_size=BLOCK,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        kv_cache_memory_bytes=None,
        num_gpu_blocks_override=None,
        gpu_memory_utilization=0.9,
        load_format="auto",
        deterministic=False,
        enforce_eager=True,
        attention_backend=None,
        seed=0,
        threads=None,
        max_logprobs=0,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        lm_head_quantization=head,
        plugins=PluginHost("engine").load(),
    )


def _checkpoint(path: Path | None) -> Checkpoint | None:
    return Checkpoint(path, torch.float32) if path is not None and path.is_dir() and not any(path.glob("*.gguf")) else None


def compare(
    quantised: Loaded,
    full: Loaded,
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    tell: Callable[[int, int], None] = lambda done, count: None,
) -> list[Prompt]:
    """One Prompt for each text of at least two tokens; longer ones are cut. Raises ConfigError where the models do not have one vocabulary."""
    if quantised.vocab != full.vocab:
        raise ConfigError(
            f"--against: it has a vocabulary of {full.vocab} tokens, the quantised model one of {quantised.vocab}. Name the wide model that it was made of.",
            param="against",
        )
    found = []
    for index, text in enumerate(texts):
        tokens = list(encode(text))[: min(quantised.longest, full.longest)]
        if len(tokens) > 1:
            found.append(_prompt(text, tokens, quantised.logits(tokens), full.logits(tokens)))
        tell(index + 1, len(texts))
    if not found:
        raise ConfigError("--text: no text of two tokens or more. Give one, or --text builtin.", param="text")
    return found


def _prompt(text: str, tokens: Sequence[int], ours: Callable[[int, int], Tensor], theirs: Callable[[int, int], Tensor]) -> Prompt:
    parts = []
    for start in range(0, len(tokens) - 1, ROWS):
        end = min(start + ROWS, len(tokens) - 1)
        parts.append(divergence(ours(start, end), theirs(start, end), torch.tensor(tokens[start + 1 : end + 1])))
    kl, same, loss, loss_full = (np.concatenate([part[index].numpy() for part in parts]) for index in range(4))
    return Prompt(text, kl, same, loss, loss_full)


def divergence(ours: Tensor, full: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(KL(full || ours), 1 where the likeliest is the same, -log ours of `following`, -log full of it), a row of logits each, float64."""
    q, p = torch.log_softmax(ours.double(), 1), torch.log_softmax(full.double(), 1)
    kl = (p.exp() * (p - q)).nan_to_num(0.0).sum(1).clamp_min(0)  # a token of logit -inf in both counts nothing
    same = (q.argmax(1) == p.argmax(1)).double()
    at = following.long()[:, None]
    return kl, same, -q.gather(1, at)[:, 0], -p.gather(1, at)[:, 0]


def summary(prompts: Sequence[Prompt], seed: int = 0) -> Summary:
    """Figures over all tokens; intervals by resampling whole texts, whose tokens hang together."""
    kl, same, loss, full = (np.concatenate([getattr(p, name) for p in prompts]) for name in ("kl", "same", "loss", "loss_full"))
    counts = np.array([len(p.kl) for p in prompts], dtype=np.float64)
    sums = np.array([[p.kl.sum(), p.loss.sum(), p.loss_full.sum()] for p in prompts])
    drawn = np.random.default_rng(seed).integers(0, len(prompts), (RESAMPLES, len(prompts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)[:, None]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return Summary(
        tokens=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        top1=float(same.mean()),
        ppl=float(np.exp(loss.mean())),
        ppl_full=float(np.exp(full.mean())),
        kl_range=(float(low[0]), float(high[0])),
        ppl_range=(float(np.exp(low[1])), float(np.exp(high[1]))),
        ppl_full_range=(float(np.exp(low[2])), float(np.exp(high[2]))),
    )


def texts_of(file: Path, option: str = "--text") -> list[str]:
    """Of a JSON file (a list of texts), of JSON lines with "text" or "prompt", or of plain text whose paragraphs are divided by empty lines. Raises ConfigError."""
    try:
        whole = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {file}: cannot be read as UTF-8 text ({type(error).__name__}).", param=option[2:]) from None
    try:
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in whole.split("\n") if line.strip()]
            values = [line.get("text", line.get("prompt")) if isinstance(line, dict) else line for line in lines]
        elif file.suffix == ".json":
            values = json.loads(whole)
        else:
            values = [part.strip() for part in whole.replace("\r\n", "\n").split("\n\n")]
    except ValueError as error:
        raise ConfigError(f"{option} {file}: no JSON ({error}).", param=option[2:]) from None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(
            f"{option} {file}: must hold texts: a JSON list of them, or lines with a text under 'text' or 'prompt'.", param=option[2:]
        )
    broken = next((value for value in values if any("\ud800" <= letter <= "\udfff" for letter in value)), None)
    if broken is not None:
        raise ConfigError(
            f"{option} {file}: half a surrogate pair is no text, but stands in {broken[:60]!r}. Take it out.", param=option[2:]
        )
    return [value for value in values if value]
