"""The engine in your own process: `python examples/python_api.py [MODEL_FOLDER]`.

What it is: batch generation and a chat through `penstock.LLM`. What it does not know: HTTP.
"""

from __future__ import annotations

import sys

from penstock import LLM, SamplingParams


def main(model: str | None = None) -> list[str]:
    texts = []
    with LLM(model) as llm:
        questions = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in ((17, 25), (40, 2), (8, 91))]
        for output in llm.chat(questions, SamplingParams(temperature=0, max_tokens=32)):
            texts.append(output.outputs[0].text)
            print(texts[-1])
        for output in llm.generate(["Penstock is"], SamplingParams(temperature=0.8, seed=7, max_tokens=16)):
            print(repr(output.outputs[0].text))
    return texts


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
