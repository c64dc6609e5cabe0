"""A text actor by itself: tokenizers trained on the spot, its worker run in line, an engine that plays a script."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from penstock.core.actors.text import TextActor
from penstock.core.actors.text.worker import encode_batch
from penstock.core.protocol.columns import i32, i64, u8
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import EngineFacts, Message
from penstock.core.protocol.messages import (
    LENGTH,
    RUNNING,
    Abort,
    Admit,
    Answer,
    CheckGrammar,
    Encode,
    EngineStats,
    EngineUp,
    Finished,
    Park,
    Query,
    Rejected,
    StepTokens,
    Submit,
    TextDelta,
    Unpark,
    seq_of,
)
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.actor import To
from penstock.core.runtime.clock import FakeClock
from penstock.plugins.renderers.jinja import JinjaRenderer
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

sys.path.insert(0, str(Path(__file__).parent))  # for chat_templates.py: pytest's importlib mode does not

CORPUS = [
    "The gate opens and the water runs down the penstock to the wheel.",
    "Grüße aus München, naïve café, ¿qué tal?, 東京の水車, 水は流れる, 🙂🙃🎉👩‍👩‍👧 emoji",
    "def gate(level):\n    return level > 3\n\n\tend of text -- stop here. Stop! STOP",
    "one two three four five six seven eight nine ten 0123456789 !@#$%^&*()[]{}<>",
] * 3

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level() -> Tokenizer:
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast.add_tokens([AddedToken("<tool call>", special=False)])
    return fast


def sentencepiece_like() -> Tokenizer:
    """Llama 2's chain: spaces as U+2581, byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for text in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "▁th", "▁the", "at", "er", "wat", "water", "▁w", "▁water"]:
        vocab.setdefault(text, len(vocab))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "t"), ("e", "r"), ("w", "at"), ("wat", "er"), ("▁", "w"), ("▁w", "ater")]
    merges = [m for m in merges if "".join(m) in vocab and m[0] in vocab and m[1] in vocab]
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fast


def word_piece() -> Tokenizer:
    fast = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.decoder = decoders.WordPiece()
    fast.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]", "[CLS]"], show_progress=False)
    )
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> HuggingFaceTokenizer:
    fast = byte_level()
    return HuggingFaceTokenizer(
        fast, {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": CHATML}, [fast.token_to_id("<|im_end|>")], "trained"
    )


@pytest.fixture(scope="session")
def spm() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(sentencepiece_like(), {"bos_token": "<s>", "eos_token": "</s>"}, [], "spm")


@pytest.fixture(scope="session")
def pieces() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(word_piece(), {"eos_token": "[SEP]"}, [], "pieces")


@pytest.fixture(scope="session")
def renderer() -> JinjaRenderer:
    return JinjaRenderer({"default": CHATML}, {"bos_token": "<|bos|>", "eos_token": "<|eos|>"})


def facts(**changes: Any) -> EngineFacts:
    values: dict[str, Any] = {
        "model": "trained",
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "device": "fake",
        "attention": "fake",
        "vocab_size": 512,
        "max_model_len": 4096,
        "block_size": 16,
        "num_blocks": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "deterministic": False,
        "fingerprint": "fp_1",
        "kv_layout": "bf16/16",
        "weights_bytes": 1,
        "workspace_bytes": 1,
        "kv_bytes": 1,
        "slack_bytes": 1,
    }
    return EngineFacts(**{**values, **changes})


class Received:
    """What an edge put together for one choice."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.reason = ""
        self.stop_reason: int | str | None = None
        self.logprobs: list[Any] = []
        self.pieces: list[str] = []
        self.extras: list[Any] = []
        self.fragments: list[tuple[int, int, str]] = []
        """(channel, call, text) of each row."""


class Bench:
    """`send` runs the actor; Encode is answered at once unless `hold_encodes`. `script(seq)` gives a sequence's tokens; the last one ends it."""

    def __init__(self, tokenizer: Any, renderer: Any, config: Config | None = None, **arguments: Any) -> None:
        self.clock = FakeClock()
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.actor = TextActor(
            config or Config(), tokenizer, names=["trained", "alias"], clock=self.clock, rng=random.Random(7), secret=b"s" * 32, **arguments
        )
        self.hold_encodes = False
        self.held: list[Encode] = []
        self.checks: list[CheckGrammar] = []
        """What the grammar worker has been asked and has not answered: a test answers."""
        self.out: list[tuple[int | None, Message]] = []
        self.engine: list[Message] = []
        self.received: dict[tuple[int, int], Received] = {}
        self.finished: dict[int, Finished] = {}
        self.rejected: dict[int, Rejected] = {}
        self.answers: dict[int, Answer] = {}
        self.admitted: dict[int, tuple[int, int]] = {}
        """seq -> (incarnation, next offset) in the engine."""
        self.fresh: list[int] = []
        self.scripts: dict[int, list[int]] = {}
        self.final = LENGTH
        self.epoch = 0
        self.step_number = 0
        self.stats = EngineStats(batch_tokens=3)

    # --- driving

    def send(self, message: Message) -> list[Message]:
        """Returns the plain messages of this call (edges' ones unwrapped), in order."""
        collected: list[Message] = []
        queue = [message]
        while queue:
            for out in self.actor.handle(queue.pop(0)):
                index = out.index if isinstance(out, To) else None
                inner = out.message if isinstance(out, To) else out
                assert type(inner) in self.actor.gives
                assert not isinstance(inner, (TextDelta, Finished, Rejected, Answer)) or index is not None
                collected.append(inner)
                self.out.append((index, inner))
                if isinstance(inner, Encode):
                    if self.hold_encodes:
                        self.held.append(inner)
                    else:
                        queue += encode_batch(self.tokenizer, self.renderer, [inner], self.clock)
                if isinstance(inner, CheckGrammar):
                    self.checks.append(inner)
                self._take(inner)
        return collected

    def release(self) -> None:
        held, self.held = self.held, []
        for encoded in encode_batch(self.tokenizer, self.renderer, held, self.clock):
            self.send(encoded)

    def _take(self, message: Message) -> None:
        if isinstance(message, (Admit, Abort, Park, Unpark)):
            self.engine.append(message)
        if isinstance(message, Admit):
            counts = message.output_counts.tolist() or [0] * len(message.choices)
            assert sum(counts) == len(message.outputs)
            start = 0
            for choice, count in zip(message.choices.tolist(), counts, strict=True):
                seq = seq_of(message.key, choice)
                # What the engine is told was received must be what it once sent.
                assert message.outputs[start : start + count].tolist() == self.scripts.get(seq, [])[:count]
                start += count
                self.admitted[seq] = (message.incarnation, count)
                self.fresh.append(seq)
        elif isinstance(message, Abort):
            for seq in message.seqs.tolist():
                self.admitted.pop(seq, None)
        elif isinstance(message, TextDelta):
            self._delta(message)
        elif isinstance(message, Finished):
            assert message.key not in self.finished
            self.finished[message.key] = message
        elif isinstance(message, Rejected):
            self.rejected[message.key] = message
        elif isinstance(message, Answer):
            self.answers[message.id] = message

    def _delta(self, delta: TextDelta) -> None:
        rows = len(delta.texts)
        for column in (
            delta.keys,
            delta.choices,
            delta.counts,
            delta.prompt_tokens,
            delta.cached_tokens,
            delta.output_tokens,
            delta.reasons,
        ):
            assert len(column) == rows
        assert int(delta.counts.sum()) == len(delta.tokens)
        start = 0
        for row in range(rows):
            got = self.received.setdefault((int(delta.keys[row]), int(delta.choices[row])), Received())
            assert not got.reason, "nothing follows an end"
            count = int(delta.counts[row])
            got.tokens += delta.tokens[start : start + count].tolist()
            start += count
            got.text += delta.texts[row]
            got.pieces.append(delta.texts[row])
            got.reason = delta.reasons[row]
            marked = len(delta.channels) > 0
            got.fragments.append((int(delta.channels[row]) if marked else 0, int(delta.calls[row]) if marked else -1, delta.texts[row]))
            assert int(delta.output_tokens[row]) == len(got.tokens)
            for extra in delta.extras:
                if extra.row == row:
                    got.stop_reason = extra.stop_reason
                    got.logprobs += extra.logprobs or []
                    got.extras.append(extra)

    def up(self, **changes: Any) -> None:
        self.epoch += 1
        self.admitted.clear()
        self.fresh.clear()
        self.send(EngineUp(engine=0, epoch=self.epoch, facts=facts(**changes)))

    def submit(self, key: int, text: str | None = "the water", *, sampling: SamplingParams | None = None, **changes: Any) -> list[Message]:
        values: dict[str, Any] = {
            "key": key,
            "edge": 0,
            "rid": f"r{key}",
            "kind": "completion",
            "model": "trained",
            "sampling": sampling or SamplingParams(),
            "prompt": text,
            "stream": True,
            "received_ns": self.clock.now_ns(),
        }
        if changes.get("kind") == "chat" or "prompt_ids" in changes:
            values["prompt"] = None
        return self.send(Submit(**{**values, **changes}))

    def rows(
        self,
        rows: Iterable[tuple[int, int, int, int, int]],
        *,
        started: Iterable[tuple[int, int]] = (),
        epoch: int | None = None,
        **more: Any,
    ) -> list[Message]:
        """One StepTokens of (seq, incarnation, offset, token, reason) rows."""
        table = list(rows)
        first = list(started)
        self.step_number += 1
        self.clock.advance(0.01)
        return self.send(
            StepTokens(
                engine=0,
                epoch=self.epoch if epoch is None else epoch,
                step=self.step_number,
                seqs=i64([r[0] for r in table]),
                incarnations=i32([r[1] for r in table]),
                offsets=i32([r[2] for r in table]),
                tokens=i32([r[3] for r in table]),
                reasons=u8([r[4] for r in table]),
                stats=self.stats,
                started_ns=self.clock.now_ns() - 8_000_000,
                finished_ns=self.clock.now_ns() - 1_000_000,
                started_seqs=i64([s[0] for s in first]),
                started_cached=i32([s[1] for s in first]),
                **more,
            )
        )

    def step(self, only: Callable[[int], bool] = lambda seq: True) -> int:
        """One token for every admitted sequence, by its script. Returns how many."""
        rows: list[tuple[int, int, int, int, int]] = []
        for seq, (incarnation, offset) in sorted(self.admitted.items()):
            if not only(seq):
                continue
            script = self.scripts[seq]
            last = offset == len(script) - 1
            rows.append((seq, incarnation, offset, script[offset], self.final if last else RUNNING))
            if last:
                del self.admitted[seq]
            else:
                self.admitted[seq] = (incarnation, offset + 1)
        started = [(seq, 0) for seq in self.fresh]
        self.fresh.clear()
        if rows or started:
            self.rows(rows, started=started)
        return len(rows)

    def run(self) -> None:
        while self.step():
            pass

    def query(self, what: str, body: Any = None, edge: int = 0) -> Answer:
        number = len(self.answers) + 100
        self.send(Query(id=number, edge=edge, what=what, body=b"" if body is None else json.dumps(body).encode()))
        return self.answers[number]


@pytest.fixture
def bench(tokenizer: HuggingFaceTokenizer, renderer: JinjaRenderer) -> Bench:
    made = Bench(tokenizer, renderer)
    made.up()
    return made


@pytest.fixture(scope="session")
def make_bench(tokenizer: HuggingFaceTokenizer, renderer: JinjaRenderer) -> Callable[..., Bench]:
    def make(config: Config | None = None, *, with_tokenizer: Any = None, up: bool = True, **arguments: Any) -> Bench:
        made = Bench(with_tokenizer or tokenizer, renderer, config, **arguments)
        if up:
            made.up()
        return made

    return make
