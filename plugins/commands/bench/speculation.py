"""`penstock bench speculation`: what drafts bring, in process, with and without them in turns.

What it is: one engine without speculation and one for each configuration that is asked for; prompts of three kinds (an answer that repeats the prompt, one that draws on it, one
that does not), one request at a time, each engine answering every prompt in each turn. Tokens a second by kind, and the median of the turns' ratios; answers must be the
same, token for token. CPU time a token, of all threads, is told besides: on a machine that others use it says more. The scheduler chooses the widths itself, as it does when serving.
What it does not know: devices, how drafts are made.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from typing import Any

TEXT = (
    "The river ran past the mill, past the old stone bridge and the three red barns, and down to the sea, where the boats of the village were"
    " waiting for the tide and for the wind from the hills."
)
KINDS: dict[str, list[str]] = {
    "copies": [f"Repeat this text: {TEXT}", f"Write this text in upper case: {TEXT}", f"Repeat this text: {TEXT[60:]}"],
    "draws on it": [
        f"My name is Wanda and my code is 4711. {TEXT} What is my code?",
        "Make a JSON object with the fields name (Wanda), city (Ghent) and age (41).",
        "Make a list of three animals: a dog, a cat, a horse.",
    ],
    "new text": ["Tell me a story about a dog.", "Tell me a story about a clever fox.", "Who are you?"],
}


def measured(configs: list[dict[str, Any]], *, model: str | None, tokens: int, turns: int, options: dict[str, Any]) -> dict[str, Any]:
    """By configuration ("off" first) and kind: tokens a second (median of the turns), and the median ratio to "off" of the same turn."""
    from penstock import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    named: dict[str, dict[str, Any]] = {"off": {}, **{json.dumps(config): {"speculative_config": json.dumps(config)} for config in configs}}
    rates: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in named}
    used: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in named}
    with contextlib.ExitStack() as stack:
        common: dict[str, Any] = {**options, **({"model": model} if model else {})}
        engines = {name: stack.enter_context(LLM(**common, **over)) for name, over in named.items()}
        answers: dict[str, list[int]] = {}
        for turn in range(turns + 1):  # the first one warms up, and lets the widths be learned
            order = list(engines) if turn % 2 else list(engines)[::-1]
            for kind, questions in KINDS.items():
                for name in order:
                    begun, before, made = time.perf_counter(), time.process_time(), 0
                    for question in questions:
                        said = engines[name].chat([{"role": "user", "content": question}], params)[0].outputs[0].token_ids
                        made += len(said)
                        if list(said) != answers.setdefault(question, list(said)):
                            raise AssertionError(f"{name} answers {question!r} otherwise than the others")
                    if turn:
                        rates[name][kind].append(made / (time.perf_counter() - begun))
                        used[name][kind].append((time.process_time() - before) / made * 1e3)
    return {
        name: {
            kind: {
                "tokens_s": round(statistics.median(found), 1),
                "over_off": round(statistics.median(a / b for a, b in zip(found, rates["off"][kind], strict=True)), 3),
                "cpu_ms_a_token": round(statistics.median(used[name][kind]), 4),
                "cpu_over_off": round(statistics.median(a / b for a, b in zip(used[name][kind], used["off"][kind], strict=True)), 3),
            }
            for kind, found in kinds.items()
        }
        for name, kinds in rates.items()
    }
