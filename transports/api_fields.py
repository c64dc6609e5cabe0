"""The lines about fields of the APIs beside OpenAI's, for fields.py.

What it is: tables by struct: requests, and replies.
What it does not know: types, how a field is obeyed.
"""

from __future__ import annotations

from penstock.transports.field import Field
from penstock.transports.tokens_fields import SMOOTHING

_ANTHROPIC, _TGI = "Anthropic", "TGI"
_MODELS = "the model's, or "

_COUNTED: dict[str, Field] = {
    "model": Field("A name of /v1/models. Another is 404 `not_found_error`.", _ANTHROPIC),
    "messages": Field(
        "The conversation, oldest first. Turns of one role in a row are one. If the last is the assistant's, the answer continues it. Each tool_use has its"
        " tool_result in the turn after it, before that turn's text. Content and its texts are not empty, but for those of the assistant: an empty last message"
        " is left out.",
        _ANTHROPIC,
        "at most --max-messages messages",
    ),
    "system": Field("What the model is told before: a text, or blocks of text.", _ANTHROPIC),
    "tools": Field(
        "Functions that the model may call; see below. Names: 1 to 128 letters, digits, underscores and hyphens. The server has none of its own.",
        _ANTHROPIC,
    ),
    "tool_choice": Field(
        '`{"type": ...}`: `auto`, `none`, and where the chat can force calls `any` and `tool` (with `name`); `disable_parallel_tool_use: true` for at'
        " most one call.",
        _ANTHROPIC,
        default="auto",
    ),
    "thinking": Field(
        '`{"type": ...}`: `enabled` (with `budget_tokens`, a target that models here do not know) and `adaptive` set `enable_thinking` and `thinking` of'
        " the chat template to true, `disabled` to false. `display: omitted` leaves the text of thinking blocks out. A model whose template has no such switch"
        " does as it always does.",
        _ANTHROPIC,
        default="what the template does without",
    ),
    "output_config": Field(
        '`format`: `{"type": "json_schema", "schema": ...}`, which the answer obeys. `effort`: reasoning_effort of the chat template; `xhigh` and `max` are'
        " `high`.",
        _ANTHROPIC,
    ),
    "output_format": Field("The older name of output_config.format.", _ANTHROPIC),
    "cache_control": Field(
        '`{"type": "ephemeral"}`, with a `ttl` of `5m` or `1h`. No effect here, nor in blocks: prefixes are cached by themselves.',
        _ANTHROPIC,
    ),
}

_INPUTS: dict[str, Field] = {
    "inputs": Field("The text to be continued. Not empty.", _TGI),
    "parameters": Field("See GenerateParameters.", _TGI),
}

ASKED: dict[str, dict[str, Field]] = {
    "InputMessage": {
        "role": Field("Who speaks.", _ANTHROPIC),
        "content": Field(
            "A text, or blocks: see below.",
            _ANTHROPIC,
        ),
    },
    "CountTokensRequest": _COUNTED,
    "MessagesRequest": {
        **_COUNTED,
        "max_tokens": Field("Longest answer, in tokens. Prompt and answer must fit the context.", _ANTHROPIC, "1 to 2^31-1"),
        "stop_sequences": Field(
            "The answer ends before the first that is completed; the reply's `stop_sequence` names it.",
            _ANTHROPIC,
            "at most --max-stop texts",
        ),
        "stream": Field("Answer as server-sent events.", _ANTHROPIC, default="false"),
        "temperature": Field("0 is greedy (anything below 0.00001).", _ANTHROPIC, "0 to 1", _MODELS + "1"),
        "top_p": Field("Keep the most likely tokens that together reach it.", _ANTHROPIC, "above 0 to 1", _MODELS + "1"),
        "top_k": Field("Keep so many of the most likely tokens; 0 and -1 keep all.", _ANTHROPIC, "-1 to 2^31-1", _MODELS + "0"),
        "metadata": Field("`user_id`, a hint without effect; other fields are 400.", _ANTHROPIC),
        "service_tier": Field("No effect.", _ANTHROPIC),
        "stream_smoothing_ms": SMOOTHING,
    },
    "MessageBatchRequest": {
        "requests": Field("The requests, of which each has its own result. At most --max-batch-lines, not empty.", _ANTHROPIC),
    },
    "MessageBatchEntry": {
        "custom_id": Field("What its result is found by: 1 to 64 letters, digits, hyphens and underscores, once in a batch.", _ANTHROPIC),
        "params": Field("A [MessagesRequest](#messagesrequest), without stream. What is wrong in it is its result.", _ANTHROPIC),
    },
    "GenerateRequest": _INPUTS,
    "RootRequest": {**_INPUTS, "stream": Field("Answer as server-sent events; else with a list of one.", _TGI, default="false")},
    "GenerateParameters": {
        "max_new_tokens": Field("Longest answer, in tokens. Prompt and answer must fit the context.", _TGI, "1 to 2^31-1", "100"),
        "do_sample": Field(
            "Draw; else the answer is greedy, unless temperature or top_p (other than 1) or top_k is given. The model's own defaults do not count here.",
            _TGI,
            default="false",
        ),
        "temperature": Field("Above 0.", _TGI, "above 0 to 1000", "1"),
        "top_k": Field("Keep so many of the most likely tokens.", _TGI, "1 to 2^31-1"),
        "top_p": Field("Keep the most likely tokens that together reach it.", _TGI, "above 0 to 1", "1"),
        "repetition_penalty": Field("Makes tokens that stand in prompt or answer less likely.", _TGI, default="1"),
        "frequency_penalty": Field("Taken off a token's logit for each time it stands in the answer.", _TGI, "-2 to 2", "0"),
        "seed": Field(
            "Equal seeds draw equal answers on one build. `details` has the one that was given.", _TGI, "0 to 2^63-1", "drawn by the server"
        ),
        "stop": Field("The answer ends with the first that is completed, which stays in it.", _TGI, "at most --max-stop texts"),
        "truncate": Field("Keep so many of the prompt's last tokens.", _TGI, "1 to 2^31-1"),
        "return_full_text": Field("generated_text begins with the prompt.", _TGI, default="false"),
        "details": Field("Add `details`.", _TGI, default="false"),
        "decoder_input_details": Field("Add them with the prompt's tokens. Not in a stream.", _TGI, default="false"),
        "best_of": Field(
            "Draw so many answers and give the likeliest, by the mean log-probability of its tokens; `details` has the others. Not in a stream.",
            _TGI,
            "1 to --max-n",
            "1",
        ),
        "top_n_tokens": Field(
            "Add so many of the likeliest tokens at each place to `details` and to events.", _TGI, "0 to --max-logprobs", "0"
        ),
        "grammar": Field(
            'What the answer obeys: `{"type": "json", "value": schema}`, `{"type": "json_schema", "value": {"schema": schema}}`,'
            ' `{"type": "regex", "value": text}`. See [Grammars](#grammars).',
            _TGI,
        ),
        "stream_smoothing_ms": SMOOTHING,
        "typical_p": Field("Only 1.", _TGI),
        "watermark": Field("Only false.", _TGI),
        "adapter_id": Field("Refused.", _TGI),
    },
}

TOLD: dict[str, dict[str, str]] = {
    "MessageReply": {
        "id": "`msg_`, the request's id, and one more character.",
        "type": "`message`.",
        "role": "`assistant`.",
        "model": "The request's name of it.",
        "content": "The answer: its blocks, in their order; an empty one of text where there is nothing.",
        "stop_reason": "`end_turn`, `max_tokens`, `stop_sequence` or `tool_use`; null while it goes on. Where a stop sequence, or the model itself, ends it within a call, whose arguments are not complete, it is `stop_sequence` or `end_turn`. Others of Anthropic's (`refusal`, `pause_turn`) do not occur.",
        "stop_sequence": "The one of stop_sequences that ended it; beside `tool_use` too, where it came after a complete call (`</tool_call>`).",
        "usage": "Tokens.",
        "metrics": "With `x-include-metrics: 1`: see Metrics; in a stream with message_delta.",
    },
    "MessageBlock": {
        "type": "`text`, `thinking` or `tool_use`.",
        "text": "Of text.",
        "thinking": "Of thinking: what the model says to itself; empty with `display: omitted`.",
        "signature": "Of thinking: nothing is signed here, but clients send it back; with `display: omitted` it holds the text.",
        "id": "Of tool_use: the call's, for its tool_result.",
        "name": "Of tool_use: the tool.",
        "input": "Of tool_use: the arguments. Of a call that is not complete (with another stop_reason than `tool_use`), what is there.",
    },
    "MessageUsage": {
        "input_tokens": "Of the prompt, without those that the prefix cache had.",
        "cache_creation_input_tokens": "0.",
        "cache_read_input_tokens": "Of the prompt: found in the prefix cache.",
        "output_tokens": "Drawn, the end token too.",
        "output_tokens_details": "At the end.",
    },
    "MessageTokenDetails": {"thinking_tokens": "Of output_tokens: drawn while the model thought."},
    "MessageEvent": {
        "type": "The event's name.",
        "message": "The reply as it begins: without content.",
        "index": "Which block, from 0.",
        "content_block": "The block as it begins: empty, but for a tool_use's id and name.",
        "delta": "`text_delta` (text), `thinking_delta` (thinking), `signature_delta` (signature, last in a thinking block), `input_json_delta` (partial_json: pieces"
        " of input's JSON); in message_delta stop_reason and stop_sequence.",
        "usage": "Of the whole answer.",
        "error": "What went wrong: nothing comes after it.",
        "metrics": "As in MessageReply.",
    },
    "MessageError": {"type": "`error`.", "error": "What is wrong.", "request_id": "The request's, as the header request-id has it."},
    "MessageErrorFields": {
        "type": "The error's family, as Anthropic names it.",
        "message": "What is wrong, with the field's name, and what to do about it.",
        "details": "`error_code`, of errors that clients know what to do about.",
    },
    "CountTokensReply": {"input_tokens": "Of the prompt as the model would get it, the beginning of the answer's turn included."},
    "MessageModel": {
        "type": "`model`.",
        "id": "The name for `model`.",
        "display_name": "The same.",
        "created_at": "When the server started, in UTC.",
        "lifecycle": "`active`: models that are served are.",
        "max_input_tokens": "The context.",
        "max_tokens": "The context, which prompt and answer share.",
    },
    "MessageModelList": {
        "data": "A page of the models.",
        "has_more": "Are there more in that direction?",
        "first_id": "Of the first one of the page: `before_id` for those before it; null where it is empty.",
        "last_id": "Of the last one: `after_id` for those behind it.",
    },
    "MessageBatch": {
        "id": "`msgbatch_` and 32 digits.",
        "type": "`message_batch`.",
        "processing_status": "`in_progress`, `canceling`, `ended`.",
        "request_counts": "As many as there are requests.",
        "ended_at": "When it ended, in UTC; null before.",
        "created_at": "When it was asked for.",
        "expires_at": "When its time is over: after 24 hours.",
        "archived_at": "null: the results go with the batch.",
        "cancel_initiated_at": "When somebody cancelled it.",
        "results_url": "Where the results are; null before it has ended.",
    },
    "MessageBatchCounts": {
        "processing": "All, until the batch has ended.",
        "succeeded": "Then: answered.",
        "errored": "Refused, or failed.",
        "canceled": "Not answered as the batch was cancelled.",
        "expired": "Not answered within the batch's time.",
    },
    "MessageBatchList": {
        "data": "A page of them, the newest first.",
        "has_more": "Are there more in that direction?",
        "first_id": "Of the first one of the page: `before_id` for newer ones; null where it is empty.",
        "last_id": "Of the last one: `after_id` for older ones.",
    },
    "MessageBatchGone": {"id": "What is gone.", "type": "`message_batch_deleted`."},
    "PrefillToken": {"id": "The token.", "text": "Its text.", "logprob": "Of raw logits; null for the first."},
    "GeneratedToken": {
        "id": "The token.",
        "text": "What it adds to the text (in a stream, where several come at once, the last has the text of all); of a special one its spelling.",
        "logprob": "Of raw logits: before penalties, filters and temperature.",
        "special": "It is no part of the text.",
    },
    "GenerateDetails": {
        "finish_reason": "`length`, `eos_token` or `stop_sequence`.",
        "generated_tokens": "Drawn, the end token too.",
        "seed": "The request's.",
        "prefill": "With decoder_input_details: the prompt.",
        "tokens": "The answer.",
        "top_tokens": "With top_n_tokens: the likeliest at each place, most likely first.",
        "best_of_sequences": "With best_of: the other answers.",
    },
    "BestOfSequence": {
        "generated_text": "As in GenerateReply.",
        **dict.fromkeys(
            ("finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"),
            "As in GenerateDetails.",
        ),
    },
    "GenerateReply": {
        "generated_text": "The answer; with return_full_text the prompt before it.",
        "details": "With details.",
        "metrics": "With `x-include-metrics: 1`: see Metrics.",
    },
    "GenerateStreamDetails": {
        "finish_reason": "As in GenerateDetails.",
        "generated_tokens": "Drawn, the end token too.",
        "input_length": "Tokens of the prompt.",
        "seed": "The request's.",
    },
    "GenerateEvent": {
        "index": "Which token, from 1.",
        "token": "The token.",
        "generated_text": "With the last token: the whole answer; else null.",
        "details": "With the last token, if asked for; else null.",
        "top_tokens": "With top_n_tokens: the likeliest at this place.",
    },
    "GenerateError": {
        "error": "What is wrong, with the field's name, and what to do about it.",
        "error_type": "`validation`, `overloaded`, `generation`, `unhealthy` or `internal`.",
    },
    "InfoReply": {
        "model_id": "The served model's name.",
        "model_dtype": "Of its weights; null until the engine has told.",
        "model_device_type": "Where it runs.",
        "model_pipeline_tag": "`text-generation`.",
        "max_concurrent_requests": "--max-streams of one HTTP process.",
        "max_best_of": "--max-n.",
        "max_stop_sequences": "--max-stop.",
        "max_input_tokens": "The context, less a token of answer.",
        "max_total_tokens": "The context.",
        "router": "`penstock`.",
        "version": "Penstock's.",
    },
}
