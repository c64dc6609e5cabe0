"""The Hugging Face tokenizer plugin and the worker thread."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from penstock.core.actors.text.resolve import generation_defaults
from penstock.core.actors.text.worker import TokenizerWorker, bad_word_ids, encode_batch
from penstock.core.contract.hookspecs import API_LEVEL
from penstock.core.protocol.config import Config, build
from penstock.core.protocol.errors import CheckpointError
from penstock.core.protocol.generation import settings
from penstock.core.protocol.hashing import chain
from penstock.core.protocol.messages import Encode, Encoded, Limits
from penstock.core.runtime.clock import FakeClock
from penstock.plugins import renderers, tokenizers
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer, bytes_rule


def folder(tmp_path: Path, fast: Tokenizer, **files: Any) -> str:
    fast.save(str(tmp_path / "tokenizer.json"))
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return str(tmp_path)


def fresh(tokenizer: HuggingFaceTokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer._fast.to_str())


def test_end_tokens_come_from_every_file(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        fresh(tokenizer),
        generation_config={"eos_token_id": [3, 7]},
        config={"eos_token_id": 7},
        tokenizer_config={"eos_token": {"content": "<|eos|>"}, "bos_token": "<|bos|>"},
    )
    loaded = HuggingFaceTokenizer.load(path)
    assert loaded.eos_ids == [3, 7, loaded._fast.token_to_id("<|eos|>")]
    assert loaded.bos_id == loaded._fast.token_to_id("<|bos|>")
    assert loaded.special_ids == tokenizer.special_ids
    assert len(loaded.special_ids) == 4


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        HuggingFaceTokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        HuggingFaceTokenizer.load(str(tmp_path))


def test_truncation_and_padding_of_the_file_are_off(tokenizer: HuggingFaceTokenizer) -> None:
    fast = fresh(tokenizer)
    fast.enable_truncation(3)
    fast.enable_padding(length=50)
    made = HuggingFaceTokenizer(fast)
    [ids] = made.encode_batch(["the water runs down the penstock"], add_special_tokens=False)
    assert 3 < len(ids) < 50
    assert ids.dtype == np.int32


def test_the_post_processor_alone_writes_a_begin_token(tokenizer: HuggingFaceTokenizer) -> None:
    config = {"bos_token": "<|bos|>", "add_bos_token": True}
    made = HuggingFaceTokenizer(fresh(tokenizer), config)
    bos = made.bos_id
    assert bos is not None
    assert bos not in made.encode_batch(["x"], add_special_tokens=True)[0].tolist()
    fast = fresh(tokenizer)
    fast.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    once = HuggingFaceTokenizer(fast, config)
    assert once.encode_batch(["x"], add_special_tokens=True)[0].tolist().count(bos) == 1
    assert bos not in once.encode_batch(["x"], add_special_tokens=False)[0].tolist()


def test_a_character_bound_only_where_it_is_true(tokenizer: HuggingFaceTokenizer, spm: HuggingFaceTokenizer) -> None:
    assert tokenizer.max_chars_per_token == max(len(tokenizer.token_text(t)) for t in range(tokenizer.vocab_size))
    assert spm.max_chars_per_token == 0, "its normalizer may drop characters"


@pytest.mark.parametrize(
    ("decoder", "exact"),
    [
        (None, False),
        ({"type": "ByteLevel"}, True),
        ({"type": "Metaspace", "replacement": "▁"}, True),
        ({"type": "WordPiece"}, False),
        ({"type": "BPEDecoder", "suffix": "</w>"}, False),
        ({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}, False),
        ({"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Fuse"}]}, False),
        (
            {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]},
            False,
        ),
    ],
)
def test_which_decoders_are_byte_exact(decoder: Any, exact: bool) -> None:
    assert (bytes_rule(decoder) is not None) is exact


def test_plugins_register_with_the_current_level(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    specs = tokenizers.register_tokenizers()
    assert [one.api_level for one in specs] == [API_LEVEL["tokenizers"]] * len(specs)
    spec = specs[0]
    assert not spec.matches(str(tmp_path))
    path = folder(tmp_path, fresh(tokenizer), tokenizer_config={"chat_template": "{{ messages[0].content }}"})
    assert spec.matches(path)
    assert spec.factory(path).vocab_size == tokenizer.vocab_size
    chats = renderers.register_chat_renderers()
    assert [one.api_level for one in chats] == [API_LEVEL["chat_renderers"]] * len(chats)
    chat = chats[0]
    made = chat.factory(path, None)
    assert (
        made.render([{"role": "user", "content": "x"}], tools=None, add_generation_prompt=False, continue_final_message=False, kwargs={})
        == "x"
    )


def test_generation_defaults(tmp_path: Path) -> None:
    assert generation_defaults(Config(), str(tmp_path)) == {}
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.5, "top_k": 9, "max_new_tokens": 7, "do_sample": true, "top_p": null}'
    )
    assert generation_defaults(Config(), str(tmp_path)) == {"temperature": 0.5, "top_k": 9, "max_tokens": 7}
    assert generation_defaults(Config(generation_config="vllm"), str(tmp_path)) == {}
    assert generation_defaults(Config(generation_config=str(tmp_path)), "/nowhere")["top_k"] == 9
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.5}')
    assert generation_defaults(Config(), str(tmp_path)) == {"temperature": 0.0}
    with pytest.raises(CheckpointError, match="--generation-config"):
        generation_defaults(Config(generation_config=str(tmp_path / "none")), "/nowhere")
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(CheckpointError, match="temperature"):
        generation_defaults(Config(), str(tmp_path))


@pytest.mark.parametrize(
    ("file", "override", "want"),
    [
        ({"temperature": 0.5, "top_k": 9}, {"temperature": 0.1}, {"temperature": 0.1, "top_k": 9}),
        ({"do_sample": False}, {"temperature": 0.1}, {"temperature": 0.1}),
        ({"do_sample": False, "temperature": 0.5}, {"top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.5}, {"do_sample": True}, {"temperature": 0.5}),
        ({"temperature": 0.5}, {"do_sample": False}, {"temperature": 0.0}),
        ({"temperature": 0.5, "max_new_tokens": 7}, {"max_new_tokens": None}, {"temperature": 0.5}),
        ({}, {"max_new_tokens": 7, "repetition_penalty": 1.1}, {"max_tokens": 7, "repetition_penalty": 1.1}),
        ({"top_k": 9}, {}, {"top_k": 9}),
    ],
)
def test_generation_defaults_can_be_overridden(
    tmp_path: Path, file: dict[str, Any], override: dict[str, Any], want: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert generation_defaults(build({"override_generation_config": override}), str(tmp_path)) == want
    alone = generation_defaults(build({"override_generation_config": override, "generation_config": "vllm"}), str(tmp_path))
    assert alone == settings(override)


def test_a_generation_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json must hold a JSON object"):
        generation_defaults(Config(), str(tmp_path))


# ------------------------------------------------------------------ the worker


def test_a_bad_job_does_not_take_its_batch_along(tokenizer: Any, renderer: Any) -> None:
    class Touchy:
        """A tokenizer that cannot encode one text."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> Any:
            if "bad" in texts:
                raise ValueError("bad text")
            return tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    tight = Limits(max_model_len=10, max_chars=1000, context_chars=50, max_ids=250)
    jobs = [
        Encode(job=1, kind="completion", prompt="the water", block_size=2, root_hash=b"r" * 16),
        Encode(job=2, kind="completion", prompt="bad"),
        Encode(job=3, kind="chat", messages=b"nonsense"),
        Encode(job=4, kind="completion", prompt="a\ud800b"),
        Encode(job=5, kind="completion", prompt="x", add_special_tokens=False),
        Encode(job=6, kind="completion", ids=np.array([1, 2, 3, 4, 5], np.int32), keep=4, block_size=2, root_hash=b"r" * 16),
        Encode(job=7, kind="completion", prompt="long " * 100, limits=tight),
    ]
    jobs.append(Encode(job=8, kind="completion", prompt="long " * 201, keep=3, limits=tight))
    done = encode_batch(Touchy(), renderer, jobs, FakeClock())  # type: ignore[arg-type]
    assert [e.job for e in done] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [bool(e.error) for e in done] == [False, True, True, True, False, False, True, True]
    assert [e.error_param for e in done] == [None, "prompt", "messages", "prompt", None, None, "prompt", "prompt"]
    assert (done[6].error_code, done[6].error_status) == ("context_length_exceeded", 400)
    assert (done[7].error_code, done[7].error_status) == ("request_too_large", 413), "cut or not, it would have to be tokenised"
    assert done[0].ids.tolist() == tokenizer.encode_batch(["the water"], add_special_tokens=True)[0].tolist()
    assert done[0].hashes == chain(b"r" * 16, done[0].ids, 2)
    assert done[5].ids.tolist() == [2, 3, 4, 5]
    assert done[5].hashes == chain(b"r" * 16, done[5].ids, 2)


def test_a_template_that_writes_the_begin_token_gets_no_second(tokenizer: Any) -> None:
    from penstock.plugins.renderers.jinja import JinjaRenderer

    fast = fresh(tokenizer)
    fast.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_id)])
    made = HuggingFaceTokenizer(fast, {"bos_token": "<|bos|>"})
    for template, count in (("<|bos|>x", 1), ("x", 1)):
        [done] = encode_batch(
            made,
            JinjaRenderer({"default": template}, {}),
            [Encode(job=1, kind="chat", messages=b'[{"role":"user","content":"x"}]')],
            FakeClock(),
        )
        assert done.ids.tolist().count(made.bos_id) == count


def test_bad_words_in_both_spellings(tokenizer: Any) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode_batch([text], add_special_tokens=False)[0].tolist()  # type: ignore[no-any-return]

    assert bad_word_ids(tokenizer, ["water"]) == [ids("water"), ids(" water")]


def test_a_renderer_without_templates_of_requests_says_so(tokenizer: Any) -> None:
    class Plain:
        def render(self, messages: Any, **how: Any) -> str:
            return "x"

    job = Encode(job=1, kind="chat", messages=b'[{"role":"user","content":"x"}]')
    other = msgspec.structs.replace(job, job=2, chat_template="{{ messages }}")
    one, two = encode_batch(tokenizer, Plain(), [job, other], FakeClock())
    assert (one.error, one.rendered) == ("", "x")
    assert (two.error_code, two.error_param, two.error_status) == ("unsupported_feature", "chat_template", 400)


def test_the_worker_answers_every_job_from_its_thread(tokenizer: Any, renderer: Any) -> None:
    done: list[Encoded] = []
    threads: set[str] = set()
    ready = threading.Event()

    def deliver(encoded: Encoded) -> None:
        done.append(encoded)
        threads.add(threading.current_thread().name)
        if len(done) == 300:
            ready.set()

    worker = TokenizerWorker(tokenizer, renderer, deliver)
    for job in range(300):
        worker.submit(Encode(job=job, kind="completion", prompt=f"the water {job}"))
    assert ready.wait(30)
    assert [e.job for e in done] == list(range(300))
    assert threads == {"penstock-tokenizer"}
    ready.clear()
    done.clear()
    for job in range(300):
        worker.submit(Encode(job=job, kind="chat", messages=b'[{"role":"user","content":"x"}]', chat_template="{{ messages[0].content }}"))
    assert ready.wait(30)
    worker.close()
    own = threads - {"penstock-tokenizer"}  # a template of a request takes its time where others do
    assert own
    assert own <= {"penstock-templates-0", "penstock-templates-1"}
    assert all(not e.error and e.finished_ns >= e.started_ns > 0 for e in done)
