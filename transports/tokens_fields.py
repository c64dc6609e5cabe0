"""The lines about fields of tokens in, tokens out, for fields.py.

What it is: tables by struct: the request, and its replies.
What it does not know: types, how a field is obeyed.
"""

from __future__ import annotations

from penstock.transports.field import PENSTOCK, VLLM, Field
from penstock.transports.tokens_schema import IDLE

SPEC_DECODE = Field(
    "Drafts, where the server speculates: true (`force`) has some in every step, false (`off`) none, otherwise as far as they pay. The answer is the same. See"
    " [Speculation](speculation.md).",
    PENSTOCK,
    "true, false, `auto`, `off`, `force`",
    "`auto`",
)

SMOOTHING = Field(
    "Of a stream: tokens that one step brings together (speculation) come one after the other, none more than so many milliseconds later. See"
    " [Streams](streams.md#evenly).",
    PENSTOCK,
    "0 to 1000",
    "--stream-smoothing-ms",
)

ASKED: dict[str, dict[str, Field]] = {
    "TokensRequest": {
        "token_ids": Field("The prompt: it is computed as it is. Not empty.", VLLM),
        "sampling_params": Field("See TokensSampling.", VLLM),
        "model": Field("A name of /v1/models. Another is 404 `model_not_found`.", VLLM, default="the served model"),
        "stream": Field("Answer as server-sent events.", VLLM, default="false"),
        "stream_options": Field(
            "`include_usage` and `continuous_usage_stats`, as on chat; the others are about texts. Only with stream.", VLLM
        ),
        "cache_salt": Field("Cached prefixes are shared only among requests with the same salt (and the same API key).", VLLM),
        "priority": Field("Lower is sooner. Only with --scheduling-policy priority.", VLLM, "-2^31 to 2^31-1", "0"),
        "stream_smoothing_ms": SMOOTHING,
        "spec_decode": SPEC_DECODE,
        "request_id": Field(
            "The id in reply, logs and traces, if it is plain. The header x-request-id wins.", VLLM, default="made by the server"
        ),
        "features": Field("Refused: this server takes text only.", VLLM),
        "kv_transfer_params": Field("Refused.", VLLM),
    },
    "TokensSampling": {
        "n": Field("Answers. At most --max-n.", VLLM, "1 to --max-n", "1"),
        "temperature": Field("0 is greedy (anything below 0.00001).", VLLM, "0 to 1000", "1"),
        "top_p": Field("Keep the most likely tokens that together reach it.", VLLM, "above 0 to 1", "1"),
        "top_k": Field("Keep so many of the most likely tokens; 0 and -1 keep all.", VLLM, "-1 to 2^31-1", "0"),
        "min_p": Field("Keep tokens at least so likely, relative to the most likely one.", VLLM, "0 to 1", "0"),
        "repetition_penalty": Field(
            "Makes tokens that stand in prompt or answer less likely (positive logits are divided by it, negative ones multiplied).",
            VLLM,
            "0.01 to 100",
            "1",
        ),
        "frequency_penalty": Field("Taken off a token's logit for each time it stands in the answer.", VLLM, "-2 to 2", "0"),
        "presence_penalty": Field("Taken off the logits of tokens that stand in the answer at all.", VLLM, "-2 to 2", "0"),
        "logit_bias": Field("Token id (as a text) to a number from -100 to 100, added to its logit.", VLLM),
        "seed": Field("Equal seeds draw equal answers on one build.", VLLM, "-2^63 to 2^63-1", "drawn by the server"),
        "max_tokens": Field(
            "Longest answer, in tokens. Prompt and answer must fit the context. With prompt_logprobs 0, too: the prompt is scored and nothing drawn.",
            VLLM,
            "1 to 2^31-1",
            "what is left of the context; the model's max_new_tokens before it",
        ),
        "min_tokens": Field("So many tokens before an end token may end the answer. Not above max_tokens.", VLLM, "0 to 2^31-1", "0"),
        "stop_token_ids": Field("Further tokens that end the answer.", VLLM, "at most 256 ids"),
        "ignore_eos": Field("The model's end tokens do not end the answer.", VLLM, default="false"),
        "logprobs": Field("Add log-probabilities of the answer, with so many alternatives.", VLLM, "0 to --max-logprobs"),
        "prompt_logprobs": Field(
            "Log-probabilities of the prompt's tokens, with so many alternatives. Not with stream.", VLLM, "0 to --max-logprobs"
        ),
        "allowed_token_ids": Field("Draw nothing else.", VLLM, "at least one id"),
        "bad_words": Field("Texts that are never completed.", VLLM, "at most 1024 texts"),
        "structured_outputs": Field("What the answer obeys. See [Grammars](#grammars).", VLLM),
        "stop": Field("Refused: there is no text in which one could be found. Use stop_token_ids.", VLLM),
        **{name: Field(f"No effect: {why[0].lower() + why[1:]}", VLLM) for name, why in IDLE.items()},
    },
}

_LOGPROB = {"token": "`token_id:ID`.", "logprob": "Of raw logits: before penalties, filters and temperature.", "bytes": "null."}
_USAGE = {
    "prompt_tokens": "Of token_ids.",
    "completion_tokens": "Drawn, the end token too.",
    "prompt_tokens_details": "`cached_tokens`: found in the prefix cache.",
    "completion_tokens_details": "`reasoning_tokens`: 0, as nothing is taken apart.",
}

TOLD: dict[str, dict[str, str]] = {
    "TokensReply": {
        "request_id": "The request's own, or the one that was made for it (x-request-id).",
        "choices": "n of them.",
        "usage": "Tokens of all choices.",
        "prompt_logprobs": "With prompt_logprobs: for each token of the prompt null (the first), or token id to {logprob, rank, decoded_token: null}.",
        "metrics": "With `x-include-metrics: 1`: see Metrics.",
    },
    "TokensChunk": {
        "request_id": "As in TokensReply.",
        "choices": "One of them; none in the last one, with include_usage or x-include-metrics.",
        "usage": "With include_usage: in the last one; with continuous_usage_stats in each, of its choice so far.",
        "metrics": "With `x-include-metrics: 1`: in the last one, which has no choices.",
    },
    "TokensChoice": {
        "token_ids": "Its tokens, the one that ended it too; in a stream those that are new.",
        "logprobs": "With logprobs; else null.",
        "finish_reason": "`stop`, `length` or `error`; null while it goes on.",
        "stop_reason": "The id of stop_token_ids that ended it; else null.",
    },
    "TokensChoiceError": {"message": "Why."},
    "TokensLogprobs": {"content": "One a token of token_ids."},
    "DrawnLogprob": {**_LOGPROB, "top_logprobs": "The most likely ones, as many as were asked for."},
    "TokenLogprob": _LOGPROB,
    "TokensUsage": _USAGE,
}
