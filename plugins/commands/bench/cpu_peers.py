"""Decoding on the CPU, Penstock's quantised forms beside other engines', all in turns: `python -m penstock.plugins.commands.bench.cpu_peers FOLDER [--openvino PYTHON EXPORTED]
[--llama PYTHON GGUF]`.

What it is: one process an engine, each of which decodes when it is told to, so that what slows the machine slows them alike; tokens a second of one sequence, from the times of a
long and of a short answer to the same prompt, the fastest of several rounds. OpenVINO is given by a Python that has `openvino-genai` and a folder that
`optimum-cli export openvino -m FOLDER --task text-generation-with-past --weight-format int8 EXPORTED` wrote; llama.cpp by a Python that has `llama-cpp-python` and a bfloat16
GGUF file of the model, which its own library rounds to Q8_0 and Q4_0. Neither is needed.
What it does not know: quality; servers. A worker of another engine runs in that engine's Python, so that nothing of Penstock is imported above.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PENSTOCK = ("bfloat16", "int8", "int8+int8", "int4", "int4+int8", "int4+int4")
"""Forms of --quantization; behind a plus that of the output head."""
LLAMA = {"Q8_0": 7, "Q4_0": 2}
"""Files' types in llama.h."""
Answer = Callable[[list[int], int], None]
"""(prompt, number of tokens): decode so many, and wait for them."""


def penstock(model: str, form: str, threads: int) -> Answer:
    """In this process."""
    from penstock.core.llm import LLM
    from penstock.core.protocol.sampling import SamplingParams

    layers, _, head = form.partition("+")
    options: dict[str, Any] = {"dtype": "bfloat16", "threads": threads, "enable_prefix_caching": False}
    options |= {} if layers == "bfloat16" else {"quantization": layers}
    options |= {"lm_head_quantization": head} if head else {}
    llm = LLM(model, **options)

    def answer(prompt: list[int], count: int) -> None:
        llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))

    return answer


def openvino(model: str, form: str, threads: int) -> Answer:
    """Of an exported folder, whatever its weights are."""
    import numpy as np  # type: ignore[import-not-found,unused-ignore]
    import openvino as ov  # type: ignore[import-not-found]
    import openvino_genai as genai  # type: ignore[import-not-found]

    pipe = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def answer(prompt: list[int], count: int) -> None:
        config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        pipe.generate(ov.Tensor(np.array([prompt], dtype=np.int64)), config)

    return answer


def llama(model: str, form: str, threads: int) -> Answer:
    """Of a wide GGUF file, rounded by llama.cpp itself."""
    import llama_cpp  # type: ignore[import-not-found]

    folder = tempfile.mkdtemp()
    file = f"{folder}/{form}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = LLAMA[form]
    if llama_cpp.llama_model_quantize(model.encode(), file.encode(), params):
        raise SystemExit(f"{model} cannot be rounded to {form}")
    llm = llama_cpp.Llama(file, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer(prompt: list[int], count: int) -> None:
        llm.reset()
        for index, _ in enumerate(llm.generate(prompt, temp=0.0), 1):
            if index == count:
                return

    return answer


ENGINES = {"penstock": penstock, "openvino": openvino, "llama": llama}


def work(engine: str, model: str, form: str, threads: int) -> None:
    """A worker: for each line [prompt, count] of its input the seconds that the answer took."""
    answer = ENGINES[engine](model, form, threads)
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print
    print("ready", file=told, flush=True)
    for line in sys.stdin:
        prompt, count = json.loads(line)
        begun = time.perf_counter()
        answer(prompt, count)
        print(time.perf_counter() - begun, file=told, flush=True)


class Worker:
    """Its process."""

    def __init__(self, python: str, engine: str, model: str, form: str, threads: int) -> None:
        self.name = f"{engine} {form}"
        command = [python, __file__, "--worker", engine, model, form, str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.works = self._line() == "ready"
        self.seconds: dict[int, float] = {}

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, prompt: list[int], count: int) -> None:
        """Keep the shortest time of each number of tokens."""
        assert self._process.stdin is not None
        print(json.dumps([prompt, count]), file=self._process.stdin, flush=True)
        said = self._line()
        if not said:
            self.works = False
            return
        self.seconds[count] = min(self.seconds.get(count, float("inf")), float(said))

    def end(self) -> None:
        """Its process, too."""
        self._process.kill()
        self._process.communicate()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Tokens a second of each."""
    parser = argparse.ArgumentParser(description="Decoding on the CPU beside other engines.")
    parser.add_argument("model", help="a wide Hugging Face folder")
    parser.add_argument("--forms", nargs="+", default=PENSTOCK)
    parser.add_argument("--openvino", nargs=2, metavar=("PYTHON", "EXPORTED"))
    parser.add_argument("--llama", nargs=2, metavar=("PYTHON", "GGUF"))
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args(arguments)
    wanted = [(sys.executable, "penstock", asked.model, form) for form in asked.forms]
    wanted += [(asked.openvino[0], "openvino", asked.openvino[1], Path(asked.openvino[1]).name)] if asked.openvino else []
    wanted += [(asked.llama[0], "llama", asked.llama[1], form) for form in LLAMA] if asked.llama else []
    workers = [Worker(*one, asked.threads) for one in wanted]
    vocab = json.loads((Path(asked.model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    prompt = [(7 * index) % (vocab - 16) + 8 for index in range(asked.prompt)]
    found = {}
    try:
        for count in (1, asked.tokens + 1) * (asked.rounds + 1):  # the first round warms up, and may stand
            for worker in workers:
                if worker.works:
                    worker.ask(prompt, count)
        for worker in workers:
            if worker.works:
                found[worker.name] = asked.tokens / (worker.seconds[asked.tokens + 1] - worker.seconds[1])
                print(
                    f"{worker.name:24} {found[worker.name]:8.1f} tok/s, prompt of {asked.prompt}: {worker.seconds[1] * 1e3:7.1f} ms",
                    flush=True,
                )
            else:
                print(f"{worker.name:24} does not work: run its worker by hand to see why", flush=True)
    finally:
        for worker in workers:
            worker.end()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
