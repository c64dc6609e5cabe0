"""langchain-anthropic against a server: `python langchain_anthropic_client.py URL`, in an environment that has it."""

import json
import sys
from importlib.metadata import version

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

server = {"model": "brook", "base_url": sys.argv[1], "api_key": "none", "max_retries": 0, "timeout": 60, "max_tokens": 200}
greedy = {"extra_body": {"temperature": 0}}
chat = ChatAnthropic(**server, model_kwargs=greedy, stream_usage=True)
whole = chat.invoke("What is 17 + 25?")
assert whole.text, whole
assert whole.response_metadata["stop_reason"] == "end_turn"
chunks = list(chat.stream("What is 17 + 25?"))
assert "".join(chunk.text for chunk in chunks) == whole.text
assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == whole.usage_metadata["output_tokens"]


@tool
def get_weather(city: str) -> str:
    """Get the current weather in a city"""
    return json.dumps({"temperature": 7, "condition": "rainy"})


armed = chat.bind_tools([get_weather])
asked = armed.invoke("What is the weather in Oslo?")
assert [(call["name"], call["args"]) for call in asked.tool_calls] == [("get_weather", {"city": "Oslo"})], asked
pieces = list(armed.stream("What is the weather in Oslo?"))
whole_again = pieces[0]
for piece in pieces[1:]:
    whole_again = whole_again + piece
assert [(call["name"], call["args"]) for call in whole_again.tool_calls] == [("get_weather", {"city": "Oslo"})], whole_again
answer = armed.invoke([("user", "What is the weather in Oslo?"), asked, get_weather.invoke(asked.tool_calls[0])])
assert "rainy" in answer.text, answer
assert armed.get_num_tokens_from_messages([HumanMessage("What is the weather in Oslo?")]) > 0

fields = {"name": {"type": "string"}, "age": {"type": "integer"}}
schema = {"title": "Person", "type": "object", "properties": fields, "required": ["name", "age"], "additionalProperties": False}
made = chat.with_structured_output(schema, method="json_schema").invoke("Who is Ann, 30 years old? Answer with JSON.")
assert made == {"name": "Ann", "age": 30}, made
print(f"langchain-anthropic {version('langchain-anthropic')}: all is well")
