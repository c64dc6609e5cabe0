"""The official OpenAI client against a Penstock server: `python examples/openai_client.py [BASE_URL]`.

What it is: a streamed chat with usage at the end. What it does not know: Penstock; any OpenAI server will do.
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(base_url: str) -> str:
    client = OpenAI(base_url=base_url + "/v1", api_key="unused")
    model = client.models.list().data[0].id
    parts = []
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 17 + 25?"}],
        stream=True,
        temperature=0,
        max_tokens=32,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
            print(parts[-1], end="", flush=True)
        if chunk.usage:
            print(f"\n[{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out]")
    return "".join(parts)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
