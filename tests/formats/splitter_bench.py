"""What taking answers apart costs: `python tests/formats/splitter_bench.py`. The figures of docs/benchmarks/serving.md come from here.

What it is: microseconds a row of each format's splitter alone, on content, reasoning and arguments, and of text's whole way from a token to a row with
and without one, on the demo model's tokenizer.
What it does not know: engines, edges.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from penstock.core.actors.text.formats import Formats
from penstock.core.actors.text.ledger import Ledger, Request
from penstock.core.actors.text.receive import Receiver
from penstock.core.contract.formats import Opening
from penstock.core.protocol.columns import i32, i64, u8
from penstock.core.protocol.messages import StepTokens, Submit, seq_of
from penstock.core.protocol.model_folder import demo_folder
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.telemetry.metrics import Metrics
from penstock.plugins.formats import BUILT_IN
from penstock.plugins.tokenizers.hugging_face import HuggingFaceTokenizer

ROUNDS = 7
CONTENT = [" the", " water", " runs", " down", ",", " and", " the", " wheel", " turns", ".\n"] * 200
ARGUMENTS = ['"', "city", '":', ' "', "Os", "lo", '",', ' "', "days", '":', " ", "3", ","] * 150
HEADS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {',
    "llama3_json": '{"name": "f", "parameters": {',
    "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{",
    "openai": "<|channel|>commentary to=functions.f<|message|>{",
    "pythonic": "[f(a={",
    "deepseek_v32": '<｜DSML｜function_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="true">',
    "qwen3_coder": "<tool_call><function=f><parameter=a>",
    "seed_oss": "<seed:tool_call><function=f><parameter=a>",
    "minimax_m2": '<minimax:tool_call><invoke name="f"><parameter name="a">',
    "step3": '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="f"><steptml:parameter name="a">',
    "glm45": "<tool_call>f<arg_key>a</arg_key><arg_value>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{",
    "granite": '<|tool_call|>[{"name": "f", "arguments": {',
    "jamba": '<tool_calls>[{"name": "f", "arguments": {',
    "phi4_mini_json": 'functools[{"name": "f", "arguments": {',
    "internlm": '<|action_start|><|plugin|>{"name": "f", "parameters": {',
    "xlam": '[{"name": "f", "arguments": {',
    "cohere_command": '<|START_ACTION|>[{"tool_name": "f", "parameters": {',
    "kimi_reasoning": "◁think▷",
    "seed_oss_reasoning": "<seed:think>",
    "mistral_reasoning": "[THINK]",
    "granite_reasoning": "Here is my thought process:",
}
"""Of reasoning, where it is not <think>."""
TOOLS = b'[{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}]'


def best(work: Callable[[], int]) -> float:
    """The median of the rounds, in microseconds a row."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        rows = work()
        times.append((time.perf_counter() - start) / rows * 1e6)
    return statistics.median(times)


def splitters() -> None:
    print(f"{'splitter':18} {'content':>8} {'call or reasoning':>18}  us a row")
    for spec in BUILT_IN:

        def run(head: str, pieces: list[str], make: Callable[[Opening], object] = spec.factory) -> int:
            feed = make(Opening("", False, TOOLS)).feed  # type: ignore[attr-defined]
            feed(head)
            for piece in pieces:
                feed(piece)
            return len(pieces)

        inside = CONTENT if spec.role == "reasoning" else ARGUMENTS
        print(f"{spec.name:18} {best(lambda: run('x ', CONTENT)):8.2f} {best(lambda: run(HEADS.get(spec.name, '<think>'), inside)):18.2f}")  # noqa: B023


def way(formats: Formats, text: str, *, split: bool, streams: int = 64) -> float:
    """Of a step's rows for so many streams: received, and collected for the edge."""
    tokenizer = HuggingFaceTokenizer.load(str(demo_folder()))
    ids = [int(token) for token in tokenizer.encode_batch([text], add_special_tokens=False)[0]]

    def work() -> int:
        ledger = Ledger()
        receiver = Receiver(tokenizer, ledger, metrics := Metrics(["brook"]), formats)
        for key in range(streams):
            submit = Submit(
                key=key, edge=0, rid="r", kind="chat", model="brook", sampling=SamplingParams(), tools=b"[]", split=split, stream=True
            )
            request = Request(submit, submit.sampling, metrics.of("brook"), 0)
            request.prompt = i32([1])
            ledger.add(request)
            receiver.open(request)
        seqs = i64([seq_of(key, 0) for key in range(streams)])
        zeros = np.zeros(streams, np.int32)
        steps = [
            StepTokens(
                engine=0,
                epoch=1,
                step=number,
                seqs=seqs,
                incarnations=zeros,
                offsets=zeros + number,
                tokens=zeros + token,
                reasons=u8(zeros),
                stats=None,  # type: ignore[arg-type]
            )
            for number, token in enumerate(ids)
        ]
        start = time.perf_counter()
        for step in steps:
            receiver.step(step, 1)
            list(receiver.take())
        spent.append((time.perf_counter() - start) / (streams * len(ids)) * 1e6)
        return 1

    spent: list[float] = []
    best(work)
    return statistics.median(spent)


def main() -> None:
    splitters()
    hermes = Formats(next(spec for spec in BUILT_IN if spec.name == "hermes"))
    prose = "The gate opens and the water runs down to the wheel. " * 8
    call = '<tool_call>\n{"name": "f", "arguments": {' + ", ".join(f'"key{i}": "value {i}"' for i in range(30)) + "}}\n</tool_call>"
    print("\ntext's way, from a token to a row of 64 streams, us a row")
    print(f"plain          {way(hermes, prose, split=False):8.2f}")
    print(f"split, content {way(hermes, prose, split=True):8.2f}")
    print(f"split, a call  {way(hermes, call, split=True):8.2f}")


if __name__ == "__main__":
    main()
