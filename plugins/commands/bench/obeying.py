"""What obeying a JSON schema costs a batch: the same load with and without a schema, in turns, against one server over HTTP.

What it is: bursts of equal completions, of which every second one has a schema that no answer of that length can fill; tokens/s while all of a burst's rows
decode, and the ratio of medians. Both kinds draw with a temperature, so that texts differ.
What it does not know: how masks are made, which device the server has.
"""

from __future__ import annotations

import statistics
from typing import Any

from penstock.plugins.commands.bench import workload
from penstock.plugins.commands.bench.client import Client, Record
from penstock.plugins.commands.bench.command import run_load

SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "id": {"type": "integer"},
            "name": {"type": "string", "maxLength": 80},
            "state": {"enum": ["open", "closed", "waiting for somebody"]},
            "score": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 24}, "maxItems": 6},
        },
        "required": ["id", "name", "state", "score", "tags"],
        "additionalProperties": False,
    },
}
"""Objects as programs ask for them, more of them than any burst draws."""


def together(records: list[Record]) -> float:
    """Tokens/s between the last first token and the first last token: all rows decode, nobody's prompt is computed."""
    begin, end = max(r.tokens[0] for r in records), min(r.tokens[-1] for r in records)
    return sum(begin < at <= end for r in records for at in r.tokens) / (end - begin)


async def in_turns(url: str, *, vocab: int, rows: int, tokens: int, turns: int, input_len: int = 64) -> dict[str, Any]:
    """`turns` bursts of each kind, a first pair uncounted. Raises ValueError where a request fails or ends early: then nothing was measured."""
    client = Client(url)
    client.model, _ = await client.first_model()
    rates: dict[str, list[float]] = {"free": [], "schema": []}
    for turn in range(turns + 1):
        for kind, found in rates.items():
            client.extra = {"temperature": 1.0, "seed": turn, **({"guided_json": SCHEMA, "ignore_eos": False} if kind == "schema" else {})}
            load = workload.make(count=rows, vocab=vocab, seed=turn, input_len=input_len, output_len=tokens, max_len=input_len + tokens)
            records, _ = await run_load(client, load, None, lambda: None)
            for record in records:
                if not record.ok or len(record.tokens) != tokens:
                    raise ValueError(f"a {kind} request brought {len(record.tokens)} of {tokens} tokens: {record.error}")
            if turn:
                found.append(together(records))
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    pairs = [b / a for a, b in zip(rates["free"], rates["schema"], strict=True)]
    return {
        "rows": rows,
        "tokens_each": tokens,
        "turns": turns,
        "tokens_per_s": {kind: [round(rate, 1) for rate in found] for kind, found in rates.items()},
        "schema_over_free": round(medians["schema"] / medians["free"], 4),
        "pairs": [round(pair, 4) for pair in pairs],
    }
