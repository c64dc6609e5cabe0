"""What becomes of what stands within the fields of Anthropic's requests.

What it is: `NESTED`: of each kind of block, and of each field of tools, tool_choice, thinking and output_config that Anthropic's clients know, whether it works.
docs/http.md shows it, and a test asks a running edge whether it is so. The fields themselves stand in anthropic_schema.py: those that a request has work,
those of NOT_YET are refused, others are unknown.
What it does not know: how they are obeyed or refused (anthropic_turns.py, anthropic_options.py).
"""

from __future__ import annotations

from penstock.transports.statuses import Status

_WORKS = Status("works")
_TEXT_ONLY = Status("refused", "This server takes text only.")
_ELSEWHERE = Status("refused", "No tools run on this server.")
_CACHED = Status("no effect", "Prefixes are cached by themselves; nothing holds them for a time.")
_FORCED = Status("in part", "As far as chat completions can force calls: it is `tool_choice` there.")

_SERVERS_BLOCKS = """server_tool_use web_search_tool_result web_fetch_tool_result code_execution_tool_result bash_code_execution_tool_result
    text_editor_code_execution_tool_result tool_search_tool_result mcp_tool_use mcp_tool_result container_upload"""

NESTED: dict[str, Status] = {
    # Blocks
    "text": _WORKS,
    "text.cache_control": _CACHED,
    "text.citations": Status("refused", "Empty or null is taken."),
    "tool_use": _WORKS,
    "tool_use.caller": Status("in part", "`direct`; others are refused."),
    "tool_result": Status("in part", "A text, or blocks of text; others in it are refused."),
    "tool_result.is_error": Status("works", "Its text begins with `Error: ` then, if it does not begin with the word by itself."),
    "thinking": Status("works", "It is reasoning_content of the message, for templates that show it. Its signature may be any."),
    "redacted_thinking": Status("no effect", "Nobody but who encrypted it can read it."),
    "image": _TEXT_ONLY,
    "document": _TEXT_ONLY,
    "search_result": _TEXT_ONLY,
    **dict.fromkeys(_SERVERS_BLOCKS.split(), _ELSEWHERE),
    # Tools
    "tools[].name": _WORKS,
    "tools[].description": _WORKS,
    "tools[].input_schema": Status("works", "Of type object; without a type it is one."),
    "tools[].type": Status("in part", "`custom`; the tools that Anthropic's models know by their type are refused."),
    "tools[].strict": Status("in part", "As far as chat completions can: it is `strict` there."),
    "tools[].cache_control": _CACHED,
    "tools[].eager_input_streaming": Status("no effect", "Arguments are streamed as the model writes them."),
    "tools[].input_examples": Status("refused", "Show them in the description."),
    "tools[].defer_loading": Status("in part", "false; true is refused."),
    "tools[].allowed_callers": Status("in part", '`["direct"]`; others are refused.'),
    # How they are used
    "tool_choice auto": _WORKS,
    "tool_choice none": _WORKS,
    "tool_choice any": _FORCED,
    "tool_choice tool": _FORCED,
    "tool_choice.disable_parallel_tool_use": _WORKS,
    # Thinking
    "thinking enabled": Status("works", "Not with the assistant's words as last turn."),
    "thinking adaptive": _WORKS,
    "thinking disabled": _WORKS,
    "thinking between_tools": Status("refused", "Chat templates do not know it."),
    "thinking.budget_tokens": Status(
        "no effect", "It is checked (from 1024, below max_tokens), but models here end their thinking themselves."
    ),
    "thinking.display": Status("works", "`summarized` is the whole."),
    # The answer's form
    "output_config.format": Status("works", "`json_schema`; beside tools as far as chat completions can."),
    "output_config.effort": Status("works", "For templates that know reasoning_effort; `xhigh` and `max` are `high`."),
    "output_format": Status("works", "The older name of output_config.format."),
}
