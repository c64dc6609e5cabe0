"""The lines about fields of the APIs beside OpenAI's, for fields.py.

What it is: tables by struct: requests, and replies.
What it does not know: types, how a field is obeyed.
"""

from __future__ import annotations

from penstock.transports.field import Field

_ANTHROPIC = "Anthropic"
_MODELS = "the model's, or "

_COUNTED: dict[str, Field] = {
    "model": Field("A name of /v1/models. Another is 404 `not_found_error`.", _ANTHROPIC),
    "messages": Field(
        "The conversation, oldest first. Turns of one role in a row are one. If the last is the assistant's, the answer continues it.",
        _ANTHROPIC,
        "at most --max-messages messages",
    ),
    "system": Field("What the model is told before: a text, or blocks of text.", _ANTHROPIC),
    "cache_control": Field("No effect here, nor in blocks: prefixes are cached by themselves.", _ANTHROPIC),
}

ASKED: dict[str, dict[str, Field]] = {
    "InputMessage": {
        "role": Field("Who speaks.", _ANTHROPIC),
        "content": Field(
            'A text, or blocks `{"type": "text", "text": ...}`; `cache_control` in them is without effect. Other types of blocks are refused.',
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
        "temperature": Field("0 is greedy (anything below 0.00001).", _ANTHROPIC, "0 to 1000", _MODELS + "1"),
        "top_p": Field("Keep the most likely tokens that together reach it.", _ANTHROPIC, "above 0 to 1", _MODELS + "1"),
        "top_k": Field("Keep so many of the most likely tokens; 0 and -1 keep all.", _ANTHROPIC, "-1 to 2^31-1", _MODELS + "0"),
        "metadata": Field("A hint without effect.", _ANTHROPIC),
        "service_tier": Field("No effect.", _ANTHROPIC),
    },
}

TOLD: dict[str, dict[str, str]] = {
    "MessageReply": {
        "id": "`msg_`, the request's id, and one more character.",
        "type": "`message`.",
        "role": "`assistant`.",
        "model": "The request's name of it.",
        "content": "The answer: one block.",
        "stop_reason": "`end_turn`, `max_tokens` or `stop_sequence`; null while it goes on.",
        "stop_sequence": "The one of stop_sequences that ended it.",
        "usage": "Tokens.",
        "metrics": "With `x-include-metrics: 1`: see Metrics; in a stream with message_delta.",
    },
    "MessageBlock": {"type": "`text`.", "text": "The text."},
    "MessageUsage": {
        "input_tokens": "Of the prompt, without those that the prefix cache had.",
        "cache_creation_input_tokens": "0.",
        "cache_read_input_tokens": "Of the prompt: found in the prefix cache.",
        "output_tokens": "Drawn, the end token too.",
    },
    "MessageEvent": {
        "type": "The event's name.",
        "message": "The reply as it begins: without content.",
        "index": "0: there is one block.",
        "content_block": "The block as it begins: empty.",
        "delta": '`{"type": "text_delta", "text": ...}`; in message_delta stop_reason and stop_sequence.',
        "usage": "Of the whole answer.",
        "error": "What went wrong: nothing comes after it.",
        "metrics": "As in MessageReply.",
    },
    "MessageError": {"type": "`error`.", "error": "What is wrong."},
    "MessageErrorFields": {
        "type": "The error's family, as Anthropic names it.",
        "message": "What is wrong, with the field's name, and what to do about it.",
    },
    "CountTokensReply": {"input_tokens": "Of the prompt as the model would get it, the beginning of the answer's turn included."},
}
