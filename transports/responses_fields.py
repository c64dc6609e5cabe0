"""The lines about fields of OpenAI's Responses API, for fields.py.

What it is: tables by struct: requests, and replies.
What it does not know: types, how a field is obeyed.
"""

from __future__ import annotations

from penstock.transports.field import Field

_PROMPT: dict[str, Field] = {
    "input": Field(
        "A text, or items: messages (`role`, `content`: a text or parts), function_call, function_call_output, reasoning, item_reference. Items of"
        " other types, images and files are `unsupported_feature`. Required but with previous_response_id.",
        allowed="at most --max-messages items",
    ),
    "instructions": Field("A system message at the beginning. Those of earlier responses are not carried over."),
    "previous_response_id": Field(
        "The conversation goes on from that response: its input, its answer, and what was before it. 400 if it is not kept."
    ),
    "reasoning": Field("See ReasoningOptions."),
    "text": Field("See TextOptions."),
    "tools": Field(
        "Functions: `type`, `name`, `parameters`, `description`, `strict` (false where it is left out, while OpenAI's own API then takes true; the reply says which), as on chat but flat. Tools that would run on the server (web_search,"
        " file_search, code_interpreter, mcp, custom and so on) are `unsupported_feature`."
    ),
    "tool_choice": Field(
        'As on chat; `{"type": "function", "name": ...}` and `{"type": "allowed_tools", ...}` are flat here. Other members are refused.',
        default="auto",
    ),
    "truncation": Field(
        "`auto`: if the conversation does not fit, its oldest turns are left out (never instructions, or the last turn). `disabled`: it is a 400.",
        default="disabled",
    ),
}

ASKED: dict[str, dict[str, Field]] = {
    "InputTokensRequest": _PROMPT,
    "ResponsesRequest": {
        **_PROMPT,
        "background": Field(
            "Answer at once with status `queued`, and go on without this connection: ask for it by its id. Needs store.", default="false"
        ),
        "include": Field(
            "`message.output_text.logprobs` adds log-probabilities; `reasoning.encrypted_content` gives reasoning items what can be sent back without a"
            " store (not a secret: the same text in base64). Those of tools and images include nothing."
        ),
        "max_output_tokens": Field(
            "Longest answer, reasoning included, in tokens. Prompt and answer must fit the context.",
            allowed="1 to 2^31-1",
            default="what is left of the context",
        ),
        "max_tool_calls": Field("Bounds calls of tools that run on the server, of which there are none: no effect.", allowed="1 to 2^63-1"),
        "metadata": Field("Texts by name, kept with the response and shown again.", allowed="at most 16 pairs of 64 and 512 characters"),
        "request_id": Field(
            "The id in the header x-request-id, logs and traces, if it is plain, as on chat; the header of the request wins. The response's own id is another, which"
            " cannot be guessed. No effect with background.",
            default="made by the server",
        ),
        "prompt_cache_key": Field("A hint without effect: equal prefixes are found without it."),
        "prompt_cache_options": Field("A hint without effect: equal prefixes are found without it, wherever they end."),
        "prompt_cache_retention": Field("A hint without effect: prefixes stay as long as there is room."),
        "safety_identifier": Field("A hint without effect."),
        "service_tier": Field("A hint without effect: there is one tier, and the reply says `default`."),
        "store": Field(
            "Keep the response and its input, so that it can be asked for and continued. With `--no-store` nothing is kept, and the reply says false.",
            default="true",
        ),
        "stream_options": Field("See ResponseStreamOptions. Only with stream."),
        "top_logprobs": Field("Alternatives a position. Above 0 it needs include.", allowed="0 to --max-logprobs", default="0"),
    },
    "ReasoningOptions": {
        "effort": Field("Given to the chat template, for models that know it."),
        "summary": Field("Only `auto`, which finds nothing to do: reasoning comes whole, as reasoning_text, and nothing sums it up."),
        "generate_summary": Field("The older name of summary."),
    },
    "TextOptions": {
        "format": Field("See TextFormat."),
        "verbosity": Field("Only `medium`; others are `unsupported_feature`.", default="medium"),
    },
    "TextFormat": {
        "type": Field("`text`, `json_object` or `json_schema`. See [Grammars](#grammars)."),
        "name": Field("No effect."),
        "description": Field("No effect."),
        "schema": Field(
            "With json_schema: the schema, which the answer obeys. With other types it is refused, as is anything else beside them."
        ),
        "strict": Field("No effect: the schema is always obeyed.", default="true"),
    },
    "ResponseStreamOptions": {
        "include_obfuscation": Field(
            "Deltas have `obfuscation`, random letters that make their size tell nothing of the text to whoever can see it pass.",
            default="false",
        ),
    },
}

_RESPONSE: dict[str, str] = {
    "id": "`resp_` and what cannot be guessed.",
    "object": "`response`.",
    "created_at": "When the request came, in seconds since 1970.",
    "status": "`queued` and `in_progress` are those of a response in the background; the others do not change any more.",
    "completed_at": "When it was complete; null if it is not.",
    "error": "With status `failed`.",
    "incomplete_details": "With status `incomplete`.",
    "model": "The request's, or the served model's name.",
    "output": "The answer's items in their order: reasoning, messages, calls.",
    "usage": "Tokens; null before it is over.",
    "service_tier": "`default`.",
    "store": "Whether it is kept.",
    "metrics": "With `x-include-metrics: 1`: see Metrics.",
    **dict.fromkeys(
        (
            "background",
            "instructions",
            "max_output_tokens",
            "max_tool_calls",
            "metadata",
            "parallel_tool_calls",
            "previous_response_id",
            "prompt_cache_key",
            "reasoning",
            "safety_identifier",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "truncation",
            "user",
        ),
        "The request's, or its default.",
    ),
    **dict.fromkeys(("temperature", "top_p"), "The request's; null: the model's."),
}

TOLD: dict[str, dict[str, str]] = {
    "ResponseReply": _RESPONSE,
    "ResponseFailure": {"code": "The error's family, as OpenAI names it.", "message": "What went wrong."},
    "IncompleteDetails": {
        "reason": "`max_output_tokens`: that many were drawn, or the context is full. `stop` (OpenAI's API has no stop strings, and no word for it): a stop string, or the"
        " model itself, ended the answer within a call, whose arguments are not complete."
    },
    "ResponseItem": {
        "id": "By which item_reference finds it.",
        "type": "What it is.",
        "status": "`incomplete`: the answer was cut off, or ended, in it. Such a call must not be run.",
        "role": "Of a message.",
        "content": "Of a message or of reasoning.",
        "summary": "Of reasoning: empty, as nothing sums it up.",
        "encrypted_content": "With include: what can be sent back.",
        "call_id": "Of a call, and of its output.",
        "name": "Of a call: the function.",
        "arguments": "Of a call: JSON as a text, not complete if the answer was cut off.",
        "output": "Of a call's output.",
    },
    "ResponsePart": {
        "type": "What it is.",
        "text": "The text.",
        "annotations": "Empty.",
        "logprobs": "With include; else empty.",
        "refusal": "The text of a refusal.",
    },
    "ResponseUsage": {
        "input_tokens": "Of the prompt.",
        "input_tokens_details": "See InputTokensDetails.",
        "output_tokens": "Drawn, the end token too.",
        "output_tokens_details": "See OutputTokensDetails.",
        "total_tokens": "Both.",
    },
    "InputTokensDetails": {"cached_tokens": "Of the prompt: found in the prefix cache.", "cache_write_tokens": "0."},
    "OutputTokensDetails": {"reasoning_tokens": "Of the answer: reasoning."},
    "ResponseEvent": {
        "type": "The event's name.",
        "sequence_number": "Counts a stream's events from 0.",
        "response": "The response as it is; its output and usage in the last event.",
        "item": "The item as it begins, or whole.",
        "part": "The part as it begins, or whole.",
        "item_id": "Which item.",
        "output_index": "Its place in `output`.",
        "content_index": "0: each item has one part.",
        "delta": "What is new of the text, or of the arguments.",
        "text": "All of it.",
        "name": "The function.",
        "arguments": "All of them.",
        "logprobs": "With include: of these tokens.",
        "obfuscation": "With stream_options.include_obfuscation: random letters.",
        "code": "Of an error before the response began.",
        "message": "Of an error: what went wrong.",
        "param": "Of an error: the field.",
    },
    "ResponseItems": {
        "object": "`list`.",
        "data": "The items.",
        "first_id": "Of this page.",
        "last_id": "Of this page: what `after` takes.",
        "has_more": "There are more behind it.",
    },
    "ResponseGone": {"id": "Its id.", "object": "`response`.", "deleted": "true."},
    "InputTokensReply": {
        "object": "`response.input_tokens`.",
        "input_tokens": "Of the prompt as the model would get it, the beginning of the answer's turn included.",
    },
}
