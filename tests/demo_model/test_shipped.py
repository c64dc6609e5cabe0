"""The shipped folders must load as they are, and do a little of what their cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import brook_chat as chat
import brook_corpus
import brook_model
import evaluate
import evaluate_served
import jinja2
import jinja2.sandbox
import pytest
import torch
from tokenizers import Tokenizer

from penstock.plugins.demo_model import brook_path, draft_path

FOLDERS = [brook_path(), draft_path()]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": " You are a helpful assistant.\n"},
    {"role": "user", "content": "What is the weather in Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": '{"temperature": 3, "sky": "clear"}'},
    {"role": "assistant", "content": "It is clear in Oslo, with 3 degrees."},
    {"role": "user", "content": "Thanks — 谢谢 🙂"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(brook_path() / "tokenizer.json"))


def _template(folder: Path) -> str:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template: str = config["chat_template"]
    return template


def _render(template: str, messages: list[dict[str, Any]], *, trim: bool = True, **more: Any) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(messages=messages, bos_token=chat.BOS, **more)


def test_both_together_are_small() -> None:
    files = [file for folder in FOLDERS for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 20_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_folder_is_whole(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 4096
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert generation["eos_token_id"] == [vocabulary[chat.END], vocabulary[chat.EOS]]
    assert config["vocab_size"] == len(vocabulary)
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("# Brook")
    model = brook_model.load_model(folder, torch.device("cpu"), torch.float32)
    assert model.parameter_count() <= 8_000_000


def test_the_draft_has_the_same_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (brook_path() / name).read_bytes() == (draft_path() / name).read_bytes()


@pytest.mark.parametrize(
    "text", ["", " ", "Grüße, 世界! 🙂🏽", "a\r\n\tb  c\x00\x7f", '<tool_call>\n{"n": 1}\n</tool_call>', "\u202e١٢٣ x²", "47+38"]
)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert all(len(re.findall(r"\d", entry)) <= 1 for entry in tokenizer.get_vocab() if not entry.startswith("<|"))


def test_tool_marks_are_text_of_one_token_each(tokenizer: Tokenizer) -> None:
    for mark in chat.TEXT_TOKENS:
        ids = tokenizer.encode(mark, add_special_tokens=False).ids
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == mark


@pytest.mark.parametrize("trim", [True, False])
def test_the_template_writes_what_training_wrote(trim: bool) -> None:
    template = _template(brook_path())
    for tools in (None, TOOLS):
        for end in range(1, len(CONVERSATION) + 1):
            part = CONVERSATION[:end]
            assert _render(template, part, trim=trim, tools=tools) == chat.render(part, tools)
            wanted = chat.render(part, tools, add_generation_prompt=True)
            assert _render(template, part, trim=trim, tools=tools, add_generation_prompt=True) == wanted


def test_the_template_writes_the_corpus() -> None:
    template = _template(brook_path())
    corpus = brook_corpus.Corpus(21)
    for _ in range(60):
        one = corpus.draw(900)
        assert _render(template, one.messages, tools=one.tools) == chat.render(one.messages, one.tools)


def test_the_template_takes_arguments_as_text_and_content_in_parts() -> None:
    template = _template(brook_path())
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Go"}]}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert _render(template, messages).endswith(
        '<|user|>Go<|end|><|assistant|><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|end|>'
    )


def test_the_template_works_with_the_plain_filter() -> None:
    environment = jinja2.sandbox.SandboxedEnvironment()
    text = environment.from_string(_template(brook_path())).render(messages=CONVERSATION, tools=TOOLS, add_generation_prompt=True)
    assert '"name": "get_weather"' in text
    assert text.endswith(chat.ASSISTANT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["addition", "subtraction", "recall, up to 500 tokens", "tool call, one tool", "JSON by schema"])
def test_brook_still_does_what_its_card_says(tokenizer: Tokenizer, name: str) -> None:
    model = brook_model.load_model(brook_path(), torch.device("cpu"), torch.float32)
    results = evaluate.measure(model, tokenizer, 12, only=f"^{name}$", show=3)
    assert results[name]["right"] >= 11


def test_the_draft_mostly_agrees(tokenizer: Tokenizer) -> None:
    models = [brook_model.load_model(folder, torch.device("cpu"), torch.float32) for folder in FOLDERS]
    results = evaluate.measure(models[0], tokenizer, 8, draft=models[1], only="^addition$", show=0)
    assert results["draft agreement"]["share"] > 0.8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_transformers_loads_it_and_agrees(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = their_tokenizer.apply_chat_template(CONVERSATION, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert text == chat.render(CONVERSATION, TOOLS, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert their_tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    ours = brook_model.load_model(folder, torch.device("cpu"), torch.float32)
    prompt = ids[:-1]
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids])).logits[0]
    assert brook_model.argmax_along(ours, [prompt[:1]], [ids[1:]])[0] == logits[:-1].argmax(-1).tolist()


def test_what_is_served_is_judged_alike() -> None:
    results = evaluate_served.measure(brook_path(), 3, only="^(addition|tool call, one tool)$", device="cpu", kv_cache_dtype="int8")
    assert {name: sort["cases"] for name, sort in results.items()} == {"addition": 3, "tool call, one tool": 3}
    assert all(sort["right"] >= 2 for sort in results.values())
