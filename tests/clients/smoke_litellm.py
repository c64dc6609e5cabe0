"""litellm against a server: `python smoke_litellm.py http://127.0.0.1:8000/v1`, in a virtual environment that has it."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched

import litellm

server = {"api_base": sys.argv[1], "api_key": "none", "temperature": 0, "timeout": 60}
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
