"""The library behind the `llm` command against a server: `python llm_client.py URL`, in an environment with llm."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

home = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(home)  # read at import
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: brook\n  model_name: brook\n  api_base: {sys.argv[1]}/v1\n  supports_tools: true\n  supports_schema: true\n"
)

import llm  # noqa: E402

model = llm.get_model("brook")
model.key = "none"
whole = model.prompt("What is 17 + 25?", stream=False, temperature=0)
assert whole.text()
assert whole.usage().output > 0
streamed = model.prompt("What is 17 + 25?", temperature=0)
assert "".join(streamed) == whole.text()
assert streamed.usage().output == whole.usage().output
talk = model.conversation()
assert talk.prompt("Hello!", temperature=0).text()
assert talk.prompt("What is 17 + 25?", temperature=0).text()


def get_weather(city: str) -> str:
    """Get the current weather in a city"""
    return json.dumps({"temperature": 7, "condition": "rainy"}) if city == "Oslo" else "unknown"


for stream in (False, True):
    said = model.chain("What is the weather in Oslo?", tools=[get_weather], stream=stream, options={"temperature": 0})
    assert "rainy" in said.text(), said.text()
fields = {"name": {"type": "string"}, "age": {"type": "integer"}}
schema = {"type": "object", "properties": fields, "required": ["name", "age"], "additionalProperties": False}
made = json.loads(model.prompt("Who is Ann, 30 years old? Answer with JSON.", schema=schema, temperature=0, max_tokens=100).text())
assert made == {"name": "Ann", "age": 30}, made
print(f"llm {version('llm')}: all is well")
