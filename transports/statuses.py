"""What becomes of every request field that clients of OpenAI, vLLM and SGLang know.

What it is: their names (`NAMED`), and `status_of`, which says of one at one endpoint: it works, works for some values and is refused by name for
others, is taken without effect, or is refused by name. docs/http.md shows it, and a test asks a running edge whether it is so.
What it does not know: how a field is obeyed or refused (openai.py, refused.py), what its values mean (fields.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from penstock.transports.fields import OPENAI, PENSTOCK, SGLANG, VLLM
from penstock.transports.openai_schema import HINTS, REFUSED, ChatRequest, CompletionRequest, StreamOptions
from penstock.transports.refused import Refused
from penstock.transports.responses_schema import REFUSED as OF_RESPONSES
from penstock.transports.responses_schema import ResponsesRequest, ResponseStreamOptions

_KNOWN: dict[str, str] = {
    OPENAI: """messages prompt model frequency_penalty presence_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n best_of
        echo suffix response_format seed stop stream stream_options stream_options.include_usage stream_options.include_obfuscation temperature
        top_p tools tool_choice parallel_tool_calls functions function_call user reasoning_effort service_tier metadata store prediction modalities
        audio web_search_options prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier verbosity moderation
        input instructions previous_response_id reasoning text truncation background include max_output_tokens max_tool_calls conversation
        context_management""",
    VLLM: """use_beam_search length_penalty early_stopping top_k min_p repetition_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
        skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs allowed_token_ids bad_words
        add_generation_prompt continue_final_message add_special_tokens documents chat_template chat_template_kwargs mm_processor_kwargs
        media_io_kwargs structured_outputs guided_json guided_regex guided_choice guided_grammar priority request_id logits_processors
        return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params vllm_xargs include_reasoning thinking_token_budget
        logprob_token_ids repetition_detection prompt_embeds stream_options.continuous_usage_stats""",
    SGLANG: """regex ebnf json_schema structural_tag lora_path session_params separate_reasoning stream_reasoning rid no_stop_trim
        custom_logit_processor custom_params return_hidden_states min_new_tokens stop_regex input_ids input_embeds image_data audio_data
        bootstrap_host bootstrap_port bootstrap_room""",
    PENSTOCK: "retain_s on_disconnect stream_interval stream_smoothing_ms spec_decode stream_options.events",
}
NAMED: dict[str, str] = {name: whose for whose, names in _KNOWN.items() for name in names.split()}
"""Field -> whose it is first. A dot leads into an object."""

Word = Literal["works", "in part", "no effect", "refused"]

IN_PART: dict[str, str] = {
    "chat_template": "With --trust-request-chat-template; else refused.",
    "response_format": "`text`, `json_object`, `json_schema` and `structural_tag`; other types are refused.",
    "structured_outputs": "`json`, `json_object`, `regex`, `choice`, `grammar`, `structural_tag` and `disable_any_whitespace`; the others are refused.",
    "tool_choice": "`none`, `auto`, `required`, a function and allowed_tools, where the model's output format can be asked for; else refused, as are other types.",
    "spaces_between_special_tokens": "true; false is refused.",
    "priority": "No effect without --scheduling-policy priority (or a plugin's that looks at it); a header says so.",
}
"""Fields that the requests have and that refuse some values by name: which are taken."""

KEPT = ("metadata",)
"""Hints that say something where the requests have them as fields."""
IN_PART_OF: dict[type[msgspec.Struct], dict[str, str]] = {
    ChatRequest: {"best_of": "With use_beam_search; else only as many as n."},
    ResponsesRequest: {
        "input": "A text, or items of text, of functions and of reasoning; others are refused.",
        "text": "`format`, and `verbosity` medium; another is refused.",
        "tools": "Functions; tools that would run on the server are refused.",
        "reasoning": "`effort`, and `summary` auto; another is refused.",
    },
}
"""The same, of fields that work elsewhere, or are nowhere else."""

NO_EFFECT_OF: dict[type[msgspec.Struct], dict[str, str]] = {
    ResponsesRequest: {
        "max_tool_calls": "It bounds calls of tools that run on the server, of which there are none.",
        "stream_options.include_usage": "The last event has the usage in any case.",
    },
}
"""Fields that the requests have and that change nothing: why. HINTS are such, too."""


OPTIONS: dict[type[msgspec.Struct], type[msgspec.Struct]] = {
    ChatRequest: StreamOptions,
    CompletionRequest: StreamOptions,
    ResponsesRequest: ResponseStreamOptions,
}
"""What stream_options may hold."""
REFUSED_BY: dict[type[msgspec.Struct], Mapping[str, Refused]] = {**REFUSED, ResponsesRequest: OF_RESPONSES[ResponsesRequest]}


class Status(NamedTuple):
    word: Word
    why: str = ""
    """What is taken, why there is no effect, or what to use instead."""


def status_of(kind: type[msgspec.Struct], name: str) -> Status:
    """Of a request of this struct. Raises KeyError for a field that nobody knows (it is ignored and named in a header)."""
    outer, _, inner = name.partition(".")
    idle = HINTS.get(name) or NO_EFFECT_OF.get(kind, {}).get(name)
    if outer in kind.__struct_fields__ and (not inner or inner in OPTIONS[kind].__struct_fields__):
        if name in KEPT:
            return Status("works")
        if idle:
            return Status("no effect", idle)
        part = IN_PART_OF.get(kind, {}).get(name) or IN_PART.get(name)
        return Status("in part", part) if part else Status("works")
    if idle:
        return Status("no effect", idle)
    return Status("refused", REFUSED_BY[kind][outer].instead or "Leave it out." if not inner else "Leave it out.")
