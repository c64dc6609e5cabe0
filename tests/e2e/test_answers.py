"""The whole system's answers: streamed equals whole, alone equals together, cached equals fresh."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

QUESTIONS = [
    "What is 17 + 25?",
    "Hello!",
    "What is Penstock?",
    "Count from 3 to 9.",
    "What is 80 - 35?",
    "Name three colours.",
    "Tell me a short story.",
    "Grüß Gott, что 日本 🎉?",
]


@pytest.fixture
def client(server: Any) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)


def ask(client: OpenAI, question: str, **more: Any) -> Any:
    settings = {"model": "brook", "temperature": 0, "max_tokens": 40} | more
    return client.chat.completions.create(messages=[{"role": "user", "content": question}], **settings)


def streamed(client: OpenAI, question: str, **more: Any) -> tuple[list[str], list[str | None], Any]:
    n = more.get("n", 1)
    texts, reasons, usage = [""] * n, [None] * n, None
    for chunk in ask(client, question, stream=True, stream_options={"include_usage": True}, **more):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                assert reasons[choice.index] is None
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


def test_the_model_answers_right(client: OpenAI) -> None:
    assert "42" in ask(client, "What is 17 + 25?").choices[0].message.content
    assert client.models.list().data[0].id == "brook"


@pytest.mark.parametrize("question", QUESTIONS)
def test_streamed_equals_whole(client: OpenAI, question: str) -> None:
    whole = ask(client, question)
    texts, reasons, usage = streamed(client, question)
    assert texts == [whole.choices[0].message.content]
    assert reasons == [whole.choices[0].finish_reason]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_together_equals_alone(client: OpenAI) -> None:
    def both(question: str) -> tuple[str, list[str]]:
        seeded = ask(client, question, temperature=1.0, seed=5, n=2)
        return ask(client, question).choices[0].message.content, [c.message.content for c in seeded.choices]

    alone = [both(q) for q in QUESTIONS]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(both, QUESTIONS * 3))
    assert together == alone * 3
    assert any(a != b for _, (a, b) in alone)


def test_prefix_cache_is_used_reported_and_harmless(client: OpenAI) -> None:
    system = "You keep facts. " + " ".join(f"Item {i} is number {i * 7 % 90}." for i in range(60))
    messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": "What is 30 + 12?"}]
    first = client.chat.completions.create(model="brook", messages=messages, temperature=0, max_tokens=24)
    second = client.chat.completions.create(model="brook", messages=messages, temperature=0, max_tokens=24)
    assert first.choices[0].message.content == second.choices[0].message.content
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached % 16 == 0
    assert second.usage.prompt_tokens - 32 <= cached < second.usage.prompt_tokens


def test_stop_strings_logprobs_and_limits(client: OpenAI) -> None:
    full = ask(client, "Count from 3 to 9.").choices[0].message.content
    assert "6" in full
    texts, reasons, _ = streamed(client, "Count from 3 to 9.", stop=["6"])
    assert texts == [full.split("6")[0]]
    assert reasons == ["stop"]
    short = ask(client, "Count from 3 to 9.", max_tokens=3, logprobs=True, top_logprobs=2)
    assert short.choices[0].finish_reason == "length"
    content = short.choices[0].logprobs.content
    assert len(content) == 3
    for item in content:
        assert item.logprob == max(t.logprob for t in item.top_logprobs)
        assert len(item.top_logprobs) == 2


def test_completions_by_text_and_by_ids_agree(server: Any, client: OpenAI) -> None:
    text = "Penstock is an inference server"
    ids = server.client.post("/tokenize", json={"prompt": text}).json()
    assert server.client.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"].endswith(text)
    a = client.completions.create(model="brook", prompt=text, temperature=0, max_tokens=12)
    b = client.completions.create(model="brook", prompt=ids["tokens"], temperature=0, max_tokens=12)
    assert a.choices[0].text == b.choices[0].text
    assert a.usage.prompt_tokens == ids["count"]
    pair = client.completions.create(model="brook", prompt=[text, "Hello"], temperature=0, max_tokens=12, echo=True)
    assert [c.index for c in pair.choices] == [0, 1]
    assert pair.choices[0].text == text + a.choices[0].text


def test_wrong_requests_name_the_field_and_disturb_nobody(client: OpenAI) -> None:
    before = ask(client, "Hello!").choices[0].message.content
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, "Hello!", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "word " * 5000)
    assert long.value.code == "context_length_exceeded"
    for field in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError) as much:
            ask(client, "Hello!", **{"max_tokens": openai.omit, field: 5000})
        assert (much.value.code, much.value.param) == ("context_length_exceeded", field)
        assert "maximum context length is 4096 tokens" in str(much.value)
    with pytest.raises(openai.NotFoundError):
        ask(client, "Hello!", model="nobody")
    assert ask(client, "Hello!").choices[0].message.content == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 2**40),
        ("top_k", 10**25),
        ("max_tokens", 10**25),
        ("truncate_prompt_tokens", 10**25),
        ("stop_token_ids", [10**25]),
        ("logit_bias", {str(10**25): 1}),
        ("seed", 2**64),
        ("n", 2**31),
    ],
)
def test_numbers_beyond_all_bounds_are_refused_not_passed_on(server: Any, field: str, value: Any) -> None:
    answer = server.client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2, "temperature": 1, field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(field)
    assert server.client.get("/health/ready").status_code == 200


@pytest.mark.parametrize("prompt", ["Three é", "中", [6, 5], "a \U0001f9ff z", "<|im_start|>user", [300, 6, 300]])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_says_where_each_token_is(server: Any, prompt: Any, stream: bool) -> None:
    if isinstance(prompt, str):
        ids = server.client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    else:
        ids = prompt
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 2, "ignore_eos": True, "stream": stream}
    answer = server.client.post("/v1/completions", json=body)
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        parts = [event["choices"][0] for event in events]
        text = "".join(part["text"] for part in parts)
        names, offsets = ([x for part in parts if part["logprobs"] for x in part["logprobs"][field]] for field in ("tokens", "text_offset"))
    else:
        (choice,) = answer.json()["choices"]
        text, names, offsets = choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert len(names) == len(offsets)
    assert len(ids) <= len(names) <= len(ids) + 2, "special tokens that are drawn are no text"
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[-1] <= len(text)
    whole = [(name, offset) for name, offset in zip(names, offsets, strict=True) if "\ufffd" not in name and not name.startswith("<|")]
    assert all(text.startswith(name, offset) for name, offset in whole)
    if prompt == "Three é":
        assert (names[0], names[len(ids) - 2 : len(ids)]) == ("Th", ["\ufffd", "\ufffd"])
        assert offsets[len(ids) - 2 : len(ids)] == [6, 6]


def test_a_prompt_that_fills_the_context_is_scored(server: Any, client: OpenAI) -> None:
    ids = [20 + i % 300 for i in range(4096)]
    scored = client.completions.create(model="brook", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    (choice,) = scored.choices
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 4096
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert (choice.finish_reason, scored.usage.prompt_tokens, scored.usage.completion_tokens) == ("length", 4096, 0)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="brook", prompt=[*ids, 1], max_tokens=0, echo=True)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/detokenize", {"tokens": [1, 2**70]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-5]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 2, "x"]}, "tokens[2]"),
        ("/v1/completions", {"prompt": [[1], [2, 99999]]}, "prompt[1][1]"),
        ("/v1/completions", {"prompt": [1, -1]}, "prompt[1]"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [1, 99999]}, "stop_token_ids[1]"),
        ("/v1/completions", {"prompt": "a", "allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
    ],
)
def test_numbers_that_are_no_tokens_are_named_with_their_place(server: Any, path: str, body: Any, param: str) -> None:
    answer = server.client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].startswith(param)
    assert "`" not in error["message"]


def test_a_client_that_leaves_frees_its_blocks(server: Any) -> None:

    def held() -> tuple[float, float]:
        return server.metric("penstock_sequences", 'state="running"'), server.metric("penstock_kv_blocks", 'state="used"')

    assert server.until(lambda: held() == (0, 0))
    body = {"model": "brook", "prompt": "Once", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and json.loads(line[6:])["choices"]:
                break
    assert server.until(lambda: held() == (0, 0))


def test_health_and_metrics_under_load(server: Any, client: OpenAI) -> None:
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            ask(client, "Tell me a short story.", max_tokens=60)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for path in ("/health", "/health/live", "/health/ready"):
            assert httpx.get(server.url + path).status_code == 200
        text = server.client.get("/metrics").text
    finally:
        stop.set()
        thread.join()
    for name in (
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        "penstock_pending_requests",
    ):
        assert name in text
