"""The names of all metrics, which are API.

What it is: tables of own names, labels, buckets, help texts and vLLM's names. docs/metrics.md is made from them; tests/text keeps the list.
What it does not know: values.
"""

from __future__ import annotations

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
GAP = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
DURATION = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920)
COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000)
SMALL = (1, 2, 5, 10, 20)
BATCH = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

VLLM_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
VLLM_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
VLLM_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

STEP_TOKENS = "batch"
"""The one histogram of steps, which may hold requests of several classes; all others are of requests."""

# attribute of Series -> (own name, own buckets, vLLM's name, vLLM's buckets, help)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...], str, tuple[float, ...], str]] = {
    "ttft": ("time_to_first_token_seconds", LATENCY, "time_to_first_token_seconds", VLLM_TTFT, "From arrival to the first token."),
    "itl": ("inter_token_latency_seconds", GAP, "inter_token_latency_seconds", VLLM_ITL, "Between two tokens of a sequence."),
    "tpot": ("time_per_output_token_seconds", GAP, "request_time_per_output_token_seconds", VLLM_ITL, "Mean gap of a finished request."),
    "e2e": ("request_duration_seconds", DURATION, "e2e_request_latency_seconds", VLLM_LATENCY, "From arrival to the last token."),
    "encode": ("encode_seconds", LATENCY, "", (), "Template and tokenizer, waiting for them included."),
    "queue": ("queue_seconds", LATENCY, "request_queue_time_seconds", VLLM_LATENCY, "From accepted to the first step."),
    "prefill": ("prefill_seconds", LATENCY, "request_prefill_time_seconds", VLLM_LATENCY, "From the first step to the first token."),
    "decode": ("decode_seconds", DURATION, "request_decode_time_seconds", VLLM_LATENCY, "From the first token to the last."),
    "inference": ("inference_seconds", DURATION, "request_inference_time_seconds", VLLM_LATENCY, "From the first step to the last token."),
    "prompt": ("prompt_tokens", COUNT, "request_prompt_tokens", COUNT, "Prompt tokens of a request."),
    "output": ("output_tokens", COUNT, "request_generation_tokens", COUNT, "Output tokens of a request, all choices."),
    "longest": ("longest_output_tokens", COUNT, "request_max_num_generation_tokens", COUNT, "Output tokens of its longest choice."),
    "params_n": ("requested_choices", SMALL, "request_params_n", SMALL, "n of a request."),
    "params_max": ("requested_max_tokens", COUNT, "request_params_max_tokens", COUNT, "max_tokens of a request that gave it."),
    "computed": ("prefill_computed_tokens", COUNT, "request_prefill_kv_computed_tokens", COUNT, "Prompt tokens that no cache had."),
    "preempted": ("request_preemptions", SMALL, "request_num_preemptions", SMALL, "Preemptions of a request."),
    STEP_TOKENS: ("step_tokens", BATCH, "iteration_tokens_total", BATCH, "Tokens of a step."),
}

# own name -> (labels, help)
COUNTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "requests_finished": (("reason",), "Choices that ended, by finish reason."),
    "requests_rejected": (("code",), "Requests that were refused, by error code."),
    "admission_rejections": (("reason",), "Requests that admission refused."),
    "cancellations": (
        ("cause",),
        "Prompts that text dropped before they were done: their client left (or its edge died), read too slowly, or gave them up"
        " (with the other prompts of a failed request); drain: the server shut down.",
    ),
    "parks": (
        ("why",),
        "Prompts that nothing was produced for, for a while: their client read too slowly (slow), said so (user), or was not there (detached).",
    ),
    "tokens": (("source",), "Tokens: prompt_computed, prompt_cached, generated, replayed."),
    "slo_requests": (
        ("class", "objective", "met"),
        "Requests of classes with such a target that got a first token (ttft), or more (itl), by whether it was met.",
    ),
    "replays": ((), "Requests that were re-admitted after an engine died."),
    "requests_condemned": ((), "Requests that were failed because engines died under them again and again."),
    "engine_losses": (("engine",), "Engines that died."),
    "dropped_rows": (("why",), "Token rows that were not accepted: stale (dead epoch), duplicate, gap."),
    "hook_errors": (("hook",), "Plugins' request hooks that raised."),
    "otel_spans_exported": ((), "Spans that the collector took."),
    "otel_spans_failed": ((), "Spans that could not be exported."),
}
OF_REQUESTS = frozenset({"requests_finished", "cancellations", "parks", "tokens", "replays", "requests_condemned"})
"""Counters that are kept by pool and class, as they count what happened to accepted requests."""
# Label values that are known before anything happened.
KNOWN: dict[str, tuple[str, ...]] = {
    "requests_finished": ("stop", "length", "tool_calls", "abort", "error"),
    "admission_rejections": ("queue_requests", "queue_tokens"),
    "cancellations": ("disconnect", "slow_client", "timeout", "drain", "client"),
    "parks": ("slow", "user", "detached"),
    "tokens": ("prompt_computed", "prompt_cached", "generated", "replayed"),
    "dropped_rows": ("stale", "duplicate", "gap"),
}
ENGINE_COUNTERS: dict[str, tuple[str, str]] = {
    "engine_steps": ("steps", "Steps of the engine."),
    "preemptions": ("preemptions", "Sequences that were preempted, or gave their memory up while they were parked."),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "engine_prompt_computed": ("prompt_computed", "Prompt tokens computed, recomputation included."),
    "spec_decode_drafts": ("drafts", "Rows of steps that computed drafts along with the known token."),
    "spec_decode_draft_tokens": ("drafted", "These drafts."),
    "spec_decode_accepted_tokens": ("accepted", "Those of them that were right, as were all before them."),
    "spec_decode_draft_seconds": ("draft_s", "What drafters took, where the device measures it."),
    "spec_decode_step_seconds": ("drafting_s", "What the steps took in which drafters ran."),
}
PLACES = ("spec_decode_accepted_tokens_per_pos", "The same for each place behind the known token, from 0.")
"""A counter with the label `position` besides."""
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "ready": ((), "1 while requests are accepted."),
    "pending_requests": ((), "Accepted requests that have not had their first step."),
    "pending_prompt_tokens": ((), "Their prompt tokens."),
    "requests": (("state",), "Requests in the server, by state."),
    "retained_streams": ((), "Streams that are kept, so that they can be resumed."),
    "retained_bytes": ((), "About what they take."),
    "engine_up": (("engine",), "1 while the engine can take requests."),
    "engine_epoch": (("engine",), "How often the engine was started."),
    "sequences": (("engine", "state"), "Sequences in the engine, by state."),
    "kv_blocks": (("engine", "state"), "KV blocks, by state."),
    "kv_usage_ratio": (("engine",), "Share of KV blocks that running sequences hold."),
    "itl_target_seconds": (
        ("engine",),
        "What the last step that decoded while prompts waited was to take at most, stated (--itl-target-ms) or learned; 0: nothing is known yet.",
    ),
    "mixed_prefill_tokens": (("engine",), "Prompt tokens that this step might have."),
    "quality_info": (
        ("engine", "scheme", "status", "record"),
        "How the engine's weights (and a KV cache that --kv-cache-dtype rounds) are stored, whether what that costs was measured (wide, measured, unmeasured), and the record's hash.",
    ),
    "quality_kl_mean_nats": (("engine",), "By the record: mean KL divergence of a token's distribution from the wide model's."),
    "quality_top1_ratio": (("engine",), "By the record: how often the likeliest token is the wide model's."),
    "spec_decode_state": (
        ("engine", "method"),
        "Of a drafter: 2 good (more than 70 % of its drafts are right), 1 keep, 0 off (less than 40 %), -1 idle (no draft of it was looked at yet, or since it is on trial).",
    ),
    "spec_decode_width": (("engine",), "The most drafts behind a token in the last step, as it was computed."),
    "spec_decode_chosen_width": (("engine",), "Drafts behind each token that were found to pay, for the step that was planned last."),
    "spec_decode_accepted_length": (("engine",), "Mean tokens of a row that computed drafts along: one, and the right ones."),
    "slo_target_seconds": (
        ("class", "objective"),
        "What a class of --tables is to get: ttft (to the first token), itl (mean gap between two tokens of a request).",
    ),
    "startup_phase_seconds": (("role", "phase"), "How long each phase of the start took."),
    "uptime_seconds": ((), "Since the text process began."),
}

# flat name that edges send -> (kind, labels, help)
EDGE_METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "http_requests_total": ("counter", ("handler", "method", "status"), "HTTP requests; 499: the client left."),
    "http_request_duration_seconds": ("histogram", ("handler", "method"), "HTTP request duration."),
    "penstock_edge_connections": ("gauge", ("kind",), "Connections of clients that are open: http, busy or idle, and websocket."),
    "penstock_edge_streams": (
        "gauge",
        (),
        "Requests in progress, streamed or not, that hold one of the places which --max-streams bounds for each edge.",
    ),
    "penstock_edge_parks_total": ("counter", (), "Streams that were parked because their client read too slowly."),
    "penstock_edge_cuts_total": (
        "counter",
        ("why",),
        "Streams that were cut because their client did not read: nothing for too long (stalled), or too little (full); each of their prompts is a"
        " cancellation too, but for streams that can be resumed.",
    ),
    "penstock_edge_refused_total": ("counter", (), "Requests refused with 429 because the edge had --max-streams in progress."),
}
