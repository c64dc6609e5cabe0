"""langchain-openai against a server: `python langchain_client.py URL`, in an environment that has it."""

import json
import sys
from importlib.metadata import version

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

server = {"model": "brook", "base_url": f"{sys.argv[1]}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}

chat = ChatOpenAI(**server, temperature=0, stream_usage=True)
whole = chat.invoke("What is 17 + 25?")
assert whole.content, whole
assert whole.response_metadata["finish_reason"] == "stop"
assert whole.usage_metadata["output_token_details"] == {"reasoning": 0}
chunks = list(chat.stream("What is 17 + 25?"))
assert "".join(chunk.content for chunk in chunks) == whole.content
assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == whole.usage_metadata["output_tokens"]
measured = ChatOpenAI(**server, temperature=0, logprobs=True, top_logprobs=2).invoke("What is 17 + 25?")
assert len(measured.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2

text = OpenAI(**server, temperature=0, max_tokens=5)
assert "".join(text.stream("The")) == text.invoke("The") != ""
(two,) = OpenAI(**server, temperature=1, max_tokens=5, n=2, best_of=3).generate(["The"]).generations
assert len(two) == 2


@tool
def get_weather(city: str) -> str:
    """Get the current weather in a city"""
    return json.dumps({"temperature": 7, "condition": "rainy"})


armed = chat.bind_tools([get_weather])
asked = armed.invoke("What is the weather in Oslo?")
assert [(call["name"], call["args"]) for call in asked.tool_calls] == [("get_weather", {"city": "Oslo"})], asked
pieces = list(armed.stream("What is the weather in Oslo?"))
again = pieces[0]
for piece in pieces[1:]:
    again = again + piece
assert [(call["name"], call["args"]) for call in again.tool_calls] == [("get_weather", {"city": "Oslo"})], again
answer = armed.invoke([("user", "What is the weather in Oslo?"), asked, get_weather.invoke(asked.tool_calls[0])])
assert "rainy" in answer.content, answer

fields = {"name": {"type": "string"}, "age": {"type": "integer"}}
schema = {"title": "Person", "type": "object", "properties": fields, "required": ["name", "age"], "additionalProperties": False}
made = chat.with_structured_output(schema, method="json_schema").invoke("Who is Ann, 30 years old? Answer with JSON.")
assert made == {"name": "Ann", "age": 30}, made
print(f"langchain-openai {version('langchain-openai')}: all is well")
