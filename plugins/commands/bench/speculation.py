"""`penstock bench speculation`: what drafts bring, in process, with and without them in turns.

What it is: one engine without speculation and one for each configuration that is asked for, each answering the same prompts in each turn: chats with the demo model of three kinds (an answer
that repeats the prompt, one that draws on it, one that does not), one request at a time; or, with a shape, a model of that size whose answers are known (known.py), so many requests at
once. Tokens a second by kind, and the median of the turns' ratios; answers must be the
same, token for token. CPU time a token, of all threads, is told besides: on a machine that others use it says more. The scheduler chooses the widths itself, as it does when serving.
What it does not know: devices, how drafts are made.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
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


Ask = Callable[[Any], list[list[int]]]
"""An engine -> its answers."""


def chats(model: str | None, tokens: int) -> tuple[dict[str, Any], dict[str, Ask]]:
    """(options of LLM, what each kind asks): one request at a time."""
    from penstock import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def asking(questions: list[str]) -> Ask:
        return lambda engine: [
            list(engine.chat([{"role": "user", "content": question}], params)[0].outputs[0].token_ids) for question in questions
        ]

    return {"model": model} if model else {}, {kind: asking(questions) for kind, questions in KINDS.items()}


def known_answers(model: str, shape: dict[str, Any], rows: int, tokens: int, cases: Sequence[str]) -> tuple[dict[str, Any], dict[str, Ask]]:
    """The same of a model with known answers, `rows` requests at once; each time other ones, and somebody else's, so that nothing is had from a cache, or from what was answered in
    turns before: the answers of some turns are all that there is, and who remembers them would copy where the prompt has nothing."""
    from penstock import SamplingParams
    from penstock.plugins.commands.bench import known

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def asking(case: str) -> Ask:
        turns: dict[int, int] = {}

        def ask(engine: Any) -> list[list[int]]:
            turns[id(engine)] = turn = turns.get(id(engine), -1) + 1
            given = known.prompts(shape, case, rows, tokens, seed=turn)
            said = engine.generate(
                [{"prompt_token_ids": prompt, "cache_salt": f"{case} {turn}"} for prompt, _ in given], sampling_params=params
            )
            found = [list(one.outputs[0].token_ids) for one in said]
            if found != [wanted for _, wanted in given]:
                raise AssertionError(f"{case}: an answer is not the one that follows")
            return found

        return ask

    return {"model": model}, {case: asking(case) for case in cases}


def in_turn(names: list[str], turn: int) -> list[str]:
    """Who goes first changes with each turn: whoever is first or last follows itself in the next one, and finds its memory in the caches."""
    first = turn % len(names)
    found = names[first:] + names[:first]
    return found[::-1] if turn // len(names) % 2 else found


def measured(configs: list[dict[str, Any]], common: dict[str, Any], asks: dict[str, Ask], *, turns: int) -> dict[str, Any]:
    """By configuration ("off" first) and kind: tokens a second (median of the turns), and the median ratio to "off" of the same turn. An
    empty configuration is another engine without: what its ratio is off 1 is how rough the figures are."""
    from penstock import LLM

    named: dict[str, dict[str, Any]] = {"off": {}}
    named |= {json.dumps(config): {"speculative_config": json.dumps(config)} if config else {} for config in configs}
    rates: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in asks} for name in named}
    used: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in asks} for name in named}
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(LLM(**common, **over)) for name, over in named.items()}
        for turn in range(turns + 1):  # the first one warms up, and lets the widths be learned
            for at, (kind, ask) in enumerate(asks.items()):
                order = in_turn(list(engines), turn + at)
                first: list[list[int]] | None = None
                for name in order:
                    begun, before = time.perf_counter(), time.process_time()
                    said = ask(engines[name])
                    seconds, busy, made = time.perf_counter() - begun, time.process_time() - before, sum(map(len, said))
                    first = first or said
                    if said != first:
                        raise AssertionError(f"{name} answers otherwise than {order[0]} ({kind})")
                    if turn:
                        rates[name][kind].append(made / seconds)
                        used[name][kind].append(busy / made * 1e3)
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
