"""litellm against a server, by OpenAI's and Anthropic's API: `python litellm_client.py URL`, in an environment that has it."""

import json
import os
import sys
from importlib.metadata import version

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched

import litellm

server = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none", "temperature": 0, "timeout": 60}
chat = {**server, "model": "openai/brook", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}

whole = litellm.completion(**chat, user="u", metadata={"a": "b"})
text = whole.choices[0].message.content
assert text, whole
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert whole.usage.completion_tokens_details.reasoning_tokens == 0

chunks = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

completion = litellm.text_completion(**server, model="text-completion-openai/brook", prompt="The", max_tokens=5, best_of=2)
assert len(completion.choices) == 1
assert completion.choices[0].text

refused = ""
try:
    litellm.completion(**chat, extra_body={"logits_processors": ["x"]})
except litellm.BadRequestError as error:
    refused = str(error)
assert "logits_processors" in refused

weather = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
oslo = [{"role": "user", "content": "What is the weather in Oslo?"}]
by_anthropic = {**server, "api_base": sys.argv[1], "model": "anthropic/brook", "max_tokens": 200}
for route in ({**server, "model": "openai/brook"}, by_anthropic):
    asked = litellm.completion(**route, messages=oslo, tools=[weather]).choices[0]
    (call,) = asked.message.tool_calls
    assert asked.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    parts = [chunk.choices[0].delta for chunk in litellm.completion(**route, messages=oslo, tools=[weather], stream=True) if chunk.choices]
    written = "".join(one.function.arguments or "" for part in parts for one in part.tool_calls or [])
    assert json.loads(written) == {"city": "Oslo"}
    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"temperature": 7, "condition": "rainy"})}
    answer = litellm.completion(**route, messages=[*oslo, asked.message.model_dump(), result], tools=[weather]).choices[0]
    assert "rainy" in answer.message.content, answer
assert litellm.completion(**by_anthropic, messages=chat["messages"]).choices[0].message.content == text
said = litellm.completion(**by_anthropic, messages=chat["messages"], stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in said if chunk.choices) == text
print(f"litellm {version('litellm')}: all is well")
