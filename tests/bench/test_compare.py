"""`penstock bench compare`: ratios are right, turns go in the order that they must, peers that fail are told, and nothing that was started is left behind.

It is long because the fake peers that most of it needs stand here with it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from penstock.plugins.commands.bench.client import Record
from penstock.plugins.commands.bench.command import bench
from penstock.plugins.commands.bench.compare import cases, machine, peers, shapes, tables
from penstock.plugins.commands.bench.compare.cases import CASES, Asked, NotMeasured, Turn
from penstock.plugins.commands.bench.compare.peers import OURS, Peer, PeerFailed, Wanted, parse, start
from penstock.plugins.commands.bench.compare.processes import Process
from penstock.plugins.commands.bench.compare.ratios import interval, ratio
from penstock.plugins.commands.bench.compare.turns import Turns, order
from penstock.plugins.commands.bench.workload import Workload

FAKE = Path(__file__).parent / "peers" / "fake_server.py"
ASKED = Asked(vocab=300, context=4096, requests=3)


# ------------------------------------------------------------------ ratios


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine was half as fast in the second round: of medians of both sides nothing would remain of that, of pairs it cancels.
    found = ratio([100.0, 50.0, 90.0], [50.0, 25.0, 30.0], more_is_better=True)
    assert found is not None
    assert (found.median, found.pairs) == (2.0, 3)
    assert (found.low, found.high) == (2.0, 3.0)


def test_times_are_turned_round() -> None:
    found = ratio([10.0], [30.0], more_is_better=False)
    assert found is not None
    assert (found.median, found.low, found.high) == (3.0, None, None)


def test_only_rounds_of_both_count() -> None:
    found = ratio([None, 6.0, 8.0, None], [1.0, 2.0, None, None], more_is_better=True)
    assert found is not None
    assert (found.median, found.pairs) == (3.0, 1)
    assert ratio([None, 1.0], [1.0, None], more_is_better=True) is None
    with pytest.raises(ValueError, match="no pairs"):
        ratio([1.0], [1.0, 2.0], more_is_better=True)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    import numpy as np

    draws = np.random.default_rng(3).lognormal(math.log(1.5), 0.2, size=(200, 15))
    kept = sum(low <= 1.5 <= high for low, high in (interval(row, resamples=400) for row in draws.tolist()))
    assert 0.88 <= kept / 200 <= 0.995
    same = interval([1.0, 2.0, 3.0, 4.0])
    assert same == interval([1.0, 2.0, 3.0, 4.0]), "the seed is fixed: a table can be made again"
    assert 1.0 <= same[0] < 2.5 < same[1] <= 4.0


# ------------------------------------------------------------------ cases


def record(tokens: list[float], want: int) -> Record:
    return Record(scheduled=0, sent=0.5, done=tokens[-1], tokens=tokens, want=want, status=200, prompt_tokens=10)


def test_figures_of_one_request() -> None:
    load = ASKED.load(CASES["decode"], 0)
    steady = [0.75 + 0.25 * index for index in range(128)]
    assert cases.figures(CASES["decode"], Turn(load=load, records=[record(steady, 128)], wall=40.0)) == {"tokens/s": 4.0}
    held_back = Turn(load=load, records=[record([32.5] * 128, 128)], wall=40.0)
    assert cases.figures(CASES["decode"], held_back) == {"tokens/s": 4.0}, "that tokens come all at once makes none of them faster"
    prompt = Turn(load=ASKED.load(CASES["prefill"], 0), records=[record([2.5], 1)], wall=3.0)
    assert cases.figures(CASES["prefill"], prompt) == {"prompt tokens/s": 1024.0}


def test_figures_of_many_requests() -> None:
    load = ASKED.load(CASES["burst"], 0)
    some = [record([1.0, 1.1], 2), record([2.0, 2.3], 2)]
    found = cases.figures(CASES["burst"], Turn(load=load, records=some, wall=2.0))
    assert found == {"output tokens/s": 2.0, "TTFT p50, ms": pytest.approx(1000)}
    times = cases.figures(CASES["poisson"], Turn(load=load, records=some, wall=2.0))
    assert times == {
        label: pytest.approx(ms) for label, ms in zip((f.label for f in CASES["poisson"].figures), (1000, 1450, 200, 290), strict=True)
    }
    whole = cases.figures(CASES["poisson"], Turn(load=load, records=[record([1.0, 1.0], 2)], wall=2.0))
    assert whole == {"TTFT p50, ms": 500.0, "TTFT p95, ms": 500.0}, "an answer that comes whole has no time a token"


def test_other_work_than_was_asked_for_is_no_figure() -> None:
    load = ASKED.load(CASES["offline"], 0)
    with pytest.raises(NotMeasured, match="2 tokens came where 3"):
        cases.figures(CASES["offline"], Turn(load=load, records=[record([1.0, 1.1], 3)], wall=2.0))
    failed = Record(scheduled=0, status=400, error="too long", want=2)
    with pytest.raises(NotMeasured, match=r"1 of 2 requests failed: too long"):
        cases.figures(CASES["offline"], Turn(load=load, records=[record([1.0, 1.1], 2), failed], wall=2.0))


@pytest.mark.parametrize("name", CASES)
def test_rounds_have_the_same_lengths_and_other_ids(name: str) -> None:
    first, second, again = (ASKED.load(CASES[name], round_) for round_ in (0, 1, 0))
    assert first == again
    assert [(len(one.prompt), one.output, one.at) for one in first.requests] == [
        (len(one.prompt), one.output, one.at) for one in second.requests
    ]
    for one, other in zip(first.requests, second.requests, strict=True):
        assert one.prompt[:8] != other.prompt[:8], "a prefix cache would help across rounds"
    assert len(ASKED.load(CASES[name], cases.WARMING).requests) <= len(first.requests)


def test_the_longest_request_is_told() -> None:
    assert ASKED.longest([CASES["decode"], CASES["prefill"]]) == 2049


def test_a_shape_is_a_model_whose_tokens_all_have_text(tmp_path: Path) -> None:
    import safetensors
    from tokenizers import Tokenizer

    assert set(shapes.SHAPES) == {"tiny", "small"}
    folder = Path(shapes.written(tmp_path, "tiny"))
    with safetensors.safe_open(str(folder / "model.safetensors"), "pt") as file:
        assert sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys()) == pytest.approx(14.7e6, rel=0.01)  # noqa: SIM118
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert words.get_vocab_size() == 4096
    texts = [words.decode([index]) for index in range(3, 4096)]
    assert all(texts)
    assert words.decode(words.encode("péage !").ids) == "péage !"


# ------------------------------------------------------------------ turns


class Told:
    """An entrant that answers at a speed of its own, and writes down when it was asked."""

    def __init__(
        self, name: str, seen: list[str], rate: float = 10.0, wrong: Callable[[Workload], Exception | None] = lambda load: None
    ) -> None:
        self.name, self.about = name, f"{name} 1.0"
        self._seen, self._rate, self._wrong = seen, rate, wrong

    def answer(self, load: Workload) -> tuple[list[Record], float]:
        self._seen.append(f"{self.name} {len(load.requests[0].prompt)}")
        if (error := self._wrong(load)) is not None:
            raise error
        records = []
        for one in load.requests:
            times = [(index + 1) / self._rate for index in range(one.output)]
            records.append(Record(scheduled=0, done=times[-1], tokens=times, want=one.output, status=200, prompt_tokens=len(one.prompt)))
        return records, max(one.done for one in records)

    def busy_s(self) -> float:
        return 0.0

    def memory_bytes(self) -> int:
        return 3 << 20

    def stop(self) -> None:
        self._seen.append(f"{self.name} stops")


def turned(seen: list[str], entrants: dict[str, Any], **options: Any) -> Turns:
    def begin(peer: Peer) -> Any:
        seen.append(f"{peer.name} starts")
        made = entrants[peer.name]
        if isinstance(made, Exception):
            raise made
        return made

    some = [Peer(name=name, kind="command", spec="") for name in entrants]
    used = {"cases": [CASES["decode"], CASES["prefill"]], "rounds": 2, **options}
    return Turns(some, asked=ASKED, start=begin, say=lambda text: None, settle_s=0.0, **used)


def test_the_order_turns_round() -> None:
    assert [order(["a", "b", "c"], round_) for round_ in range(3)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]
    seen: list[str] = []
    turns = turned(seen, {OURS: Told(OURS, seen), "it": Told("it", seen)})
    turns.run()
    warm = [f"{OURS} 32", "it 32", f"{OURS} 2048", "it 2048"]
    back = ["it 32", f"{OURS} 32", "it 2048", f"{OURS} 2048"]
    assert seen == [f"{OURS} starts", "it starts", *warm, *warm, *back, "it stops", f"{OURS} stops"]


def test_one_at_a_time_the_last_of_a_round_is_the_first_of_the_next() -> None:
    seen: list[str] = []
    turned(seen, {OURS: Told(OURS, seen), "it": Told("it", seen)}, cases=[CASES["decode"]], rounds=3, one_at_a_time=True).run()
    turn = {name: [f"{name} starts", f"{name} 32", f"{name} 32"] for name in (OURS, "it")}
    ends = {name: f"{name} stops" for name in (OURS, "it")}
    # Each start is warmed anew; who stays up is not started again.
    assert seen == [
        *turn[OURS],
        ends[OURS],
        *turn["it"],
        "it 32",
        ends["it"],
        *turn[OURS],
        f"{OURS} 32",
        ends[OURS],
        *turn["it"],
        ends["it"],
    ]


def test_ratios_come_from_what_was_measured() -> None:
    seen: list[str] = []
    turns = turned(seen, {OURS: Told(OURS, seen, rate=30.0), "it": Told("it", seen, rate=10.0)})
    turns.run()
    rows = {(row.case, row.server): row for row in tables.rows(turns.result)}
    decode = rows["decode", "it"].ratio
    assert decode is not None
    assert decode.median == pytest.approx(3.0)
    assert decode.pairs == 2
    assert rows["decode", OURS].ratio is None
    assert rows["prefill", "it"].values == [pytest.approx(20480.0)] * 2
    assert "- it: ready after 0.0 s, 3 MiB (PSS" in tables.markdown(turns.result, {}, {})


def test_a_failing_peer_is_told_and_the_rest_goes_on() -> None:
    seen: list[str] = []

    def long(load: Workload) -> Exception | None:
        return NotMeasured("too long for it") if load.input_tokens > 100 else None

    def second(load: Workload) -> Exception | None:
        return PeerFailed("it ended") if seen.count("dying 32") > 1 else None

    entrants = {
        OURS: Told(OURS, seen),
        "absent": PeerFailed("it ended before it was ready. Its last lines:\nno such file"),
        "narrow": Told("narrow", seen, wrong=long),
        "dying": Told("dying", seen, wrong=second),
        "well": Told("well", seen),
    }
    turns = turned(seen, entrants)
    turns.run()
    assert [name for name, _ in turns.result.failures] == ["absent", "narrow", "dying"]
    assert seen.count("narrow 2048") == 1, "it is not asked again what it cannot do"
    assert seen.count("narrow 32") == 3
    assert seen.count("dying 32") == 2
    assert sorted(one for one in seen if one.endswith("stops")) == sorted(f"{name} stops" for name in entrants if name != "absent")
    rows = {(row.case, row.server): row for row in tables.rows(turns.result)}
    for case in ("decode", "prefill"):
        well = rows[case, "well"].ratio
        assert well is not None
        assert well.pairs == 2
        assert rows[case, "absent"].ratio is None
    text = tables.markdown(turns.result, {"processor": "abacus"}, {"rounds": "2"})
    assert "absent: not started: it ended before it was ready. Its last lines:\n\n```\nno such file\n```" in text
    assert "narrow: left out of prefill from here on: too long for it" in text
    assert "| decode, tokens/s | well (well 1.0) | 10.0 | 10.0..10.0 | 1.00 (n=2) | 1.00..1.00 |" in text


def test_a_turn_begins_when_the_others_are_idle() -> None:
    """One whose threads look for work for a while after each turn."""
    seen: list[str] = []

    class Spinning(Told):
        spins, used = 0, 0.0

        def answer(self, load: Workload) -> tuple[list[Record], float]:
            self.spins = 7
            return super().answer(load)

        def busy_s(self) -> float:
            if self.spins:
                self.spins -= 1
                self.used += 1.0
            return self.used

    class Beside(Told):
        def answer(self, load: Workload) -> tuple[list[Record], float]:
            assert it.spins == 0, "it was asked beside another that was not idle"
            return super().answer(load)

    it = Spinning("it", seen)
    turns = turned(seen, {OURS: Beside(OURS, seen), "it": it, "that": Beside("that", seen)}, rounds=3)
    turns.run()
    assert turns.result.failures == []
    assert turns.result.restless == {}


def test_who_is_never_idle_is_told() -> None:
    seen: list[str] = []

    class Restless(Told):
        clock = 0.0

        def busy_s(self) -> float:
            Restless.clock += 3.2
            return Restless.clock

    turns = turned(
        seen, {OURS: Told(OURS, seen), "it": Restless("it", seen)}, cases=[CASES["decode"]], rounds=1, now=lambda: Restless.clock
    )
    turns.run()
    assert turns.result.restless == {"it": pytest.approx(3.2 / 12.8)}
    assert "it was not idle: it used up to 0.25 cores" in tables.markdown(turns.result, {}, {})
    assert tables.rows(turns.result)[1].values == [10.0], "and measured all the same"


def test_no_turn_begins_after_the_limit() -> None:
    seen: list[str] = []
    turns = turned(
        seen, {OURS: Told(OURS, seen), "it": Told("it", seen)}, limit_s=10.0, now=lambda: 3.0 * sum(" 32" in one for one in seen)
    )
    turns.run()
    assert sum(" 32" in one for one in seen) == 4, "two that warm, two of the first round"
    assert "10 s" in turns.result.cut
    assert [row.values for row in tables.rows(turns.result) if row.case == "decode"] == [[10.0, None], [10.0, None]]
    assert "Cut short" in tables.markdown(turns.result, {}, {})


def test_an_interruption_ends_all_and_keeps_what_was_measured() -> None:
    seen: list[str] = []

    class Broken(Told):
        def stop(self) -> None:
            super().stop()
            raise KeyboardInterrupt

    def now(load: Workload) -> Exception | None:
        if seen.count("it 32") == 2:
            raise KeyboardInterrupt
        return None

    turns = turned(seen, {OURS: Told(OURS, seen), "it": Broken("it", seen, wrong=now), "that": Told("that", seen)}, cases=[CASES["decode"]])
    with pytest.raises(KeyboardInterrupt):
        turns.run()
    assert {one for one in seen if one.endswith("stops")} == {f"{OURS} stops", "it stops", "that stops"}
    assert turns.result.cut == "interrupted"
    assert turns.result.found["decode", "tokens/s", OURS][0] == pytest.approx(10.0)


# ------------------------------------------------------------------ peers


def script(path: Path, *lines: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def notes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("vllm", "is no peer"),
        ("=http://a", "is no peer"),
        ("vllm=", "is no peer"),
        ("penstock=http://127.0.0.1:1", "take another"),
        ("it=http://", "no http"),
        ("it=serve it", "none of openvino, vllm, llama-server"),
        ("vllm=/no/such/python", "no program"),
        ('it="serve {port}', "quotation"),
    ],
)
def test_what_is_no_peer_is_refused(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(word)


def test_kinds_of_peers() -> None:
    here = sys.executable
    assert parse("it=http://127.0.0.1:1/v1").kind == "url"
    assert parse("vllm=serve {model} {port}").kind == "command"
    assert parse(f"openvino:int8={here}") == Peer(name="openvino:int8", kind="openvino", spec=here)


@pytest.fixture
def wanted(tmp_path: Path) -> Iterator[Wanted]:
    """Whatever a test starts must be gone at its end."""
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    folder = tmp_path / "scratch of ours"
    folder.mkdir()
    model = tmp_path / "a model"
    model.mkdir()
    yield Wanted(model=str(model), models={}, threads=3, longest=500, serve_args=(), folder=folder, start_s=20.0, turn_s=20.0)
    assert {one.pid for one in psutil.Process().children(recursive=True)} <= before


def fake(tmp_path: Path, *words: str, name: str = "it") -> Peer:
    return parse(f"{name}={sys.executable} {FAKE} --port {{port}} --notes {tmp_path}/notes --model {{model}} {' '.join(words)}")


def test_a_command_is_started_asked_and_stopped(tmp_path: Path, wanted: Wanted) -> None:
    entrant = start(fake(tmp_path, "--threads {threads} {untouched}"), wanted)
    try:
        assert entrant.about == "1.2.3, HTTP"
        assert entrant.busy_s() > 0
        assert entrant.memory_bytes() > 1 << 20
        load = ASKED.load(CASES["offline"], 0)
        records, wall = entrant.answer(load)
        assert cases.figures(CASES["offline"], Turn(load=load, records=records, wall=wall))["output tokens/s"] > 0
    finally:
        entrant.stop()
    first, *turns = notes(tmp_path / "notes")
    assert first["words"][4:] == ["--model", wanted.model, "--threads", "3", "{untouched}"], "a path with a space stays one word"
    assert first["env"]["HF_HUB_OFFLINE"] == "1"
    assert sorted(turn["prompt"] for turn in turns) == sorted(len(one.prompt) for one in load.requests)
    assert not psutil.pid_exists(first["pid"])


def test_a_running_server_is_left_running(tmp_path: Path, wanted: Wanted) -> None:
    own = start(fake(tmp_path), wanted)
    try:
        other = start(Peer(name="url", kind="url", spec=f"http://127.0.0.1:{notes(tmp_path / 'notes')[0]['words'][1]}"), wanted)
        other.stop()
        assert psutil.pid_exists(notes(tmp_path / "notes")[0]["pid"])
        assert cases.figures(CASES["prefill"], turn_of(own, "prefill"))
    finally:
        own.stop()


def turn_of(entrant: peers.Entrant, name: str) -> Turn:
    load = ASKED.load(CASES[name], 0)
    records, wall = entrant.answer(load)
    return Turn(load=load, records=records, wall=wall)


def test_servers_that_fail_say_so(tmp_path: Path, wanted: Wanted) -> None:
    with pytest.raises(PeerFailed, match=r"(?s)ended before it was ready.*no such tensor: model.norm.weight"):
        start(fake(tmp_path, "--break-start"), wanted)
    with pytest.raises(PeerFailed, match="not ready within 0 s"):
        start(fake(tmp_path, "--never-ready"), Wanted(**{**vars(wanted), "start_s": 0.3}))
    with pytest.raises(PeerFailed, match=r"no OpenAI server answers at http://127\.0\.0\.1:9"):
        start(parse("it=http://127.0.0.1:9"), wanted)
    with pytest.raises(PeerFailed, match=r"(?s)ended before it was ready.*/no/such/server"):
        start(parse("it=/no/such/server {port}"), wanted)
    dying = start(fake(tmp_path, "--die-at 1"), wanted)
    try:
        with pytest.raises(PeerFailed, match=r"(?s)ended while it was asked.*the weights have run dry"):
            turn_of(dying, "prefill")
    finally:
        dying.stop()
    refusing = start(fake(tmp_path, "--refuse-longer 100"), wanted)
    try:
        with pytest.raises(NotMeasured, match="too long for me"):
            cases.figures(CASES["prefill"], turn_of(refusing, "prefill"))
    finally:
        refusing.stop()
    short = start(fake(tmp_path, "--short-by 2"), wanted)
    try:
        with pytest.raises(NotMeasured, match="126 tokens came where 128"):
            cases.figures(CASES["decode"], turn_of(short, "decode"))
    finally:
        short.stop()


def test_known_servers_are_started_by_their_own_words(tmp_path: Path, wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run = f'exec {sys.executable} {FAKE} --notes {tmp_path}/notes "$@"'
    python = script(tmp_path / "python", 'if [ "$1" = -c ]; then echo 0.99.1; exit; fi', run)
    vllm = start(parse(f"vllm={python}"), wanted)
    try:
        assert vllm.about == "0.99.1, HTTP"
        assert cases.figures(CASES["prefill"], turn_of(vllm, "prefill"))
    finally:
        vllm.stop()
    server = script(tmp_path / "llama-server", 'if [ "$1" = --version ]; then echo "version: 4321 (abc)" >&2; exit; fi', run)
    with pytest.raises(PeerFailed, match=r"has none: name one with --peer-model"):
        start(parse(f"llama-server={server}"), wanted)
    (Path(wanted.model) / "one.gguf").touch()
    llama = start(parse(f"llama-server={server}"), wanted)
    llama.stop()
    assert llama.about == "4321, HTTP"
    (Path(wanted.model) / "two.gguf").touch()
    with pytest.raises(PeerFailed, match=r"has 2 of them \(one.gguf, two.gguf\)"):
        start(parse(f"llama-server={server}"), wanted)
    first, second = (one for one in notes(tmp_path / "notes") if "pid" in one)
    assert first["words"][2:6] == ["-m", "vllm.entrypoints.openai.api_server", "--model", wanted.model]
    assert first["env"]["OMP_NUM_THREADS"] is None, "vLLM binds its threads itself"
    assert second["env"]["OMP_NUM_THREADS"] == "7"
    assert second["words"][2:4] == ["-m", f"{wanted.model}/one.gguf"]
    assert second["words"][-2:] == ["-c", str(16 * 512)]
    assert all("127.0.0.1" in one["words"] for one in (first, second))


GENAI = """
import pathlib, sys
class SchedulerConfig: ...
class GenerationConfig:
    def __init__(self, **words): self.words = words
class One:
    def __init__(self, ids): self.generated_ids = ids
class Handle:
    def __init__(self, left): self.left, self.ready = left, False
    def can_read(self): return self.ready
    def read(self):
        self.ready = False
        return {0: One([1])}
class ContinuousBatchingPipeline:
    def __init__(self, folder, scheduler, device, properties):
        assert (pathlib.Path(folder) / "openvino_model.xml").exists()
        assert properties["INFERENCE_NUM_THREADS"] == 3 and scheduler.enable_prefix_caching
        print("noise of the engine's own")
        self.rows = []
    def add_request(self, number, tensor, config):
        if len(tensor) > 1000:
            raise RuntimeError("no room for the prompt")
        assert config.words["ignore_eos"]
        self.rows.append(Handle(config.words["max_new_tokens"]))
        return self.rows[-1]
    def has_non_finished_requests(self): return bool(self.rows)
    def step(self):
        for row in self.rows:
            row.left -= 1
            row.ready = True
        self.rows = [row for row in self.rows if row.left]
"""


def test_an_engine_is_stepped_in_its_own_python(tmp_path: Path, wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "openvino_genai.py").write_text(GENAI, encoding="utf-8")
    (modules / "openvino.py").write_text("def Tensor(array): return array[0]\n", encoding="utf-8")
    info = modules / "openvino_genai-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openvino-genai\nVersion: 9.9\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    python = script(tmp_path / "bin" / "python", f'exec {sys.executable} "$@"')
    with pytest.raises(PeerFailed, match=r"no OpenVINO export.*pip install optimum-intel"):
        start(parse(f"openvino={python}"), wanted)
    script(tmp_path / "bin" / "optimum-cli", "echo $4 cannot be exported; exit 1")
    with pytest.raises(PeerFailed, match=r"(?s)exported nothing.*a model cannot be exported"):
        start(parse(f"openvino={python}"), wanted)
    script(tmp_path / "bin" / "optimum-cli", 'for last; do :; done; mkdir -p "$last"; touch "$last/openvino_model.xml"')
    entrant = start(parse(f"openvino={python}"), wanted)
    try:
        assert entrant.about == "9.9, in process"
        turn = turn_of(entrant, "offline")
        assert cases.figures(CASES["offline"], turn)["output tokens/s"] > 0
        assert [len(one.tokens) for one in turn.records] == [one.output for one in turn.load.requests]
        paced = Asked(vocab=300, context=4096, requests=3, rate=20.0).load(CASES["poisson"], 0)
        records, wall = entrant.answer(paced)
        assert all(one.tokens[0] >= request.at for one, request in zip(records, paced.requests, strict=True))
        assert wall >= paced.requests[-1].at
        with pytest.raises(NotMeasured, match="no room for the prompt"):
            turn_of(entrant, "prefill")
        assert cases.figures(CASES["decode"], turn_of(entrant, "decode")), "it goes on after a round that failed"
    finally:
        entrant.stop()


# ------------------------------------------------------------------ nothing is left


def gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def noted(path: Path, within_s: float = 20.0) -> dict[str, Any]:
    deadline = time.monotonic() + within_s
    while not notes(path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return notes(path)[0]


def test_what_a_peer_started_ends_with_it(tmp_path: Path, wanted: Wanted) -> None:
    command = [sys.executable, str(FAKE), "--notes", f"{tmp_path}/notes", "--stubborn", "--child"]
    process = Process(command, tmp_path / "log", env=os.environ)
    try:
        found = noted(tmp_path / "notes")
        assert not process.left()
    finally:
        process.stop(grace_s=0.2)
    assert process.left()
    assert gone(found["pid"], 0.5)
    assert gone(found["child"], 0.5), "a session of its own does not save it"
    process.stop()


DRIVER = """
import os, sys, time
from pathlib import Path
from penstock.plugins.commands.bench.compare.processes import Process, stoppable
with stoppable():
    process = Process(sys.argv[2:], Path(sys.argv[1]), env=os.environ)
    try:
        time.sleep(60)
    finally:
        process.stop()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_however_the_comparison_ends(tmp_path: Path, number: signal.Signals) -> None:
    fake = [sys.executable, str(FAKE), "--notes", f"{tmp_path}/notes"]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "log"), *fake], stderr=subprocess.DEVNULL, start_new_session=True
    )
    found = noted(tmp_path / "notes")
    driver.send_signal(number)
    driver.wait(30)
    assert gone(found["pid"]), f"it outlived {number.name}"


def test_jobs_that_ignore_ctrl_c_end_with_sigterm_and_nohup_is_kept(tmp_path: Path) -> None:
    fake = [sys.executable, str(FAKE), "--notes", f"{tmp_path}/notes"]
    ignoring = ["/bin/sh", "-c", 'trap "" INT HUP; exec "$@"', "sh"]
    driver = subprocess.Popen(
        [*ignoring, sys.executable, "-c", DRIVER, str(tmp_path / "log"), *fake], stderr=subprocess.DEVNULL, start_new_session=True
    )
    found = noted(tmp_path / "notes")
    driver.send_signal(signal.SIGHUP)
    assert not gone(found["pid"], 0.2)
    driver.send_signal(signal.SIGTERM)
    driver.wait(30)
    assert gone(found["pid"])


def test_a_log_tail_is_its_last_lines(tmp_path: Path) -> None:
    process = Process(["/bin/sh", "-c", "for i in $(seq 500); do echo line $i; done"], tmp_path / "log", env=os.environ)
    try:
        while not process.left():
            time.sleep(0.01)
        assert process.tail(2) == "line 499\nline 500"
        process.log.write_text("one\nValueError: no room\ntwo\nthree\n")
        assert process.tail(2) == "ValueError: no room\n...\ntwo\nthree", "the cause stands above the consequence"
    finally:
        process.stop()


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "--peer"),
        ("--peer it", "is no peer"),
        ("--peer a=http://a --peer a=http://b", "two peers are called 'a'"),
        ("--peer a=http://a --case some", "'some' is none of offline"),
        ("--peer a=http://a --rounds 0", "--rounds"),
        ("--peer a=http://a --peer-model b=/", "no --peer is called 'b'"),
        ("--peer a=http://a --peer-model a=/no/such", "something that exists"),
        ("--peer a=http://a --model /", "vocab_size"),
        ("--peer a=http://a --json /no/such/file", "/no/such/file cannot be written"),
        ("--peer a=http://a --model / --shape tiny", "cannot hold beside"),
        ("--peer a=http://a --model /no/such", "does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused(line: str, said: str) -> None:
    result = CliRunner().invoke(bench, ["compare", *line.split()])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_a_case_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 300, "max_position_embeddings": 1000}')
    result = CliRunner().invoke(bench, ["compare", "--model", str(tmp_path), "--peer", "a=http://a"])
    assert result.exit_code == 2
    assert "2049 tokens, but the model's context is 1000" in result.output


def test_a_whole_comparison(tmp_path: Path) -> None:
    """The demo model beside a server that works, one that breaks at its start and one that is not there."""
    kept, table = tmp_path / "figures.json", tmp_path / "table.md"
    good, bad = (f"{sys.executable} {FAKE} --port {{port}} --notes {tmp_path}/notes {more}" for more in ("", "--break-start"))
    line = ["--peer", f"good={good}", "--peer", f"bad={bad}", "--peer", "absent=http://127.0.0.1:9", "--case", "decode", "--case", "prefix"]
    line += ["--rounds", "2", "--requests", "3", "--json", str(kept), "--markdown", str(table), "--", "--kv-cache-memory-bytes", "64M"]
    result = CliRunner().invoke(bench, ["compare", *line], catch_exceptions=False)
    assert result.exit_code == 1, "peers failed"
    (row,) = notes(kept)
    assert row["bench"] == "compare"
    assert row["settings"]["serve"] == "--kv-cache-memory-bytes 64M"
    assert row["servers"]["good"] == "1.2.3, HTTP"
    assert row["servers"][OURS].startswith(machine.facts()["penstock"])
    assert {one["server"] for one in row["failures"]} == {"bad", "absent"}
    assert "no such tensor" in next(one["why"] for one in row["failures"] if one["server"] == "bad")
    figures = {(one["case"], one["server"]): one for one in row["figures"]}
    for case in ("decode", "prefix"):
        ours, theirs = (figures[case, name]["values"] for name in (OURS, "good"))
        want = ratio(ours, theirs, more_is_better=True)
        assert want is not None
        assert figures[case, "good"]["times_as_fast"] == {"median": want.median, "low": want.low, "high": want.high, "pairs": 2}
        assert "times_as_fast" not in figures[case, "bad"]
    text = table.read_text(encoding="utf-8")
    for fact in ("date", "processor", "cores", "penstock", "load after"):
        assert f"{fact} {row['machine'][fact]}" in text
    assert "| decode, tokens/s | good (1.2.3, HTTP) |" in text
    assert gone(notes(tmp_path / "notes")[0]["pid"], 0.5)
    assert not [one for one in psutil.Process().children(recursive=True) if "serve" in one.cmdline()]


def test_ctrl_c_prints_what_there_is_and_leaves_nothing(tmp_path: Path) -> None:
    fake = f"{sys.executable} {FAKE} --port {{port}} --notes {tmp_path}/notes --never-ready --child"
    command = [sys.executable, "-m", "penstock", "bench", "compare", "--peer", f"slow={fake}", "--case", "decode"]
    running = subprocess.Popen(
        [*command, "--", "--kv-cache-memory-bytes", "64M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        found = noted(tmp_path / "notes", 60)
        inside = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, err
    assert "Cut short: interrupted" in out
    assert len(inside) > 3, "Penstock's processes and the peer's"
    assert [one.pid for one in inside if not gone(one.pid, 1.0)] == []
    assert gone(found["child"], 0.5)


def test_the_processor_is_named_with_what_engines_ask_for() -> None:
    text = "model name\t: Abacus 9\ncpu family\t: 26\nflags\t\t: fpu avx2 avx512f avx512_bf16 zz\n"
    assert machine.processor(text) == "Abacus 9; family 26; avx2, avx512f, avx512_bf16"
    assert machine.processor("") != ""


def test_a_checkout_tells_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git")
    monkeypatch.setattr(machine.version, "__file__", str(tmp_path / "version.py"))
    assert machine.commit() == "", "a package that lies in no checkout has none"
