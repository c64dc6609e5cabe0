"""The lines about fields of what is kept, for fields.py: stored chat completions, files, batches.

What it is: tables by struct: requests, and replies.
What it does not know: types, how a field is obeyed.
"""

from __future__ import annotations

from penstock.transports.field import Field

_PAIRS = "At most 16 pairs of texts, of 64 and 512 characters."

ASKED: dict[str, dict[str, Field]] = {
    "MetadataRequest": {"metadata": Field(f"Takes the place of what is there. {_PAIRS}")},
    "FileUpload": {
        "file": Field("Its contents; the name is shown and is nothing else."),
        "purpose": Field("What it is for. Other purposes of OpenAI's are `unsupported_feature`.", allowed="`batch`"),
        "expires_after[anchor]": Field("From when on.", allowed="`created_at`"),
        "expires_after[seconds]": Field("How long the file stays.", allowed="3600 to 2592000", default="--store-ttl-s"),
    },
    "BatchRequest": {
        "input_file_id": Field(
            "A file with the purpose batch: a JSON object a line, with `custom_id`, `method` (POST), `url` (the endpoint) and `body`."
        ),
        "endpoint": Field(
            "Whose requests they are.",
            allowed="`/v1/chat/completions`, `/v1/completions`; `/v1/responses`, `/v1/embeddings` where they are served",
        ),
        "completion_window": Field("After that time what has no answer is `batch_expired`.", allowed="`24h`"),
        "metadata": Field(_PAIRS),
        "output_expires_after": Field("How long the files with the answers stay.", default="--store-ttl-s"),
    },
    "ExpiresAfter": {
        "anchor": Field("From when on.", allowed="`created_at`"),
        "seconds": Field("How long.", allowed="3600 to 2592000"),
    },
}

_LIST = {
    "object": "`list`.",
    "data": "A page of them.",
    "first_id": "Of the first one of the page; null where it is empty.",
    "last_id": "Of the last one: `after` for the next page.",
    "has_more": "Is there a next page?",
}
_GONE = {"id": "What is gone.", "deleted": "true."}

TOLD: dict[str, dict[str, str]] = {
    "StoredChat": {
        "id": "As in the reply.",
        "usage": "Tokens of all choices.",
        "request_id": "The request's id (x-request-id).",
        "metadata": "The request's, or what took its place.",
        **dict.fromkeys(
            ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "tools", "tool_choice", "response_format"),
            "The request's, where it had one.",
        ),
    },
    "StoredMessage": {
        "id": "The answer's, and the place of the message.",
        "role": "Who speaks.",
        "content": "Its text.",
        "content_parts": "Its parts, if it came in parts.",
        "name": "As it came.",
        "tool_calls": "As they came.",
        "tool_call_id": "As it came.",
    },
    "StoredChatGone": _GONE,
    "FileGone": _GONE,
    **dict.fromkeys(("StoredChatList", "StoredMessageList", "FileList", "BatchList"), _LIST),
    "FileObject": {
        "id": "`file-` and 32 digits.",
        "bytes": "How large it is.",
        "created_at": "When it came, in seconds since 1970.",
        "filename": "What the client called it, without folders.",
        "purpose": "`batch`, or `batch_output` of what batches made.",
        "status": "`processed`.",
        "expires_at": "When it goes; null: when it is deleted.",
    },
    "Batch": {
        "id": "`batch_` and 32 digits.",
        "endpoint": "Whose requests they are.",
        "model": "The model of all requests, once the file was read.",
        "errors": "Why the file would not do.",
        "input_file_id": "The requests.",
        "completion_window": "`24h`.",
        "status": "validating, in_progress, finalizing, completed; or failed (the file was wrong), expired, cancelling, cancelled.",
        "output_file_id": "The answers with status 200, in the order in which they came; null where there is none.",
        "error_file_id": "The others, and what was not answered before its time was over (`batch_expired`); null where there is none. What a cancel left"
        " unanswered is in neither file.",
        "created_at": "When it was asked for, in seconds since 1970.",
        "in_progress_at": "When its file had been found good.",
        "expires_at": "When its time is over.",
        "finalizing_at": "When the last answer was there.",
        "completed_at": "When it was completed.",
        "failed_at": "When it failed.",
        "expired_at": "When it was found that its time is over.",
        "cancelling_at": "When somebody cancelled it.",
        "cancelled_at": "When nothing of it ran any more.",
        "request_counts": "How far it is; told once a second.",
        "usage": "Tokens of all answers of the output file; null before it has ended.",
        "metadata": "The request's.",
    },
    "BatchErrors": {"object": "`list`.", "data": "The first 100."},
    "BatchError": {
        "code": "`invalid_json_line`, `missing_required_parameter`, `invalid_method`, `mismatched_url`, `invalid_body`, `invalid_custom_id`,"
        " `duplicate_custom_id`, `mismatched_model`, `model_not_found`, `line_too_long`, `too_many_tasks`, `empty_file`, `file_not_found` or"
        " `internal_error`.",
        "message": "What is wrong.",
        "param": "The field of the line.",
        "line": "Its number, from 1.",
    },
    "BatchUsage": {
        "input_tokens": "Of prompts.",
        "input_tokens_details": "Of these.",
        "output_tokens": "Drawn.",
        "output_tokens_details": "Of these.",
        "total_tokens": "Both.",
    },
    "BatchInputDetails": {"cached_tokens": "Found in the prefix cache."},
    "BatchOutputDetails": {"reasoning_tokens": "Of reasoning."},
    "RequestCounts": {"total": "Lines.", "completed": "Answered with status 200.", "failed": "The others that are over."},
}
