"""Request fields that would change what the answer is and do not exist here.

What it is: two tables of such fields, of OpenAI's later additions and of other servers (vLLM, SGLang, TGI, llama.cpp, KoboldCpp, TabbyAPI,
text-generation-webui, Ollama, LM Studio, TensorRT-LLM, Fireworks, Together, Groq, Mistral, DeepSeek, Qwen, xAI, Perplexity, Cohere, Anthropic,
Google, OpenRouter, transformers), with the values that ask for nothing and what to use instead: PROMPT for what the model reads, ANSWER for what
becomes of it. To ignore such a field would give an answer that is not what was asked for, with a status that says it is. What only tunes
another field of a table (mirostat_tau, xtc_threshold, dry_base) does nothing alone and needs no row. Names are compared without case, hyphens and
underscores (`Table`).
What it does not know: the fields that work (openai_schema.py). What one endpoint takes and another does not stands here too: only fields that a
request's struct does not have are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from penstock.core.protocol.errors import InvalidRequest, UnsupportedFeature
from penstock.core.protocol.wording import LONGEST_NAME, squash


class Refused(NamedTuple):
    neutral: tuple[Any, ...]
    """Values that ask for nothing. Where {} is one, so is an object of nothing but nulls."""
    instead: str = ""


_NONE = Refused((None,))
_OFF = Refused((None, False))
_ON = Refused((None, True))
_EMPTY = Refused((None, [], {}, ""))
_ZERO = Refused((None, 0, 0.0))
_ONE = Refused((None, 1, 1.0))


def _use(kind: Refused, instead: str) -> Refused:
    return Refused(kind.neutral, instead)


def _all(kind: Refused, names: str) -> dict[str, Refused]:
    return dict.fromkeys(names.split(), kind)


_APART = "Give each setting as a field of its own."
_THINK = "Templates that know thinking take it in chat_template_kwargs."
_CHAT = "Send messages to /v1/chat/completions."
_IDS = "Give prompt as a list of token ids to /v1/completions."
_SYSTEM = "Send a message with the role system."

PROMPT: dict[str, Refused] = {
    # Bundles that hold anything
    **_all(_use(_EMPTY, _APART), "options parameters sampling_params generation_config extra_body extra_params extra_args"),
    # Other names of the prompt
    "messages": _use(_EMPTY, _CHAT),
    "prompt": _use(_EMPTY, "Send it to /v1/completions."),
    **_all(_use(_EMPTY, "Use prompt, or messages."), "inputs input text text_input input_text message contents"),
    **_all(_use(_EMPTY, _IDS), "input_ids prompt_token_ids prompt_ids"),
    **_all(_EMPTY, "prompt_embeds input_embeds inputs_embeds prompt_table prompt_vocab_size"),
    # More of it
    **_all(_use(_EMPTY, _SYSTEM), "system system_prompt system_instruction instructions preamble"),
    **_all(_use(_EMPTY, _CHAT), "chat_history history context conversation previous_response_id"),
    "documents": _use(_EMPTY, _CHAT),
    "chat_template_kwargs": _use(_EMPTY, _CHAT),
    "reasoning_effort": _use(_NONE, _CHAT),
    **_all(_use(_OFF, _CHAT), "continue_final_message apply_chat_template"),
    "add_generation_prompt": _use(_ON, _CHAT),
    **_all(_EMPTY, "data_sources connectors memory negative_prompt user_bio character preset instruction_template"),
    **_all(_EMPTY, "template chat_template chat_template_str tool_prompt guideline input_extra transforms task negative_prompt_ids"),
    **_all(_EMPTY, "suffix input_prefix input_suffix"),
    "prefix": Refused((None, "", False), "Use continue_final_message."),
    "raw": _use(_OFF, "Use /v1/completions."),
    **_all(_OFF, "safe_prompt token_healing"),
    "add_bos_token": _use(_ON, "Use add_special_tokens."),
    **_all(_use(_NONE, _IDS), "bos_token_id forced_bos_token_id decoder_start_token_id"),
    "raw_prompting": _OFF,
    "prompt_mode": _NONE,
    # How it is cut
    **_all(_use(_NONE, "Use truncate_prompt_tokens."), "truncate truncation_length prompt_truncate_len max_context_length"),
    "truncation": Refused((None, "disabled"), "Use truncate_prompt_tokens."),
    "truncation_side": Refused((None, "left")),
    "prompt_truncation": _use(Refused((None, "OFF")), "Use truncate_prompt_tokens."),
    **_all(Refused((None, 0, -1)), "n_keep num_keep n_discard"),
    "context_length_exceeded_behavior": Refused((None, "error")),
    # Other media
    **_all(_EMPTY, "images image_data image_urls audio_data video_data videos files file_ids attachments multi_modal_data"),
    **_all(_EMPTY, "mm_processor_kwargs media_io_kwargs images_config ec_transfer_params"),
    "use_audio_in_video": _OFF,
    # Thinking. A template may think unless it is told not to: "off" asks for something too
    **_all(_use(Refused((None, {})), _THINK), "thinking think enable_thinking thinking_config"),
    "reasoning": _use(_EMPTY, "Use reasoning_effort, for templates that know it."),
    "reasoning_history": _NONE,
    # Tools of other shapes, and tools that run on the server
    **_all(_EMPTY, "functions tool_results mcp_servers plugins compound_custom"),
    **_all(_EMPTY, "search_parameters search_settings search_options include_domains exclude_domains search_domain_filter"),
    **_all(_NONE, "web_search_options search_mode search_recency_filter"),
    **_all(_OFF, "enable_search web_search return_images return_related_questions"),
    "citation_options": Refused((None, "disabled")),
    **_all(Refused((None, "off", "OFF", "disabled")), "citation_mode citation_quality"),
    "search_queries_only": _OFF,
    **_all(_EMPTY, "context_management container"),
}

ANSWER: dict[str, Refused] = {
    # An answer that must obey something
    **_all(_EMPTY, "structured guided_json_object guided_decoding"),
    **_all(_EMPTY, "guided_decoding_backend guided_decoding_params guided_whitespace_pattern choice"),
    "json_schema": _use(_EMPTY, "Use response_format, or structured_outputs.json."),
    "structural_tag": _use(_EMPTY, "Use response_format, or structured_outputs.structural_tag."),
    "regex": _use(_EMPTY, "Use structured_outputs.regex."),
    "ebnf": _use(_EMPTY, "Use structured_outputs.grammar."),
    **_all(
        _EMPTY, "grammar grammar_string grammar_triggers lark_grammar regex_pattern format output_format output_config schema json_object"
    ),
    **_all(_EMPTY, "response_schema response_mime_type output_schema json constraint lark outlines preserved_tokens"),
    **_all(_OFF, "json_mode guided_decoding_disable_fallback guided_decoding_disable_any_whitespace grammar_lazy"),
    "guided_decoding_disable_additional_properties": _OFF,
    "max_tool_calls": _NONE,
    # Calls
    "tools": _use(_EMPTY, _CHAT),
    "tool_choice": Refused((None, "none", "auto")),
    "parallel_tool_calls": Refused((None, True, False), _CHAT),
    "function_call": Refused((None, "none")),
    **_all(_OFF, "force_single_step disable_tool_validation strict_tools enable_code_interpreter"),
    # Thinking taken apart
    "reasoning_format": Refused((None, "raw", "none")),
    **_all(_ON, "include_reasoning stream_reasoning"),
    **_all(_OFF, "separate_reasoning thinking_forced_open parse_reasoning"),
    "reasoning_budget": Refused((None, -1)),
    **_all(_NONE, "thinking_token_budget thinking_budget thinking_budget_tokens reasoning_budget_tokens"),
    # Media, another length, another tone
    "audio": _EMPTY,
    "modalities": Refused((None, ["text"], [])),
    "response_modalities": Refused((None, ["text"], ["TEXT"], [])),
    "verbosity": Refused((None, "medium")),
    # Other ways to search
    **_all(_use(_ONE, "Use use_beam_search and best_of, on OpenAI's routes."), "beam_width num_beams"),
    "num_beam_groups": _ONE,
    **_all(_ZERO, "beam_search_diversity_rate diversity_penalty penalty_alpha"),
    # Other ways to draw
    **_all(_ONE, "typical_p typ_p typical tfs_z tfs top_p_decay guidance_scale cfg_scale encoder_repetition_penalty"),
    **_all(_ZERO, "top_a epsilon_cutoff eta_cutoff dynatemp_range dynatemp_low dynatemp_high dynatemp_min dynatemp_max smoothing_factor"),
    **_all(_ZERO, "xtc_probability dry_multiplier mirostat mirostat_mode mirostat_target mirostat_lr skew top_p_min min_keep"),
    **_all(_ZERO, "no_repeat_ngram_size encoder_no_repeat_ngram_size nsigma"),
    "top_n_sigma": Refused((None, -1, -1.0, 0, 0.0)),
    "adaptive_target": Refused((None, -1, -1.0)),
    **_all(_OFF, "dynamic_temperature temperature_last temp_last penalize_nl watermark watermarking renormalize_logits"),
    **_all(_EMPTY, "samplers sampler_seq sampler_priority sampler_order logits_processors logit_processors logits_processor custom_params"),
    **_all(
        _EMPTY, "custom_logit_processor embedding_bias sequence_bias top_p_reset_ids suppress_tokens begin_suppress_tokens force_words_ids"
    ),
    **_all(
        _EMPTY, "constraints repetition_detection watermarking_config sampling_mask exponential_decay_length_penalty forced_decoder_ids"
    ),
    "do_sample": _use(_ON, "Use temperature 0 for a greedy answer."),
    # Other names of what works here
    **_all(_use(_NONE, "Use max_tokens."), "n_predict num_predict max_new_tokens max_output_tokens max_tokens_to_sample"),
    **_all(_use(_NONE, "Use max_tokens."), "max_length max_gen_len max_completion_tokens"),
    **_all(_use(_ZERO, "Use min_tokens."), "min_new_tokens min_length"),
    **_all(_use(_ONE, "Use repetition_penalty."), "repeat_penalty rep_pen"),
    **_all(_use(Refused((None, -1, 0, 64)), "Penalties here are over the whole text."), "repeat_last_n repetition_penalty_range"),
    **_all(_use(_ONE, "Use n."), "n_cmpl num_return_sequences candidate_count"),
    **_all(_use(_NONE, "Use temperature."), "temp"),
    **_all(_use(_NONE, "Use top_p or top_k."), "p k"),
    **_all(_use(_NONE, "Use seed."), "random_seed sampler_seed sampling_seed"),
    **_all(
        _use(_EMPTY, "Use stop."),
        "stop_sequences stop_sequence stop_words stop_words_list stop_strings custom_stopping_strings",
    ),
    **_all(_use(_EMPTY, "Use stop."), "stopping_strings stop_regex"),
    **_all(_use(_NONE, "Use stop_token_ids."), "end_id eos_token_id forced_eos_token_id"),
    **_all(_use(_OFF, "Use ignore_eos."), "ban_eos_token ignore_eos_token"),
    **_all(_use(_EMPTY, "Use bad_words."), "bad_words_list bad_words_ids banned_strings banned_phrases banned_tokens custom_token_bans"),
    **_all(_use(_OFF, "Use echo, on /v1/completions."), "echo return_full_text"),
    "echo_last": _use(_ZERO, "Use echo, on /v1/completions."),
    "exclude_input_in_output": _ON,
    # What the reply would have to hold
    **_all(_use(_ZERO, "Use logprobs."), "top_n_tokens n_probs top_logprobs top_logprobs_num"),
    **_all(_use(_OFF, "Use logprobs."), "return_logprob return_log_probs response_logprobs"),
    "decoder_input_details": _use(_OFF, "Use prompt_logprobs."),
    **_all(_OFF, "return_hidden_states return_context_logits return_generation_logits return_encoder_output return_routed_experts"),
    **_all(_OFF, "raw_output return_prompt_text post_sampling_probs return_meta_info"),
    **_all(_EMPTY, "logprob_token_ids token_ids_logprob response_fields include"),
    "detokenize": _ON,
    **_all(_ZERO, "n_indent"),
    "t_max_predict_ms": Refused((None, -1, 0)),
    "max_time": _NONE,
    # Other models, other weights, other places, other times
    **_all(
        _EMPTY,
        "lora lora_path lora_request lora_config lora_weights lora_task_id adapter adapter_id adapter_source adapters models kv_transfer_params disaggregated_params",
    ),
    **_all(_EMPTY, "session_params vllm_xargs safety_model guardrails guardrail_config moderation safety_settings"),
    "safety_mode": Refused((None, "NONE", "OFF")),
    **_all(_NONE, "bootstrap_host bootstrap_port bootstrap_room"),
    **_all(_OFF, "deferred background store"),
}

GENERATION: dict[str, Refused] = {**PROMPT, **ANSWER}
"""What a request for an answer may not hold."""
_SPLIT = "What a model says to itself comes apart from its answer, where its format is known (--reasoning-parser)."
APART: dict[str, Refused] = {
    **GENERATION,
    **_all(_use(_ON, _SPLIT), "separate_reasoning parse_reasoning"),
    "reasoning_format": Refused((None, "parsed", "deepseek", "auto"), _SPLIT),
}
"""The same of one for an answer that is taken apart: there the opposite asks for nothing."""
FAMILIES = ("guided_", "structured_", "grammar_", "constrained_", "json_", "tool_", "lora", "adapter", "peft")
"""Beginnings of names: whatever else servers call so makes the answer obey something, is about calls, or about other weights."""
_FAMILY = Refused((None, False, [], {}, ""))


class Table:
    """Which of the fields that a request does not `know` it refuses: `rows`, names of `families`, and other spellings of either and of the
    fields that it does know, since who writes maxTokens means max_tokens."""

    def __init__(self, rows: Mapping[str, Refused], known: Iterable[str], families: tuple[str, ...] = ()) -> None:
        self._rows = rows
        self._families = families
        self._spelled = {squash(name): entry for name, entry in rows.items()}
        self._spelled |= {squash(name): Refused((None,), f"Its name here is {name}.") for name in known}

    def find(self, name: str) -> Refused | None:
        found = self._rows.get(name)
        if found is not None or len(name) > LONGEST_NAME:
            return found
        found = self._spelled.get(squash(name))
        if found is None and snake(name).startswith(self._families):
            return _FAMILY
        return found


def snake(name: str) -> str:
    """toolConfig and Tool-Config as tool_config."""
    return _NO_LETTER.sub("_", _HUMP.sub("_", name).lower())


_NO_LETTER = re.compile(r"[^a-z0-9]")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


MOST = 1024
"""Bytes of a value that may ask for nothing. What is longer asks for something, and is not read."""


def check(table: Table, name: str, raw: msgspec.Raw, where: str = "") -> bool:
    """Is this a field of the table (with a value that asks for nothing)? Raises UnsupportedFeature naming it (within `where`) if it asks for something."""
    entry = table.find(name)
    if entry is None:
        return False
    asks = len(bytes(raw)) > MOST or not _neutral(entry, _read(raw))
    if asks:
        raise refusal(where + name, entry)
    return True


def check_value(table: Table, name: str, value: Any, where: str = "") -> bool:
    """As `check`, of a value that has been read."""
    entry = table.find(name)
    if entry is not None and not _neutral(entry, value):
        raise refusal(where + name, entry)
    return entry is not None


class _Unreadable:
    """Of a value that nothing can be made of (1e999, text that is not UTF-8), which equals none."""


def _read(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _Unreadable()


def _neutral(entry: Refused, value: Any) -> bool:
    if isinstance(value, dict) and {} in entry.neutral and all(one is None for one in value.values()):
        return True
    return any(value == one and type(value) is type(one) for one in entry.neutral)


def neutral(raw: msgspec.Raw) -> bool:
    """Does a value ask for nothing, of a field that is not to be there at all?"""
    return len(bytes(raw)) <= MOST and _neutral(_EMPTY, _read(raw))


def refusal(name: str, entry: Refused) -> UnsupportedFeature:
    return UnsupportedFeature(f"{name} is not supported here. {entry.instead or 'Leave it out.'}", param=name)


MESSAGE_FIELDS: dict[str, Refused] = {
    "prefix": _use(_OFF, "Use continue_final_message."),
    "partial": _use(_OFF, "Use continue_final_message."),
    **_all(_EMPTY, "audio images videos attachments"),
    "tools": _use(_EMPTY, "Give tools as a field of the request."),
}
"""The same within a message."""


def check_message(message: object, where: str) -> None:
    """`message` has MESSAGE_FIELDS as attributes. Raises UnsupportedFeature naming the one that asks for what does not exist."""
    for name, entry in MESSAGE_FIELDS.items():
        value = getattr(message, name)
        if value is not None and not _neutral(entry, value):
            raise refusal(f"{where}.{name}", entry)


def check_format(raw: msgspec.Raw, known: str, beside: frozenset[str]) -> None:
    """`response_format`, an object with a type: only the `known` one, and nothing but fields of the names `beside` with it. Raises UnsupportedFeature,
    or InvalidRequest."""
    given = _read(raw)
    if given is None:
        return
    if isinstance(given, _Unreadable):
        raise InvalidRequest(
            "response_format holds what cannot be read: a number out of range, or text that is not UTF-8.", param="response_format"
        )
    kind = given.pop("type")
    more = next((name for name, value in given.items() if name not in beside and not _neutral(_EMPTY, value)), None)
    if kind != known or more is not None:
        what = f"type {kind[:80]!r}" if kind != known else f"type {known!r} with {more[:80]!r}"  # type: ignore[index]
        raise UnsupportedFeature(
            f"response_format of {what} is not supported. Its types here are text, json_object, json_schema and structural_tag.",
            param="response_format",
        )
