"""What each field of requests and replies says, in a line: for the OpenAPI document and docs/http.md.

What it is: tables by field name, and `about`, which finds a field's line. Tests hold that every field has one, that the defaults are those of the
code, and that the ranges are obeyed at both ends. Limits that an option sets are named by the option.
What it does not know: types (openai_schema.py, openapi_replies.py), how a field is obeyed.
It is long because every field stands here, once.
"""

from __future__ import annotations

from penstock.transports import api_fields, responses_fields, storage_fields, tokens_fields
from penstock.transports.field import OPENAI as OPENAI
from penstock.transports.field import PENSTOCK as PENSTOCK
from penstock.transports.field import SGLANG as SGLANG
from penstock.transports.field import VLLM as VLLM
from penstock.transports.field import Field as Field

_MODELS = "the model's, or "

FIELDS: dict[str, Field] = {
    # Both generation requests
    "model": Field("A name of /v1/models. Another is 404 `model_not_found`.", default="the served model"),
    "stream": Field("Answer as server-sent events.", default="false"),
    "stream_options": Field("See StreamOptions. Only with stream."),
    "n": Field("Answers a prompt. Prompts times n are at most --max-choices.", allowed="1 to --max-n", default="1"),
    "max_tokens": Field(
        "Longest answer, in tokens. Prompt and answer must fit the context. Completions with echo take 0 too: the prompt is scored and nothing drawn.",
        allowed="1 to 2^31-1",
        default="completions: 16; chat: what is left of the context; the model's max_new_tokens before either",
    ),
    "temperature": Field("0 is greedy (anything below 0.00001).", allowed="0 to 1000", default=_MODELS + "1"),
    "top_p": Field("Keep the most likely tokens that together reach it.", allowed="above 0 to 1", default=_MODELS + "1"),
    "frequency_penalty": Field("Taken off a token's logit for each time it stands in the answer.", allowed="-2 to 2", default="0"),
    "presence_penalty": Field("Taken off the logits of tokens that stand in the answer at all.", allowed="-2 to 2", default="0"),
    "logit_bias": Field("Token id (as a text) to a number from -100 to 100, added to its logit. Errors name `logit_bias.ID`."),
    "seed": Field("Equal seeds draw equal answers on one build.", allowed="-2^63 to 2^63-1", default="drawn by the server"),
    "stop": Field(
        "A text, or texts: the answer ends before the first that is completed. Each has 1 to 4096 characters.",
        allowed="at most --max-stop texts",
    ),
    "response_format": Field(
        "`text`, `json_object`, `json_schema` with a schema that the answer obeys, or `structural_tag`. See [Grammars](#grammars)."
    ),
    "structured_outputs": Field("What the answer obeys. See [Grammars](#grammars).", VLLM),
    "guided_json": Field("As structured_outputs.json.", VLLM),
    "guided_regex": Field("As structured_outputs.regex.", VLLM),
    "guided_choice": Field("As structured_outputs.choice.", VLLM),
    "guided_grammar": Field("As structured_outputs.grammar.", VLLM),
    "user": Field("A hint without effect."),
    "top_k": Field("Keep so many of the most likely tokens; 0 and -1 keep all.", VLLM, "-1 to 2^31-1", _MODELS + "0"),
    "min_p": Field("Keep tokens at least so likely, relative to the most likely one.", VLLM, "0 to 1", _MODELS + "0"),
    "repetition_penalty": Field(
        "Makes tokens that stand in prompt or answer less likely (positive logits are divided by it, negative ones multiplied).",
        VLLM,
        "0.01 to 100",
        _MODELS + "1",
    ),
    "min_tokens": Field(
        "So many tokens before an end token or stop string may end the answer. Not above max_tokens.", VLLM, "0 to 2^31-1", "0"
    ),
    "stop_token_ids": Field("Further tokens that end the answer.", VLLM, "at most 256 ids"),
    "include_stop_str_in_output": Field("Leave the stop string or token that ended the answer in its text.", VLLM, default="false"),
    "ignore_eos": Field("The model's end tokens do not end the answer.", VLLM, default="false"),
    "use_beam_search": Field(
        "Search for the n likeliest answers instead of drawing. See [Beam search](#beam-search).", VLLM, default="false"
    ),
    "length_penalty": Field(
        "With use_beam_search: answers compare by their log-probability divided by their number of tokens to this power.",
        VLLM,
        "-10 to 10",
        "1",
    ),
    "early_stopping": Field(
        "With use_beam_search: true ends the search as soon as so many answers as there are beams have ended; false, when no better one is likely;"
        " `never`, when none is possible.",
        VLLM,
        "true, false, `never`",
        "false",
    ),
    "skip_special_tokens": Field("Leave special tokens out of the text.", VLLM, default="true"),
    "spaces_between_special_tokens": Field("Only true, which is what happens; false is `unsupported_feature`.", VLLM, default="true"),
    "truncate_prompt_tokens": Field(
        "Keep only so many of the prompt's last tokens; -1 keeps what fits.",
        VLLM,
        "-1, or from 1 to 2^31-1",
        "a prompt that is too long is refused",
    ),
    "prompt_logprobs": Field(
        "Log-probabilities of the prompt's tokens, with so many alternatives. Not with stream.", VLLM, "0 to --max-logprobs"
    ),
    "allowed_token_ids": Field(
        "Draw nothing else. If nothing is left to draw, that is a 400 that names the fields.", VLLM, "at least one id"
    ),
    "bad_words": Field("Texts that are never completed.", VLLM, "at most 1024 texts"),
    "add_special_tokens": Field(
        "Let the tokenizer add its special tokens.", VLLM, default="true for a prompt; false for messages, where the template writes them"
    ),
    "priority": Field("Lower is sooner. Only with `--scheduling-policy priority`.", VLLM, "-2^31 to 2^31-1", "0"),
    "request_id": Field(
        "The id in reply, logs and traces, if it is plain (a letter or digit, then up to 127 of those and `._:/+=-`). The header x-request-id wins.",
        VLLM,
        default="made by the server",
    ),
    "cache_salt": Field("Cached prefixes are shared only among requests with the same salt (and the same API key).", VLLM),
    "retain_s": Field(
        "Of a stream: it can be resumed until so many seconds after its end, or after its last reader left. The header x-penstock-retain says the same.",
        PENSTOCK,
        "0 to --max-retain-s",
    ),
    "on_disconnect": Field(
        "With retain_s: once nobody listens, `cancel` ends it, `continue` goes on, `park` waits. Without, `continue` and `park` imply 60 s.",
        PENSTOCK,
        "`cancel`, `continue`, `park`",
        "`continue` with retain_s, else `cancel`",
    ),
    "stream_interval": Field(
        "Of a stream: after the first token, which comes at once, an event is so many tokens, and the last one what is left. See [Streams](streams.md#less-often).",
        PENSTOCK,
        "1 to 1024",
        "--stream-interval",
    ),
    "stream_smoothing_ms": tokens_fields.SMOOTHING,
    "spec_decode": tokens_fields.SPEC_DECODE,
    "return_token_ids": Field("Add `prompt_token_ids` and `token_ids` to the reply.", VLLM, default="false"),
    "return_tokens_as_token_ids": Field("`logprobs` name tokens as `token_id:ID`.", VLLM, default="false"),
    "rid": Field("The same as request_id, which wins over it.", SGLANG),
    "no_stop_trim": Field("true is include_stop_str_in_output true.", SGLANG, default="false"),
    # Chat
    "messages": Field("The conversation, oldest first. Not empty.", OPENAI, "at most --max-messages messages"),
    "max_completion_tokens": Field("OpenAI's newer name of max_tokens; wins over it.", allowed="1 to 2^31-1", default="max_tokens"),
    "top_logprobs": Field("Alternatives a position. Above 0 it needs logprobs.", allowed="0 to --max-logprobs", default="0"),
    "tools": Field(
        "Given to the chat template; calls in the answer come as `tool_calls`. `unsupported_feature` where it is not known how the model writes them"
        " (--tool-call-parser)."
    ),
    "tool_choice": Field(
        "`auto`; `none`: then the template gets no tools; `required`: at least one call and no content;"
        ' `{"type": "function", "function": {"name": …}}`: one call, of that function;'
        ' `{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": […]}}`: calls of these alone. Only with tools.'
        " See [Tools](#tools-and-reasoning).",
        default="auto",
    ),
    "parallel_tool_calls": Field("false: at most one call.", default="true"),
    "reasoning_effort": Field("Passed to the chat template.", allowed="none, minimal, low, medium, high, xhigh, max"),
    "add_generation_prompt": Field(
        "End the prompt with the beginning of an answer. Not together with continue_final_message.",
        VLLM,
        default="true, with continue_final_message false",
    ),
    "continue_final_message": Field("Leave the last message open, so that the answer continues it.", VLLM, default="false"),
    "documents": Field("Passed to the chat template.", VLLM),
    "chat_template_kwargs": Field(
        "Further variables of the chat template; not those that are fields of their own.", VLLM, default="--default-chat-template-kwargs"
    ),
    "chat_template": Field(
        "A Jinja template instead of the model's. Only with `--trust-request-chat-template`, and at most 65536 characters.",
        VLLM,
        default="the model's, or --chat-template",
    ),
    # Completions
    "best_of": Field(
        "With use_beam_search, the number of beams. Else, on /v1/completions: draw so many answers a prompt and reply with the n whose tokens are the likeliest on average (by log-probability, the best first). All are counted"
        " in usage, against --max-choices too. Not below n, and above it not with stream.",
        allowed="1 to --max-n",
        default="n",
    ),
    "echo": Field("Begin the answer with the prompt.", default="false"),
    # /tokenize, /detokenize
    "return_token_strs": Field("Add the tokens' spellings.", VLLM, default="false"),
    "tokens": Field("Token ids. Special tokens are spelled.", VLLM, "a quarter as many as --max-prompt-chars"),
}

OWN: dict[str, dict[str, Field]] = {
    "ChatRequest": {
        "logprobs": Field("Add log-probabilities of the answer.", default="false"),
        "store": Field("Keep the answer ([storage](storage.md)). With `--no-store` true is `unsupported_feature`.", default="false"),
        "metadata": Field(
            "With store, to find the answer by: at most 16 pairs of texts, of 64 and 512 characters. Else a hint without effect."
        ),
    },
    "CompletionRequest": {
        "logprobs": Field(
            "Add log-probabilities of the answer (with echo of the prompt too), with so many alternatives.", allowed="0 to --max-logprobs"
        ),
        "prompt": Field("A text, texts (at most --max-prompts), token ids, or lists of ids (as many). Not empty."),
    },
    "TokenizeRequest": {
        "prompt": Field("One text. Either it or messages.", VLLM),
        "messages": Field("A conversation: the chat template is applied first. Not empty.", VLLM, "at most --max-messages messages"),
        "tools": Field("Given to the chat template.", VLLM),
    },
    "StreamOptions": {
        "include_usage": Field("A last chunk, without choices, has the usage; `usage` of the others is null.", default="false"),
        "continuous_usage_stats": Field("With include_usage: every chunk has the usage so far of its choice.", VLLM, default="false"),
        "include_obfuscation": Field(
            "Every chunk with a choice has `obfuscation`, random letters that make its size tell nothing of the text to whoever can see it pass.",
            default="false",
        ),
        "tool_calls_done": Field(
            'The older name of arguments_done in events: a chunk with `"done": true` at index i of its `tool_calls` as soon as the arguments of call i are complete and valid JSON,'
            " so that the tool can start before the answer ends.",
            "Penstock",
            default="false",
        ),
        "events": Field(
            "What else the stream tells: `arguments_done` (as tool_calls_done), `json_value` (values of an answer that is JSON, as each is complete; it needs"
            " response_format json_object or json_schema, or another field that asks for JSON). See [Streams](streams.md#values-of-a-json-answer).",
            "Penstock",
            "`arguments_done`, `json_value`",
            "none",
        ),
    },
    "ResponseFormat": {
        "type": Field("`text`, `json_object`, `json_schema` or `structural_tag`."),
        "json_schema": Field("With the type json_schema."),
        "structures": Field("With the type structural_tag: the tags.", VLLM),
        "triggers": Field("With structures: the texts that begin a tag.", VLLM),
        "format": Field("With the type structural_tag, instead of structures and triggers: see [Grammars](#grammars).", VLLM),
    },
    "Structure": {
        "begin": Field("How the tag begins: with one of the triggers.", VLLM),
        "schema": Field("The JSON schema of what stands in it.", VLLM, default="anything"),
        "end": Field("What follows that.", VLLM),
    },
    "JsonSchema": {
        "name": Field("No effect."),
        "description": Field("No effect."),
        "schema": Field("The JSON schema."),
        "strict": Field("No effect: the schema is always obeyed.", default="true"),
    },
    "StructuredOutputs": {
        "json": Field("A JSON schema, or one as text.", VLLM),
        "regex": Field(
            "A regular expression for the whole answer (Rust's syntax; `^` and `$` at its ends alone, no look-around, `\\b`, `\\B` or back-references: a 400 that shows it).",
            VLLM,
        ),
        "choice": Field("Texts, one of which is the answer.", VLLM),
        "grammar": Field("A grammar for the whole answer: GBNF (rules with `::=`) or Lark.", VLLM),
        "json_object": Field("Any JSON object.", VLLM, default="false"),
        "disable_any_whitespace": Field(
            "With `json` or `json_object`: no white space between the parts of the JSON; else there may be one space after a comma or a colon.",
            VLLM,
            default="false",
        ),
        "structural_tag": Field("A structural tag, as response_format has it, or one as text.", VLLM),
    },
    "ChatMessage": {
        "role": Field("Who speaks. A template that does not know developer gets system; function, tool."),
        "content": Field(
            "A text, or parts, joined as the template takes them. null is of the assistant and of function alone; left out it may be of function,"
            " and beside tool_calls, function_call or refusal."
        ),
        "name": Field("Given to the chat template."),
        "tool_calls": Field("Calls of an earlier answer; [] is none."),
        "tool_call_id": Field(
            "Of a tool's message: the id of a call before it (required, unless calls there have none). Given to the chat template."
        ),
        "function_call": Field("OpenAI's older form of one call."),
        "refusal": Field("What the assistant said instead of an answer."),
        "prefix": Field("Refused: use continue_final_message.", "other servers"),
        "partial": Field("Refused: use continue_final_message.", "other servers"),
        "videos": Field("Refused.", "other servers"),
        "attachments": Field("Refused.", "other servers"),
        "tools": Field("Refused: give tools as a field of the request.", "other servers"),
        "audio": Field("Refused."),
        "images": Field("Refused.", "other servers"),
    },
    "ContentPart": {
        "type": Field("`text` (or `input_text`, `output_text`); of the assistant also `refusal`. Others are `unsupported_feature`."),
        "text": Field("The text; required but for a refusal."),
        "refusal": Field("The text of a refusal."),
    },
    "ToolCall": {
        "function": Field("What was called."),
        "id": Field("The call's id."),
        "type": Field("`function`.", default="function"),
    },
    "FunctionCall": {
        "name": Field("The function."),
        "arguments": Field(
            "JSON as a text, valid or not (an answer may have been cut off), or an object. The template gets the form that it takes."
        ),
    },
    "Tool": {"function": Field("What may be called."), "type": Field("`function`.", default="function")},
    "FunctionSpec": {
        "name": Field("The function, once among the tools: 1 to 64 letters (a to z, A to Z), digits, underscores and hyphens."),
        "description": Field("What it does."),
        "parameters": Field("JSON schema of its arguments."),
        "strict": Field("true: the arguments of every call obey `parameters`.", default="false"),
    },
}
OWN |= api_fields.ASKED | responses_fields.ASKED | storage_fields.ASKED | tokens_fields.ASKED
"""Lines of one struct alone: they go before those of FIELDS."""


def about(kind: str, name: str) -> Field:
    """The line of field `name` of the request struct `kind`. Raises KeyError if it has none."""
    own = OWN.get(kind, {})
    return own[name] if name in own else FIELDS[name]


# ------------------------------------------------------------------ replies

REPLY_FIELDS: dict[str, str] = {
    "id": "`chatcmpl-` or `cmpl-`, the request's id, and one more character.",
    "object": "What it is.",
    "created": "When the request came, in seconds since 1970.",
    "model": "The request's, or the served model's name.",
    "choices": "prompts times n answers; those of prompt i are i*n to i*n+n-1.",
    "usage": "Tokens of all choices. In a stream: see stream_options.",
    "system_fingerprint": "Changes whenever equal requests may be answered otherwise (model, build, settings).",
    "prompt_logprobs": "With prompt_logprobs: for each token of the prompt null (the first), or token id to {logprob, rank, decoded_token}.",
    "prompt_token_ids": "With return_token_ids: the prompt. In a stream with the first chunk of a prompt's first choice.",
    "obfuscation": "With stream_options.include_obfuscation: random letters, which fill the choices up to a multiple of 64 bytes.",
    "metrics": "With `x-include-metrics: 1`; in a stream in the last chunk, which has no choices.",
    "index": "Which answer.",
    "message": "The answer.",
    "delta": "What is new; empty with the finish_reason.",
    "text": "The answer; in a stream what is new.",
    "logprobs": "With logprobs; see below.",
    "finish_reason": "`stop`, `tool_calls` (it ended, and called), `length` (max_tokens, or the context is full; or it ended within a call), or `error`. null while it goes on.",
    "stop_reason": "The stop string, or the id of stop_token_ids, that ended it; else null.",
    "matched_stop": "The same, by SGLang's name. (The id of one of the model's own end tokens, which SGLang tells here, it is not.)",
    "token_ids": "With return_token_ids: the tokens of the answer, or of this chunk.",
    "json_value": "Of a stream with stream_options.events json_value: a value of the answer that is complete. Such a chunk has no text.",
    "error": "With finish_reason `error`: why this choice could not go on.",
    "role": "`assistant`.",
    "content": "The text; null where there is none beside tool_calls or reasoning.",
    "reasoning_content": "Where the model reasons (--reasoning-parser): what it says to itself.",
    "reasoning": "The same, as newer clients call it.",
    "tool_calls": "Calls of tools, if there are any.",
    "function": "What is called.",
    "name": "The function; in a stream only in the call's first chunk.",
    "arguments": "JSON as a text, as the model wrote it: not valid if the answer was cut off. In a stream what is new.",
    "done": "With stream_options.events arguments_done: the arguments are complete and valid.",
    "refusal": "null.",
    "prompt_tokens": "Of the prompts, each counted once.",
    "completion_tokens": "Drawn, the end token too.",
    "total_tokens": "Both.",
    "prompt_tokens_details": "See PromptTokensDetails.",
    "cached_tokens": "Of the prompts: found in the prefix cache.",
    "completion_tokens_details": "See CompletionTokensDetails. Not in chunks' usage so far (continuous_usage_stats).",
    "reasoning_tokens": "Of the answers: reasoning.",
    "queue_ms": "Until the first step.",
    "prefill_ms": "From there to the first token.",
    "decode_ms": "From there to the last.",
    "time_to_first_token_ms": "Since the request arrived; not there if there was none.",
    "total_ms": "Since the request arrived.",
    "preemptions": "How often it had to make room for others.",
    "type": "The error's family.",
    "param": "The field at fault, as a path (`messages[0].content`); null if there is none.",
    "code": "See Errors.",
    "data": "The models.",
    "owned_by": "`penstock`.",
    "root": "The same as id.",
    "parent": "null.",
    "max_model_len": "The context, in tokens; null until the engine has told.",
    "count": "How many tokens.",
    "tokens": "Their ids.",
    "token_strs": "With return_token_strs: their spellings; else null.",
    "prompt": "The text.",
    "status": "In a word.",
    "reason": "Where it is not ready: what is missing.",
    "ages_s": "Process to seconds since it was last heard of.",
    "version": "Such as 0.1.0.",
}

REPLY_OWN: dict[str, dict[str, str]] = {
    "ErrorReply": {"error": "What is wrong."},
    "JsonValue": {
        "path": "Where it stands in the answer: a JSON Pointer (RFC 6901), such as `/people/0/name`.",
        "index": "Which item it is, where the answer is a list and this one of its items.",
        "value": "The value.",
        "too_large": "true: its text is longer than 65536 characters, so that it is not repeated.",
    },
    "ErrorFields": {"message": "What is wrong and what to do about it."},
    "CalledTool": {"id": "What to send back as tool_call_id.", "type": "`function`."},
    "ToolCallDelta": {
        "index": "Which of the answer's calls, from 0.",
        "id": "What to send back as tool_call_id; only in the call's first chunk.",
        "type": "`function`; only in the call's first chunk.",
    },
    "Model": {"id": "The name for `model`.", "created": "When the server started, in seconds since 1970."},
}
REPLY_OWN |= {
    "Scheduling": {
        "policy": "--scheduling-policy.",
        "priority": "`lower first`: what a smaller `priority` means.",
        "itl_target_ms": "--itl-target-ms; null: as the device has it. What it is just now is `penstock_itl_target_seconds`.",
        "mixed_prefill_tokens": "--mixed-prefill-tokens; null: no such bound.",
    },
    "PoolInfo": {
        "version": "Of its text process.",
        "model": "Its first name.",
        "models": "Its names.",
        "fingerprint": "The system_fingerprint of replies; empty until an engine has told.",
        "engine": "Device, dtype, context, memory and so on; null until one has told.",
        "epoch": "How often engines were started.",
        "limits": "Some options, by name.",
    },
    "ServerInfoReply": {
        "model": "What is served to requests that name none.",
        "scheduling": "Who goes first.",
        "pools": "One a model.",
    },
    "CancelReply": {"id": "As it was given.", "object": "`request`.", "cancelled": "true."},
}
REPLY_OWN |= api_fields.TOLD | responses_fields.TOLD | storage_fields.TOLD | tokens_fields.TOLD


def about_reply(kind: str, name: str) -> str:
    """The line of field `name` of the reply struct `kind`. Raises KeyError if it has none."""
    own = REPLY_OWN.get(kind, {})
    return own[name] if name in own else REPLY_FIELDS[name]
