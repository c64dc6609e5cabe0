"""Request fields that would change what the answer is and do not exist here.

What it is: one table of such fields, of OpenAI's later additions and of other servers (vLLM, SGLang, TGI, llama.cpp, Ollama, LM Studio,
TensorRT-LLM, Fireworks, Together, Groq, Mistral, DeepSeek, Qwen, OpenRouter and others), with the values that ask for nothing and what to use
instead. To ignore such a field would give an answer that is not what was asked for, with a status that says it is.
What it does not know: the fields that work (openai_schema.py). What one endpoint takes and another does not stands here too: only fields that a
request's struct does not have are looked up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from penstock.core.protocol.errors import UnsupportedFeature


class Refused(NamedTuple):
    neutral: tuple[Any, ...]
    """Values that ask for nothing."""
    instead: str = ""


_OFF = (None, False)
_NONE = (None,)
_EMPTY: tuple[Any, ...] = (None, [], {}, "")
_ZERO = (None, 0, 0.0)
_ONE = (None, 1, 1.0)
_GRAMMAR = Refused(_EMPTY)
_MAX = Refused(_NONE, "Use max_tokens.")
_THINK = Refused((None, False, {}, {"type": "disabled"}), "Templates that know thinking take it in chat_template_kwargs.")

REFUSED: dict[str, Refused] = {
    # Output that must obey something
    **dict.fromkeys(
        (
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_decoding_backend",
            "guided_whitespace_pattern",
            "guided_json_object",
            "guided_decoding",
            "regex",
            "ebnf",
            "json_schema",
            "structural_tag",
            "grammar",
            "grammar_triggers",
            "format",
            "schema",
            "output_config",
            "structured",
        ),
        _GRAMMAR,
    ),
    # Tools of other shapes, and tools that run on the server
    "functions": Refused(_EMPTY),
    "function_call": Refused((None, "none")),
    "web_search_options": Refused(_NONE),
    "search_parameters": Refused(_EMPTY),
    "search_settings": Refused(_EMPTY),
    "enable_search": Refused(_OFF),
    "search_options": Refused(_EMPTY),
    "plugins": Refused(_EMPTY),
    "data_sources": Refused(_EMPTY),
    "include_domains": Refused(_EMPTY),
    "exclude_domains": Refused(_EMPTY),
    "tool_prompt": Refused(_EMPTY),
    "mcp_servers": Refused(_EMPTY),
    # Other media
    "audio": Refused(_EMPTY),
    "modalities": Refused((None, ["text"], [])),
    "images": Refused(_EMPTY),
    "image_data": Refused(_EMPTY),
    "mm_processor_kwargs": Refused(_EMPTY),
    "media_io_kwargs": Refused(_EMPTY),
    # Other ways to search or draw
    "use_beam_search": Refused(_OFF),
    "beam_width": Refused(_ONE),
    "beam_search_diversity_rate": Refused(_ZERO),
    "num_beams": Refused(_ONE),
    "length_penalty": Refused(_ONE),
    "early_stopping": Refused(_OFF),
    "best_of": Refused(_ONE),
    "typical_p": Refused(_ONE),
    "tfs_z": Refused(_ONE),
    "top_a": Refused(_ZERO),
    "epsilon_cutoff": Refused(_ZERO),
    "eta_cutoff": Refused(_ZERO),
    "dynatemp_range": Refused(_ZERO),
    "smoothing_factor": Refused(_ZERO),
    "xtc_probability": Refused(_ZERO),
    "dry_multiplier": Refused(_ZERO),
    "mirostat": Refused(_ZERO),
    "mirostat_mode": Refused(_ZERO),
    "mirostat_target": Refused(_ZERO),
    "mirostat_lr": Refused(_ZERO),
    "penalty_alpha": Refused(_ZERO),
    "no_repeat_ngram_size": Refused(_ZERO),
    "top_n_sigma": Refused((None, -1, -1.0, 0, 0.0)),
    "top_p_min": Refused(_ZERO),
    "top_p_decay": Refused(_ONE),
    "penalize_nl": Refused(_OFF),
    "samplers": Refused(_EMPTY),
    "sampler_seq": Refused(_EMPTY),
    "guidance_scale": Refused(_ONE),
    "watermark": Refused(_OFF),
    "logits_processors": Refused(_EMPTY),
    "logit_processors": Refused(_EMPTY),
    "custom_logit_processor": Refused(_EMPTY),
    "custom_params": Refused(_EMPTY),
    "embedding_bias": Refused(_EMPTY),
    "repetition_detection": Refused(_EMPTY),
    "do_sample": Refused((None, True), "Use temperature 0 for a greedy answer."),
    # Other names of what works here
    "n_predict": _MAX,
    "num_predict": _MAX,
    "max_new_tokens": _MAX,
    "max_output_tokens": _MAX,
    "max_tokens_to_sample": _MAX,
    "max_length": _MAX,
    "max_completion_tokens": _MAX,
    "min_new_tokens": Refused(_ZERO, "Use min_tokens."),
    "min_length": Refused(_ZERO, "Use min_tokens."),
    "repeat_penalty": Refused(_ONE, "Use repetition_penalty."),
    "random_seed": Refused(_NONE, "Use seed."),
    "stop_sequences": Refused(_EMPTY, "Use stop."),
    "stop_words": Refused(_EMPTY, "Use stop."),
    "stop_words_list": Refused(_EMPTY, "Use stop."),
    "bad_words_list": Refused(_EMPTY, "Use bad_words."),
    "no_stop_trim": Refused(_OFF, "Use include_stop_str_in_output."),
    "truncate": Refused(_NONE, "Use truncate_prompt_tokens."),
    "prompt_truncate_len": Refused(_NONE, "Use truncate_prompt_tokens."),
    "context_length_exceeded_behavior": Refused((None, "error")),
    "return_full_text": Refused(_OFF, "Use echo."),
    "decoder_input_details": Refused(_OFF, "Use prompt_logprobs."),
    "top_n_tokens": Refused(_ZERO, "Use logprobs."),
    "n_probs": Refused(_ZERO, "Use logprobs."),
    "options": Refused(_EMPTY, "Give each setting as a field of its own."),
    "parameters": Refused(_EMPTY, "Give each setting as a field of its own."),
    "echo": Refused(_OFF, "Use /v1/completions."),
    "messages": Refused(_EMPTY, "Send them to /v1/chat/completions."),
    "prompt": Refused(_EMPTY, "Send it to /v1/completions."),
    "tools": Refused(_EMPTY, "Send them to /v1/chat/completions."),
    "inputs": Refused(_EMPTY, "Use prompt, or messages."),
    "input": Refused(_EMPTY, "Use prompt, or messages."),
    "input_ids": Refused(_EMPTY, "Give prompt as a list of token ids to /v1/completions."),
    "prompt_token_ids": Refused(_EMPTY, "Give prompt as a list of token ids to /v1/completions."),
    # What goes into the prompt
    "chat_template": Refused((None, "")),
    "template": Refused(_EMPTY),
    "system": Refused(_EMPTY, "Send a message with the role system."),
    "system_prompt": Refused(_EMPTY, "Send a message with the role system."),
    "preamble": Refused(_EMPTY, "Send a message with the role system."),
    "chat_history": Refused(_EMPTY, "Send messages."),
    "context": Refused(_EMPTY, "Send messages."),
    "raw": Refused(_OFF, "Use /v1/completions."),
    "suffix": Refused((None, "")),
    "prefix": Refused((None, "", False), "Use continue_final_message."),
    "input_prefix": Refused((None, "")),
    "input_suffix": Refused((None, "")),
    "input_extra": Refused(_EMPTY),
    "safe_prompt": Refused(_OFF),
    "prompt_mode": Refused(_NONE),
    "prompt_embeds": Refused(_EMPTY),
    "input_embeds": Refused(_EMPTY),
    "transforms": Refused(_EMPTY),
    "citation_options": Refused((None, "disabled")),
    "citation_mode": Refused((None, "off", "disabled")),
    # Thinking, which nobody takes apart here
    "thinking": _THINK,
    "think": _THINK,
    "enable_thinking": Refused(_NONE, "Templates that know thinking take it in chat_template_kwargs."),
    "thinking_token_budget": Refused(_NONE),
    "thinking_budget": Refused(_NONE),
    "reasoning": Refused(_EMPTY, "Use reasoning_effort, for templates that know it."),
    "reasoning_format": Refused((None, "raw", "none")),
    "include_reasoning": Refused((None, True)),
    "reasoning_history": Refused(_NONE),
    "verbosity": Refused((None, "medium")),
    # Other models, other weights, other places
    "lora": Refused(_EMPTY),
    "lora_path": Refused(_EMPTY),
    "lora_request": Refused(_EMPTY),
    "adapter_id": Refused(_EMPTY),
    "adapter_source": Refused(_EMPTY),
    "models": Refused(_EMPTY),
    "safety_model": Refused(_EMPTY),
    "guardrails": Refused(_EMPTY),
    "guardrail_config": Refused(_EMPTY),
    "moderation": Refused(_EMPTY),
    "kv_transfer_params": Refused(_EMPTY),
    "disaggregated_params": Refused(_EMPTY),
    "session_params": Refused(_EMPTY),
    "vllm_xargs": Refused(_EMPTY),
    "deferred": Refused(_OFF),
    "background": Refused(_OFF),
    "store": Refused(_OFF),
    "previous_response_id": Refused(_EMPTY),
    # What the reply would have to hold
    "return_hidden_states": Refused(_OFF),
    "return_context_logits": Refused(_OFF),
    "return_generation_logits": Refused(_OFF),
    "logprob_token_ids": Refused(_EMPTY),
    "raw_output": Refused(_OFF),
    "detokenize": Refused((None, True)),
    "prediction": Refused(_EMPTY),
}


def check(name: str, raw: msgspec.Raw, fields: dict[str, msgspec.Raw]) -> bool:
    """Is this a field of the table (with a value that asks for nothing)? Raises UnsupportedFeature if it asks for something."""
    entry = REFUSED.get(name)
    if entry is None:
        return False
    value = msgspec.json.decode(raw)
    asks = not any(value == one and type(value) is type(one) for one in entry.neutral)
    if asks and not (name == "best_of" and bytes(fields.get("n", msgspec.Raw())).strip() == bytes(raw).strip()):
        raise UnsupportedFeature(f"{name} is not supported here. {entry.instead or 'Leave it out.'}", param=name)
    return True


MESSAGE_FIELDS: dict[str, Refused] = {
    "prefix": Refused(_OFF, "Use continue_final_message."),
    "audio": Refused(_EMPTY),
    "images": Refused(_EMPTY),
}
"""The same within a message."""
