"""What becomes of every request field that clients of OpenAI, vLLM and SGLang know.

What it is: their names (`NAMED`), and `status_of`, which says of one at one endpoint: it works, works for some values and is refused by name for
others, is taken without effect, or is refused by name. docs/http.md shows it, and a test asks a running edge whether it is so.
What it does not know: how a field is obeyed or refused (openai.py, refused.py), what its values mean (fields.py).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from penstock.transports.fields import OPENAI, SGLANG, VLLM
from penstock.transports.openai_schema import HINTS, REFUSED, ChatRequest, StreamOptions

_KNOWN: dict[str, str] = {
    OPENAI: """messages prompt model frequency_penalty presence_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n best_of
        echo suffix response_format seed stop stream stream_options stream_options.include_usage stream_options.include_obfuscation temperature
        top_p tools tool_choice parallel_tool_calls functions function_call user reasoning_effort service_tier metadata store prediction modalities
        audio web_search_options prompt_cache_key prompt_cache_retention safety_identifier verbosity moderation""",
    VLLM: """use_beam_search length_penalty early_stopping top_k min_p repetition_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
        skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs allowed_token_ids bad_words
        add_generation_prompt continue_final_message add_special_tokens documents chat_template chat_template_kwargs mm_processor_kwargs
        media_io_kwargs structured_outputs guided_json guided_regex guided_choice guided_grammar priority request_id logits_processors
        return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params vllm_xargs include_reasoning thinking_token_budget
        logprob_token_ids repetition_detection prompt_embeds stream_options.continuous_usage_stats""",
    SGLANG: """regex ebnf json_schema structural_tag lora_path session_params separate_reasoning stream_reasoning rid no_stop_trim
        custom_logit_processor custom_params return_hidden_states min_new_tokens stop_regex input_ids input_embeds image_data audio_data
        bootstrap_host bootstrap_port bootstrap_room""",
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
}
"""Fields that the requests have and that refuse some values by name: which are taken."""

KEPT = ("metadata",)
"""Hints that say something where the requests have them as fields."""
IN_PART_OF_CHAT: dict[str, str] = {"best_of": "With use_beam_search; else only as many as n."}
"""The same, of fields that work at the other endpoint."""

NO_EFFECT: dict[str, str] = {}
"""Fields that the requests have and that change nothing: why. HINTS are such, too."""


class Status(NamedTuple):
    word: Word
    why: str = ""
    """What is taken, why there is no effect, or what to use instead."""


def status_of(kind: type[msgspec.Struct], name: str) -> Status:
    """Of a request of this struct. Raises KeyError for a field that nobody knows (it is ignored and named in a header)."""
    outer, _, inner = name.partition(".")
    if outer in kind.__struct_fields__ and (not inner or inner in StreamOptions.__struct_fields__):
        if name in KEPT:
            return Status("works")
        if name in HINTS or name in NO_EFFECT:
            return Status("no effect", HINTS.get(name) or NO_EFFECT[name])
        part = IN_PART.get(name) or (IN_PART_OF_CHAT.get(name) if kind is ChatRequest else None)
        return Status("in part", part) if part else Status("works")
    if name in HINTS:
        return Status("no effect", HINTS[name])
    return Status("refused", REFUSED[kind][name].instead or "Leave it out.")
