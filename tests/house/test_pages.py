"""The pages for users: nothing that exists is missing on them, what they say about values is so, and what they show runs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from penstock import LLM, SamplingParams
from penstock.core.actors.text.tokenizing import LLMTokenizer
from penstock.core.protocol import errors
from penstock.core.protocol.config import OPTIONS, Config
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.generation import NAMES
from penstock.core.protocol.outputs import CompletionOutput, Logprob, RequestOutput, StreamDelta
from penstock.core.protocol.speculation import FIELDS
from penstock.transports import fields, openapi_replies
from penstock.transports.anthropic_schema import ANTHROPIC_REQUESTS
from penstock.transports.message_batches import MessageBatchRequest
from penstock.transports.openai import Call, parse_chat, parse_completion
from penstock.transports.openai_schema import (
    HINTS,
    REFUSED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    MetadataRequest,
    TokenizeRequest,
    decode,
)
from penstock.transports.openapi import ASKED, described
from penstock.transports.openapi_replies import REPLIES
from penstock.transports.refused import MESSAGE_FIELDS
from penstock.transports.responses_schema import RESPONSES_REQUESTS
from penstock.transports.storage_schema import BatchRequest, FileUpload
from penstock.transports.tgi_schema import TGI_REQUESTS
from penstock.transports.tokens_schema import TokensRequest

DOCS = Path(__file__).resolve().parents[2] / "docs"
REQUESTS = (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    MetadataRequest,
    FileUpload,
    BatchRequest,
    *ANTHROPIC_REQUESTS,
    *RESPONSES_REQUESTS,
    *TGI_REQUESTS,
    TokensRequest,
    MessageBatchRequest,
)


def schemas() -> dict[str, Any]:
    """Every struct that requests and replies are made of, by name, as the OpenAPI document has it."""
    answers = [kind for one in openapi_replies.every_answer() for kind in one.kinds if isinstance(kind, type)]
    _, components = msgspec.json.schema_components(
        [*REQUESTS, *answers, openapi_replies.ErrorReply, *openapi_replies.OWN_ERRORS.values()], ref_template="#/components/schemas/{name}"
    )
    return {name: one for name, one in components.items() if "properties" in one}


def section(page: str, heading: str) -> str:
    found = re.search(rf"(?ms)^(#+) {re.escape(heading)}$\n(.*?)(?=^#|\Z)", page)
    assert found, heading
    return found.group(2)


@pytest.fixture(scope="module")
def http_page() -> str:
    return (DOCS / "http.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", sorted(schemas()))
def test_each_field_of_each_request_and_reply_has_its_line(http_page: str, kind: str) -> None:
    text = section(http_page, kind)
    if kind in ("ChatRequest", "CompletionRequest"):
        text += section(http_page, "Fields of both generation requests")
    for name in schemas()[kind]["properties"]:
        assert re.search(rf"(?m)^\| `{re.escape(name)}` \| [^|]+ \| [^|\s]", text), f"{kind}.{name}"


def test_no_line_is_left_over() -> None:
    asked = {name for kind, one in schemas().items() if kind in ASKED for name in one["properties"]}
    told = {name for kind, one in schemas().items() if kind not in ASKED for name in one["properties"]}
    assert fields.FIELDS.keys() <= asked
    assert fields.REPLY_FIELDS.keys() <= told
    for table in (fields.OWN, fields.REPLY_OWN):
        for kind, own in table.items():
            assert own.keys() <= schemas()[kind]["properties"].keys()


def test_each_refused_name_hint_endpoint_and_code_is_there(http_page: str) -> None:
    for name in (*(name for table in REFUSED.values() for name in table), *HINTS, *MESSAGE_FIELDS):
        assert f"`{name}`" in section(http_page, "Other fields"), name
    for path in REPLIES:
        assert re.search(rf"(?m)^\| `(GET|POST|DELETE) {re.escape(path)}` \|", section(http_page, "Endpoints")), path
    text = section(http_page, "Errors")
    told = set(re.findall(r"(?m)^\| `(\w+)` \| [\d, ]+ \| `\w+`", text))
    kept = set(re.findall(r"`(\w+)`", text.split("Codes that no reply has:")[1].split("(")[0]))
    assert told | kept == set(get_args(errors.ErrorCode))
    assert not told & kept
    statuses = {status for line in re.findall(r"(?m)^\| `\w+` \| ([\d, ]+) \|", text) for status in line.split(", ")}
    assert statuses == {str(status) for status in openapi_replies.ERRORS}


def refused_rows(text: str) -> dict[str, tuple[list[Any], str]]:
    """Field -> (values that are taken, what to do instead)."""
    rows = re.findall(r"(?m)^\| (`[^|]+) \| ([^|]*) \| ([^|]+) \|$", text)
    return {
        name: ([json.loads(value) for value in re.findall(r"`([^`]+)`", values)], instead)
        for names, values, instead in rows
        for name in re.findall(r"`(\w+)`", names)
    }


def test_each_refused_name_has_its_own_way_out_and_the_values_that_are_taken(http_page: str) -> None:
    fields, within = map(refused_rows, section(http_page, "Other fields").split("In a message:"))
    for shown, table in ((fields, REFUSED[ChatRequest]), (within, MESSAGE_FIELDS)):
        assert shown.keys() == table.keys()
        for name, entry in table.items():
            assert shown[name] == ([value for value in entry.neutral if value is not None], entry.instead or "Leave it out."), name


@pytest.mark.parametrize("name", [name for name in REFUSED[ChatRequest] if name not in ChatRequest.__struct_fields__])
def test_the_values_on_the_page_are_taken_and_others_refused(http_page: str, name: str) -> None:
    for value in (None, *refused_rows(section(http_page, "Other fields").split("In a message:")[0])[name][0]):
        assert parse(ChatRequest, **{name: value}).ignored == []
    refused(ChatRequest, name, "something else")


def test_which_refused_fields_tokenize_takes(http_page: str) -> None:
    (told,) = re.findall(r"(?m)^/tokenize refuses .*$", section(http_page, "Other fields"))
    body = {"prompt": "x"}
    for name in REFUSED[ChatRequest].keys() - TokenizeRequest.__struct_fields__:
        asks = json.dumps({**body, name: "something else"}).encode()
        if f"`{name}`" in told:
            with pytest.raises(InvalidRequest) as raised:
                decode(asks, TokenizeRequest)
            assert raised.value.param == name
        elif name not in TokenizeRequest.__struct_fields__:
            assert decode(asks, TokenizeRequest)[2] == [name]
    assert decode(json.dumps({"tokens": [1], "grammar": "x"}).encode(), DetokenizeRequest)[2] == ["grammar"]


def test_the_openapi_document_says_what_fields_do() -> None:
    components = schemas()
    described(components)
    for kind, one in components.items():
        for name, schema in one["properties"].items():
            assert schema["description"].strip(), f"{kind}.{name}"
    said = components["ChatRequest"]["properties"]["temperature"]["description"]
    assert "0 to 1000" in said
    assert "Default: the model's, or 1" in said
    assert (
        components["TokenizeRequest"]["properties"]["prompt"]["description"]
        != components["CompletionRequest"]["properties"]["prompt"]["description"]
    )


# ------------------------------------------------------------------ what the lines say is so


def number(text: str) -> float | int:
    if text.startswith("--"):
        return int(OPTIONS[text[2:].replace("-", "_")].default)
    power = re.fullmatch(r"(-?)2\^(\d+)(-1)?", text)
    if power:
        return (-1 if power.group(1) else 1) * 2 ** int(power.group(2)) - bool(power.group(3))
    return float(text) if "." in text else int(text)


def numeric() -> Iterator[tuple[type[msgspec.Struct], str, str]]:
    for kind in (ChatRequest, CompletionRequest):
        lines = {**fields.FIELDS, **fields.OWN[kind.__name__]}
        for name in kind.__struct_fields__:  # one without a line fails a test of its own
            if name in lines and re.search(r"\S+ to \S+", lines[name].allowed):
                yield kind, name, lines[name].allowed


def parse(kind: type[msgspec.Struct], **given: Any) -> Call:
    if kind is ChatRequest:
        more = {"logprobs": True} if "top_logprobs" in given else {}
        more |= {"use_beam_search": True} if given.keys() & {"length_penalty", "best_of"} else {}
        return parse_chat(json.dumps({"messages": [{"role": "user", "content": "hi"}], **more, **given}).encode(), Config())
    more = {"max_tokens": 2**31 - 1} if "min_tokens" in given else {"use_beam_search": True} if "length_penalty" in given else {}
    return parse_completion(json.dumps({"prompt": "hi", **more, **given}).encode(), Config())


def refused(kind: type[msgspec.Struct], name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(kind, **{name: value})
    assert raised.value.param == name


RANGES = list(numeric())


@pytest.mark.parametrize(("kind", "name", "allowed"), RANGES, ids=[f"{kind.__name__}-{name}" for kind, name, _ in RANGES])
def test_a_range_is_obeyed_at_both_ends(kind: type[msgspec.Struct], name: str, allowed: str) -> None:
    found = re.fullmatch(r"(?:-1, or from )?(above )?(\S+) to (\S+)", allowed)
    assert found, allowed
    low, high = number(found.group(2)), number(found.group(3))
    whole = "integer" in json.dumps(schemas()[kind.__name__]["properties"][name])
    step = 1 if whole else 0.001
    parse(kind, **{name: low + (0.001 if found.group(1) else 0)})
    parse(kind, **{name: high})
    refused(kind, name, low if found.group(1) else -2 if allowed.startswith("-1, or") else low - step)
    refused(kind, name, high + step)


def test_the_ranges_are_those_of_every_number() -> None:
    assert {name for _, name, _ in RANGES} == {
        *("n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "priority"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_tokens", "truncate_prompt_tokens"),
        *("logprobs", "top_logprobs", "prompt_logprobs", "best_of", "length_penalty", "retain_s", "stream_interval"),
        "stream_smoothing_ms",
    }


@pytest.mark.parametrize(
    ("name", "item"), [("stop", "x"), ("stop_token_ids", 1), ("bad_words", "x"), ("messages", {"role": "user", "content": "x"})]
)
def test_a_list_may_be_as_long_as_its_line_says(name: str, item: Any) -> None:
    found = re.fullmatch(r"at most (\S+) \w+", fields.about("ChatRequest", name).allowed)
    assert found
    most = int(number(found.group(1)))
    parse(ChatRequest, **{name: [item] * most})
    refused(ChatRequest, name, [item] * (most + 1))


def test_the_page_on_speculation_has_every_field() -> None:
    page = (DOCS / "speculation.md").read_text(encoding="utf-8")
    table = page.split("| field | meaning | default |\n")[1].split("\n\n")[0]
    named = [name for line in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted([*FIELDS, "methods"])


def test_defaults_are_those_of_the_code() -> None:
    for name, says in fields.FIELDS.items():
        if name in SamplingParams.__struct_fields__ and name not in ("max_tokens", "seed"):
            value = getattr(SamplingParams(), name)
            plain = json.dumps(value) if isinstance(value, bool) else "" if value in (None, [], {}) else f"{value:g}"
            own = says.default.removeprefix("the model's, or ")
            assert own == plain, name
            assert (own != says.default) == (name in NAMES.values()), name
    assert parse(CompletionRequest).sampling.max_tokens == 16
    assert parse(ChatRequest).sampling.max_tokens is None
    assert (parse(CompletionRequest).add_special_tokens, parse(ChatRequest).add_special_tokens) == (True, False)
    assert parse(ChatRequest).prompts[0]["add_generation_prompt"]
    assert not parse(ChatRequest, continue_final_message=True).prompts[0]["add_generation_prompt"]
    assert parse(CompletionRequest, echo=True, max_tokens=0).sampling.max_tokens == 0
    assert parse(ChatRequest, max_tokens=3, max_completion_tokens=5).sampling.max_tokens == 5


def test_what_the_lines_say_about_tools_and_streams() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    parse(ChatRequest, tools=tools, tool_choice="none")
    parse(ChatRequest, tool_choice="none")
    assert parse(ChatRequest, tools=tools).parallel_calls
    assert not parse(ChatRequest, tools=tools, tool_choice="auto", parallel_tool_calls=False).parallel_calls
    function = {"type": "function", "function": {"name": "f"}}
    for given, code in (
        *(({"tool_choice": choice}, "invalid_value") for choice in ("auto", "required", function)),
        ({"tools": tools, "tool_choice": {"type": "custom"}}, "unsupported_feature"),
    ):
        with pytest.raises(InvalidRequest) as raised:
            parse(ChatRequest, **given)
        assert raised.value.code == code
    for choice in ("required", function):
        assert parse(ChatRequest, tools=tools, tool_choice=choice).calling.must
    assert not parse(ChatRequest, tools=[{"type": "function", "function": {"name": "f", "strict": True}}]).calling.must
    refused(ChatRequest, "stream_options", {"include_usage": True})
    refused(ChatRequest, "spaces_between_special_tokens", False)
    assert not parse(ChatRequest, stream=True, stream_options={"continuous_usage_stats": True}).continuous_usage
    both = parse(ChatRequest, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert both.continuous_usage


# ------------------------------------------------------------------ Python


@pytest.fixture(scope="module")
def python_page() -> str:
    return (DOCS / "python.md").read_text(encoding="utf-8")


def test_the_python_page_runs(python_page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", python_page, re.DOTALL)
    assert len(blocks) >= 10
    space: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), space)
    finally:
        if "llm" in space:
            space["llm"].close()


def public(kind: type[Any]) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


def test_the_python_page_has_every_call_with_its_arguments(python_page: str) -> None:
    told = dict(re.findall(r"(?m)^\| `llm\.(\w+)\((.*?)\)` \|", python_page))
    assert told.keys() == public(LLM).keys()
    for name, arguments in told.items():
        parameters = list(inspect.signature(getattr(LLM, name)).parameters.values())[1:]
        wanted = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
        assert [part for part in arguments.split(", ") if part not in ("", "*")] == wanted, name


def test_the_python_page_has_every_field(python_page: str) -> None:
    table = dict(re.findall(r"(?m)^\| `(\w+)` \| `(.+?)` \|", section(python_page, "SamplingParams")))
    assert table == {name: repr(getattr(SamplingParams(), name)) for name in SamplingParams.__struct_fields__}
    for kind in (RequestOutput, CompletionOutput, StreamDelta, Logprob):
        for name in kind.__struct_fields__:
            assert f"`{name}`" in section(python_page, "Streams" if kind is StreamDelta else "Results"), f"{kind.__name__}.{name}"
    attributes = public(LLMTokenizer).keys() | set(re.findall(r"self\.([a-z]\w*) = ", inspect.getsource(LLMTokenizer.__init__)))
    assert len(attributes) > 20
    for name in attributes:
        assert f"`{name}`" in section(python_page, "Tokens"), name


def test_the_errors_of_the_python_page_exist(python_page: str) -> None:
    named = re.findall(r"(?m)^\| `(\w+)` \| .", section(python_page, "Errors"))
    assert len(named) == 7
    assert all(issubclass(getattr(errors, name), errors.PenstockError) for name in named)


def test_settings_that_are_given_leave_none_of_the_models() -> None:
    """What the Python page says about SamplingParams: the demo model is greedy, these are not."""
    with LLM(kv_cache_memory_bytes=16 << 20, max_num_seqs=8) as llm:
        own = {llm.generate("The")[0].outputs[0].text for _ in range(2)}
        warm = SamplingParams(max_tokens=8, n=8, seed=1)
        drawn = {choice.text for choice in llm.generate("The", warm)[0].outputs}
    assert len(own) == 1
    assert len(drawn) > 1


def test_loading_tells_phases_and_fractions() -> None:
    told: list[tuple[str, float]] = []
    LLM(kv_cache_memory_bytes=16 << 20, max_num_seqs=1, on_phase=lambda phase, fraction: told.append((phase, fraction))).close()
    assert told
    assert all(isinstance(phase, str) and 0 <= fraction <= 1 for phase, fraction in told)


# ------------------------------------------------------------------ clients


def test_the_versions_of_clients_are_those_that_were_tried() -> None:
    page = (DOCS / "clients.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"(?m)^\| \[([\w-]+)\]\([^)]+\) \| ([\d.]+) \|", page))
    lists = (DOCS.parent / "tests" / "e2e" / "clients").glob("*.txt")
    tried = dict(line.split("==") for path in lists for line in path.read_text(encoding="utf-8").split())
    pinned = dict(re.findall(r"(?m)^([\w-]+)==([\d.]+)$", (DOCS.parent / "constraints.txt").read_text(encoding="utf-8")))
    assert tried.items() <= told.items()
    assert {name: pinned.get(name.replace("_", "-"), pinned.get(name)) for name in told.keys() - tried.keys()} == {
        name: told[name] for name in told.keys() - tried.keys()
    }
