"""langchain-openai against a server: `python smoke_langchain.py http://127.0.0.1:8000/v1`, in a virtual environment that has it."""

import sys

from langchain_openai import ChatOpenAI, OpenAI

server = {"model": "brook", "base_url": sys.argv[1], "api_key": "none", "max_retries": 0, "timeout": 60}

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
