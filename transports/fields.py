"""What each request field does, in a line: for the OpenAPI document and docs/http.md.

What it is: one table by field name; a test holds that every field of every request struct stands here. Defaults and limits that options set are
named by the option.
What it does not know: types (openai_schema.py), how a field is obeyed.
"""

from __future__ import annotations

FIELDS: dict[str, str] = {
    "model": "One of /v1/models, or left out. Another name is 404 `model_not_found`.",
    "messages": "The conversation, oldest first; at most --max-messages. Roles system, developer, user, assistant, tool, function; content is a"
    " text, parts of type text, or null beside tool calls.",
    "prompt": "A text, a list of texts (at most --max-prompts), a list of token ids, or a list of such lists.",
    "tokens": "Token ids.",
    "frequency_penalty": "-2 to 2, by how often a token stands in the answer.",
    "presence_penalty": "-2 to 2, for a token that stands in the answer at all.",
    "repetition_penalty": "0.01 to 100; divides the logits of tokens that stand in prompt or answer; 1 is off.",
    "logit_bias": "Token id (a text) to a number from -100 to 100, added to its logit. Errors name `logit_bias.ID`.",
    "max_tokens": "Longest answer, in tokens. Completions: 16; chat: what is left of the context. 0 only with echo (scoring).",
    "max_completion_tokens": "OpenAI's newer name of max_tokens; wins over it.",
    "n": "Answers a prompt, 1 to --max-n; prompts times n at most --max-choices.",
    "seed": "64 bits; equal seeds draw equal answers on one build. Without one the server draws it.",
    "stop": "A text or up to --max-stop of them: the answer ends before the first that is completed.",
    "stream": "Answer as server-sent events.",
    "stream_options": "`include_usage`: a last chunk with the usage; `continuous_usage_stats`: usage in every chunk; `include_obfuscation` has no effect.",
    "temperature": "0 (greedy) to 1000; default 1, or the model's own.",
    "top_p": "Above 0, at most 1: keep the most likely tokens that together reach it.",
    "top_k": "Keep so many of the most likely tokens; 0 or -1 keeps all.",
    "min_p": "0 to 1: keep tokens at least so likely, relative to the most likely one.",
    "user": "A hint; no effect.",
    "response_format": 'Only `{"type": "text"}`; others are `unsupported_feature`.',
    "min_tokens": "So many tokens before an end token or stop string may end the answer.",
    "stop_token_ids": "Further tokens that end the answer.",
    "include_stop_str_in_output": "Leave what ended the answer in its text.",
    "ignore_eos": "The model's end tokens do not end the answer.",
    "skip_special_tokens": "Leave special tokens out of the text; default true.",
    "spaces_between_special_tokens": "Only true, which is what happens.",
    "truncate_prompt_tokens": "Keep only so many of the prompt's last tokens; -1: what fits.",
    "prompt_logprobs": "Log-probabilities of the prompt's tokens, with so many alternatives (0 to --max-logprobs). Not with stream.",
    "allowed_token_ids": "Draw nothing else. If nothing is left to draw, 400 that names the fields.",
    "bad_words": "Texts that are never completed.",
    "add_special_tokens": "Let the tokenizer add its special tokens to the prompt. Completions: true; chat: false, the template writes them.",
    "priority": "Lower is sooner, with --scheduling-policy priority.",
    "request_id": "The id that reply, logs and traces carry; the header x-request-id wins.",
    "cache_salt": "Prefixes are shared only among requests with the same salt (and the same API key).",
    "return_token_ids": "Add prompt_token_ids and token_ids to the reply.",
    "return_tokens_as_token_ids": "Log-probabilities name tokens as `token_id:ID`.",
    "logprobs": "Chat: true for log-probabilities. Completions: how many alternatives, 0 to --max-logprobs.",
    "top_logprobs": "Alternatives a position, 0 to --max-logprobs; needs logprobs.",
    "tools": "Only with tool_choice none: calls in an answer are not taken apart yet, so anything else is `unsupported_feature`. /tokenize takes them.",
    "tool_choice": "`none`; `auto` only without effect.",
    "parallel_tool_calls": "No effect while tools are refused.",
    "reasoning_effort": "Passed to the chat template.",
    "add_generation_prompt": "End the prompt with the beginning of an answer; default true.",
    "continue_final_message": "Leave the last message open, so that the answer continues it.",
    "documents": "Passed to the chat template.",
    "chat_template_kwargs": "Further variables of the chat template; they may not be names of other fields.",
    "echo": "Begin the answer with the prompt.",
    "return_token_strs": "Add the tokens' spellings.",
}
