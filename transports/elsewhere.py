"""Endpoints that clients of other servers know.

What it is: `KNOWN`, their paths, each with what to use instead where it is not there. docs/http.md shows which are; the 404 of one that is not says the same; a test asks
a running edge for each.
What it does not know: what is there (the routes do), request fields (statuses.py).
"""

from __future__ import annotations

import re

_VECTORS = "No model here makes vectors or scores."
_WEIGHTS = "Weights are those that the server was started with."
_ADAPTERS = "There are no adapters: start a server with the merged weights."
_SOUND = "This server takes text only."
_OLLAMA = "Use /v1/chat/completions, /v1/completions and /v1/models."
_KEPT = "Prefixes leave the cache by themselves; a start begins with an empty one."
_SKILLS = "No tools run on this server, and there are no skills for them: say in system what is to be known."
_CONVERSATIONS = "Use previous_response_id of /v1/responses."

KNOWN: dict[str, str] = {
    # OpenAI's
    "POST /v1/chat/completions": "",
    "POST /v1/completions": "",
    "GET /v1/models": "",
    "GET /v1/models/{model_id}": "",
    "POST /v1/responses": "",
    "GET /v1/responses/{response_id}": "",
    "DELETE /v1/responses/{response_id}": "",
    "POST /v1/responses/{response_id}/cancel": "",
    "GET /v1/responses/{response_id}/input_items": "",
    "POST /v1/responses/input_tokens": "",
    "POST /v1/responses/compact": "Use truncation auto of /v1/responses.",
    "POST /v1/conversations": _CONVERSATIONS,
    "GET /v1/chat/completions": "",
    "POST /v1/files": "",
    "GET /v1/files": "",
    "POST /v1/batches": "",
    "GET /v1/batches": "",
    "POST /v1/embeddings": _VECTORS,
    "POST /v1/moderations": _VECTORS,
    "POST /v1/audio/transcriptions": _SOUND,
    "POST /v1/audio/translations": _SOUND,
    "GET /v1/realtime": _SOUND,
    # Anthropic's
    "POST /v1/messages": "",
    "POST /v1/messages/count_tokens": "",
    "POST /v1/messages/batches": "",
    "GET /v1/messages/batches": "",
    "POST /v1/complete": "Use /v1/messages or /v1/completions.",
    "GET /v1/skills": _SKILLS,
    "POST /v1/skills": _SKILLS,
    # vLLM's
    "POST /tokenize": "",
    "POST /detokenize": "",
    "GET /tokenizer_info": "",
    "POST /inference/v1/generate": "",
    "GET /health": "",
    "GET /version": "",
    "GET /metrics": "",
    "GET /server_info": "",
    "GET /load": "Use /health/decode or /metrics.",
    "GET /ping": "Use /health.",
    "POST /invocations": "Use /v1/chat/completions or /v1/completions.",
    "POST /v1/chat/completions/render": "Use /tokenize with messages: it says which tokens they become.",
    "POST /v1/completions/render": "Use /tokenize: it says which tokens a text becomes.",
    **dict.fromkeys(
        (f"POST {path}" for path in ["/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/classify", "/pooling"]), _VECTORS
    ),
    "POST /v1/load_lora_adapter": _ADAPTERS,
    "POST /v1/unload_lora_adapter": _ADAPTERS,
    "POST /reset_prefix_cache": _KEPT,
    "POST /reset_mm_cache": _SOUND,
    "POST /sleep": "Stop the server: a start takes seconds.",
    "POST /wake_up": "Start the server.",
    "GET /is_sleeping": "Use /health.",
    "POST /pause": "There is no pause; SIGTERM drains.",
    "POST /resume": "There is no pause; SIGTERM drains.",
    "POST /update_weights": _WEIGHTS,
    "POST /abort_requests": "Use DELETE /v1/requests/{id}.",
    "POST /start_profile": "Traces have the time of every stage: see OTEL_EXPORTER_OTLP_ENDPOINT.",
    "POST /stop_profile": "Traces have the time of every stage: see OTEL_EXPORTER_OTLP_ENDPOINT.",
    # SGLang's, LMDeploy's, TensorRT-LLM's
    "POST /v1/tokenize": "Use /tokenize.",
    "POST /v1/detokenize": "Use /detokenize.",
    "POST /v1/encode": "Use /tokenize.",
    "GET /health_generate": "Use /health.",
    "GET /get_model_info": "Use /v1/models or /server_info.",
    "GET /model_info": "Use /v1/models or /server_info.",
    "GET /get_server_info": "Use /server_info.",
    "GET /prometheus/metrics": "Use /metrics.",
    "POST /flush_cache": _KEPT,
    "POST /load_lora_adapter": _ADAPTERS,
    "POST /unload_lora_adapter": _ADAPTERS,
    "POST /update_weights_from_disk": _WEIGHTS,
    "POST /abort_request": "Use DELETE /v1/requests/{id}.",
    "POST /open_session": _CONVERSATIONS,
    # TGI's
    "POST /generate": "",
    "POST /generate_stream": "",
    "POST /": "",
    "GET /info": "",
    "POST /chat_tokenize": "Use /tokenize with messages.",
    # Ollama's, KServe's
    "POST /api/chat": _OLLAMA,
    "POST /api/generate": _OLLAMA,
    "GET /api/tags": _OLLAMA,
    "GET /v2/health/ready": "Use /health/ready.",
}
"""Method and path -> what to use where there is nothing at it. "" is of those that this server always has (or, of what it keeps, has with a store)."""

_INSTEAD = {known.partition(" ")[2]: instead for known, instead in KNOWN.items() if instead}
_ID = re.compile(r"(/v1/(?:conversations|skills))/.*")


def instead_of(path: str) -> str:
    """What to use; "" where nothing is known of it."""
    return _INSTEAD.get(_ID.sub(r"\1", path.rstrip("/")), "")
