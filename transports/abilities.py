"""What servers of this kind can do, and whether a request may ask for it here.

What it is: `ABILITIES`, a row each with a request that asks for it, and what becomes of that. docs/http.md shows them, and a test asks a running edge whether it is so.
What it does not know: how they are done or refused, single fields (statuses.py), endpoints (elsewhere.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from penstock.transports.statuses import Status

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"

_HI = {"messages": [{"role": "user", "content": "hi"}]}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_CLAUDE = {"model": "brook", "max_tokens": 8}
_WORKS = Status("works")
_TEXT_ONLY = Status("refused", "This server takes text only.")
_NONE = Status("refused", "There is none of it here.")


class Ability(NamedTuple):
    what: str
    status: Status
    path: str
    body: dict[str, Any]
    """A request that asks for it."""
    param: str = ""
    """The field that is named where it is refused."""


def _part(kind: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": kind, **more}]}]}


_PART = "messages[0].content[0].type"

ABILITIES: tuple[Ability, ...] = (
    Ability(
        "an answer that obeys a JSON schema, a regular expression, a grammar", _WORKS, CHAT, {**_HI, "structured_outputs": {"regex": "a+"}}
    ),
    Ability("calls of tools", Status("works", "Where the model's output format is known."), CHAT, {**_HI, "tools": [_TOOL]}),
    Ability(
        "thinking on and off",
        Status("works", "In chat_template_kwargs, for templates that know it."),
        CHAT,
        {**_HI, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    Ability("a bound on thinking", _NONE, CHAT, {**_HI, "thinking_token_budget": 9}, "thinking_token_budget"),
    Ability(
        "a chat template of the request's own",
        Status("in part", "With --trust-request-chat-template; else refused."),
        CHAT,
        {**_HI, "chat_template": "{{ messages }}"},
        "chat_template",
    ),
    Ability("images", _TEXT_ONLY, CHAT, _part("image_url", image_url={"url": "https://example.com/a.png"}), _PART),
    Ability("sound", _TEXT_ONLY, CHAT, _part("input_audio", input_audio={"data": "", "format": "wav"}), _PART),
    Ability("films", _TEXT_ONLY, CHAT, _part("video_url", video_url={"url": "https://example.com/a.mp4"}), _PART),
    Ability("adapters (LoRA)", _NONE, CHAT, {**_HI, "lora_path": "a"}, "lora_path"),
    Ability("prompts as vectors", _NONE, TEXT, {"prompt": "hi", "prompt_embeds": "AA=="}, "prompt_embeds"),
    Ability("hidden states", _NONE, CHAT, {**_HI, "return_hidden_states": True}, "return_hidden_states"),
    Ability("logits processors of the request's own", _NONE, CHAT, {**_HI, "logits_processors": ["a.b"]}, "logits_processors"),
    Ability(
        "sessions",
        Status("refused", "See previous_response_id of /v1/responses."),
        CHAT,
        {**_HI, "session_params": {"id": "a"}},
        "session_params",
    ),
    Ability(
        "tools that run on the server, MCP",
        _NONE,
        RESPONSES,
        {"input": "hi", "tools": [{"type": "mcp", "server_label": "a", "server_url": "https://example.com"}]},
        "tools[0].type",
    ),
    Ability("KV of another server", _NONE, CHAT, {**_HI, "kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    Ability(
        "prefixes pinned in the cache (Anthropic's cache_control)",
        Status("no effect", "Prefixes are cached by themselves; nothing pins one for a time."),
        MESSAGES,
        {
            **_CLAUDE,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]}
            ],
        },
    ),
    Ability("the same answer again", Status("works", "By seed, on one build; see --deterministic."), CHAT, {**_HI, "seed": 7}),
)
