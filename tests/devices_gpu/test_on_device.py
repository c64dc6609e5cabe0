"""On a real GPU: the Triton table against the reference table, graphs against eager steps, no synchronising call, memory, determinism."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from penstock.core.llm import LLM
from penstock.core.protocol.columns import i32
from penstock.core.protocol.messages import Control, DeviceLost, DeviceWork, Forward, Move, Sample, SlotSampling
from penstock.core.protocol.sampling import SamplingParams
from penstock.core.runtime.device_queue import ThreadDeviceQueue
from penstock.plugins.attention import register_attention_backends
from penstock.plugins.devices.cuda import DTYPES, CudaDevice, load
from penstock.plugins.devices.driver import Driver, Job, Options
from penstock.plugins.devices.lane import CudaLane

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
Make = Callable[..., Any]
BROOK = Path(__file__).parents[2] / "plugins" / "demo_model" / "brook"
GREEDY = SamplingParams(temperature=0.0)
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def triton_spec() -> Any:
    return next(spec for spec in register_attention_backends() if spec.name == "triton")


@pytest.fixture
def on_device(config_for: Make, triton_spec: Any) -> Make:
    """on_device(folder, parts=, **RunnerConfig fields) -> a runner on the GPU, with other parts of `load` than the kernels."""

    def build(path: Path, parts: Any = None, **over: Any) -> Any:
        lane = CudaLane(torch.device("cuda", torch.cuda.current_device()))
        lane.bind()
        return load(config_for(path, **over), lambda phase, fraction: None, lane, DTYPES, depth=2, **(parts or {"attention": triton_spec}))

    return build


def some_jobs(count: int, outputs: int = 6) -> list[Job]:
    rng = np.random.default_rng(7)
    asks = [
        SamplingParams(temperature=0.0, logprobs=4, prompt_logprobs=1),
        SamplingParams(temperature=0.0, logprobs=2, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
        SamplingParams(
            temperature=0.0, logprobs=2, logit_bias={5: 4.0}, bad_words_token_ids=[[9], [5, 5]], allowed_token_ids=list(range(80))
        ),
    ]
    return [
        Job(prompt=rng.integers(0, 97, int(rng.integers(1, 60))).astype(np.int32), params=asks[i % 3], max_tokens=outputs)
        for i in range(count)
    ]


def close_enough(mine: list[Job], theirs: list[Job], at: float) -> None:
    """Equal up to the first token where rounding may have decided otherwise; log-probabilities up to there are close."""
    agreed = total = 0
    for a, b in zip(mine, theirs, strict=True):
        total += len(b.tokens)
        for x, y, p, q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=True):
            assert abs(np.frombuffer(p, np.float32)[1] - np.frombuffer(q, np.float32)[1]) < at  # the most likely token's
            if x != y:
                break
            agreed += 1
        for position, (ids, values) in a.prompt_logprobs.items():
            assert ids[0] == b.prompt_logprobs[position][0][0]
            assert abs(values[0] - b.prompt_logprobs[position][1][0]) < 4 * at
    assert agreed >= 0.8 * total


@pytest.mark.parametrize(("family", "name"), [("llama", "float16"), ("qwen2", "bfloat16"), ("qwen3", "float16"), ("mistral", "bfloat16")])
def test_triton_equals_the_reference_table(family: str, name: str, make_folder: Make, on_device: Make, reference: Make) -> None:
    folder = make_folder(family, getattr(torch, name), **SHAPE)
    truth = some_jobs(9)
    Driver(on_device(folder, parts=reference, enforce_eager=True)).run(truth)
    runner = on_device(folder)
    runner.warm_up(lambda phase: None)
    at = 0.05 if name == "float16" else 0.4
    for options in (
        Options(),
        Options(chunk=lambda rng: rng.randint(1, 20), scatter=True, seed=1),
        Options(share=True, preempt=0.2, seed=3),
    ):
        mine = some_jobs(9)
        Driver(runner, options).run(mine)
        close_enough(mine, truth, at)
    plain = [Job(prompt=job.prompt, params=GREEDY, max_tokens=6) for job in some_jobs(6)]
    Driver(runner).run(plain)
    assert runner.counters.replays > 0
    eager = [Job(prompt=job.prompt, params=GREEDY, max_tokens=6) for job in plain]
    Driver(on_device(folder, enforce_eager=True)).run(eager)
    assert sum(a.tokens == b.tokens for a, b in zip(plain, eager, strict=True)) >= 5


@pytest.mark.parametrize(("kind", "bound"), [("fp8_e4m3", 0.15), ("fp8_e5m2", 0.3), ("int8", 0.05)])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_cache_in_eight_bits(kind: str, bound: float, name: str, make_folder: Make, on_device: Make) -> None:
    """Whole, in chunks, from shared blocks and replayed, in graphs: log-probabilities of prompts close to a wide cache's; then the deterministic self-test."""
    folder = make_folder("qwen3", getattr(torch, name), **SHAPE)
    truth = some_jobs(9)
    Driver(on_device(folder)).run(truth)
    runner = on_device(folder, kv_cache_dtype=kind)
    runner.warm_up(lambda phase: None)
    assert runner.kv_layout.startswith(f"paged-codes-v1:{kind}:")
    for options in (
        Options(),
        Options(chunk=lambda rng: rng.randint(1, 20), scatter=True, seed=1),
        Options(share=True, preempt=0.2, seed=3),
    ):
        mine = some_jobs(9)
        Driver(runner, options).run(mine)
        drifts = [
            abs(values[0] - b.prompt_logprobs[position][1][0])
            for a, b in zip(mine, truth, strict=True)
            for position, (_, values) in a.prompt_logprobs.items()
        ]
        assert sum(drifts) / len(drifts) < bound
    assert runner.counters.replays > 0
    on_device(folder, kv_cache_dtype=kind, deterministic=True).warm_up(lambda phase: None)


def test_graphs_captured_while_nothing_runs_compute_the_same(make_folder: Make, on_device: Make) -> None:
    folder = make_folder("llama", torch.float16, **SHAPE)
    size = {"max_num_seqs": 24, "max_num_batched_tokens": 256}
    runner = on_device(folder, **size)
    runner.warm_up(lambda phase: None)
    assert len(runner._mixed) == 1
    while runner.improve():
        pass
    assert set(runner._mixed) == {(rows, tokens) for rows in (16, 24) for tokens in (64, 128, 192, 256)}
    assert set(runner._forwards) == {1, 2, 4, 8, 16, 24}
    assert runner._graph_bytes <= runner.graph_reserve
    for options in (Options(), Options(chunk=lambda rng: rng.randint(1, 20), scatter=True, seed=1)):
        mine, eager = some_jobs(20), some_jobs(20)
        captures, replays = runner.counters.captures, runner.counters.replays
        driver = Driver(runner, options)
        driver.run(mine)
        assert runner.counters.captures == captures
        assert runner.counters.replays - replays > 0.9 * driver.steps
        Driver(on_device(folder, enforce_eager=True, **size), options).run(eager)
        close_enough(mine, eager, 0.05)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronising_call_in_the_step_loop(make_folder: Make, on_device: Make) -> None:
    """Placing, mixed prefill, penalties, lists, log-probabilities, graphs: with torch refusing every call that waits."""
    runner = on_device(make_folder("llama", torch.bfloat16, **SHAPE))
    runner.warm_up(lambda phase: None)
    odd = SamplingParams(
        temperature=0.8, seed=2, repetition_penalty=1.1, presence_penalty=0.2, logit_bias={3: 2.0}, allowed_token_ids=list(range(60)),
        bad_words_token_ids=[[5], [1, 2, 3]], min_tokens=3, logprobs=3, prompt_logprobs=2,
    )  # fmt: skip
    hot = SamplingParams(temperature=1.0, top_p=0.9, top_k=30, min_p=0.01, seed=1)
    for params in ([GREEDY, hot], [GREEDY, hot, odd]):
        count = len(params)
        slots = i32(range(count))
        places = [SlotSampling(slot=i, choice=0, prompt_len=5, params=p, stop_ids=i32([7])) for i, p in enumerate(params)]
        asks = i32([2]) if count == 3 else i32([])
        waits = []
        for again in range(2):  # the first time may compile
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if again else "default")
            try:
                runner.forward(
                    Forward(
                        engine=0, epoch=0, step=1, slots=slots, starts=i32([0] * count), counts=i32([5] * count), num_decode=0,
                        place_slots=slots, place_counts=i32([5] * count), place_tokens=i32(range(5 * count)), block_slots=slots,
                        block_index=i32([0] * count), block_ids=slots, copy_src=i32([8]), copy_dst=i32([9]), prompt_rows=asks,
                    )
                )  # fmt: skip
                waits.append(
                    runner.sample(
                        Sample(
                            engine=0, epoch=0, step=1, rows=slots, slots=slots, positions=i32([5] * count), places=places, prompt_rows=asks,
                            prompt_topk=asks,
                        )
                    )
                )  # fmt: skip
                for step in range(5, 9):
                    starts = i32([step] * count)
                    runner.forward(
                        Forward(engine=0, epoch=0, step=step, slots=slots, starts=starts, counts=i32([1] * count), num_decode=count)
                    )
                    waits.append(runner.sample(Sample(engine=0, epoch=0, step=step, rows=slots, slots=slots, positions=starts + 1)))
                    if len(waits) > 1:
                        waits.pop(0)()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            while waits:
                assert len(waits.pop(0)().tokens) == count


def test_steps_through_the_device_queue(make_folder: Make, config_for: Make) -> None:
    """Two in flight on the queue's own threads: what comes back equals steps one after the other."""
    folder = make_folder("llama", torch.bfloat16, **SHAPE)
    found: list[Any] = []
    arrived = threading.Semaphore(0)

    def post(message: Any) -> None:
        found.append(message)
        arrived.release()

    queue = ThreadDeviceQueue(engine=0, epoch=1, post=post)
    runner = queue.load(CudaDevice(), config_for(folder, kv_cache_memory_bytes=64 << 20), lambda phase, fraction: None).result(timeout=200)
    slots = i32(range(3))
    for step in range(1, 21):
        starts = i32([0] * 3) if step == 1 else i32([2 + step] * 3)
        columns: dict[str, Any] = {}
        if step == 1:
            columns = {
                "place_slots": slots, "place_counts": i32([4] * 3), "place_tokens": i32(range(12)), "block_slots": np.repeat(slots, 2),
                "block_index": np.tile(i32([0, 1]), 3), "block_ids": i32(range(6)),
            }  # fmt: skip
        queue.deliver(
            DeviceWork(
                forward=Forward(
                    engine=0, epoch=1, step=step, slots=slots, starts=starts, counts=i32([4 if step == 1 else 1] * 3),
                    num_decode=0 if step == 1 else 3, **columns,
                )
            )
        )  # fmt: skip
        places = [SlotSampling(slot=i, choice=0, prompt_len=4, params=GREEDY) for i in range(3)] if step == 1 else []
        positions = i32([3 + step] * 3)
        queue.deliver(DeviceWork(sample=Sample(engine=0, epoch=1, step=step, rows=slots, slots=slots, positions=positions, places=places)))
        if step >= 2:
            assert arrived.acquire(timeout=60)
    assert arrived.acquire(timeout=60)
    assert not any(isinstance(message, DeviceLost) for message in found), found
    assert [message.step for message in found] == list(range(1, 21))
    jobs = [Job(prompt=i32(range(4 * i, 4 * i + 4)), params=GREEDY, max_tokens=20) for i in range(3)]
    queue.call(lambda: Driver(runner).run(jobs)).result(timeout=60)
    assert [[int(message.tokens[i]) for message in found] for i in range(3)] == [job.tokens for job in jobs]
    queue.close()


def test_memory_is_accounted_for(config_for: Make) -> None:
    runner = CudaDevice().load(config_for(BROOK, gpu_memory_utilization=0.95, kv_cache_memory_bytes=None), lambda phase, fraction: None)
    memory = runner.memory
    assert memory.total == torch.cuda.get_device_properties(0).total_memory
    assert memory.weights + memory.workspace + memory.graphs + memory.kv + memory.slack == memory.total
    assert 0.04 * memory.total < memory.slack < 0.07 * memory.total
    runner.warm_up(lambda phase: None)
    free, _ = torch.cuda.mem_get_info()
    assert free > 0.03 * memory.total
    runner.close()


@pytest.mark.parametrize(
    ("shortest", "longest", "budget", "kind"), [(1, 90, 64, "auto"), (900, 1900, 300, "auto"), (900, 1900, 300, "fp8")]
)
def test_deterministic_answers_do_not_depend_on_neighbours(shortest: int, longest: int, budget: int, kind: str) -> None:
    """Behind the start-up self-test: a request alone and in a crowd, through the whole engine at depth 2; long ones in several segments of keys."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(16, 4000, int(rng.integers(shortest, longest))).tolist() for _ in range(12)]
    params = [SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=12, ignore_eos=True, logprobs=1) for i in range(12)]
    options: dict[str, Any] = {"device": "cuda", "deterministic": True, "max_num_seqs": 8, "max_num_batched_tokens": budget}
    options["kv_cache_dtype"] = kind
    with LLM(str(BROOK), kv_cache_memory_bytes=256 << 20, max_model_len=2048, **options) as llm:
        crowd = [out.outputs[0] for out in llm.generate(prompt_token_ids=prompts, sampling_params=params)]
        for i in (0, 3, 7):
            alone = llm.generate(prompt_token_ids=[prompts[i]], sampling_params=params[i])[0].outputs[0]
            assert alone.token_ids == crowd[i].token_ids
            assert alone.logprobs == crowd[i].logprobs


def test_blocks_go_to_the_host_and_back(folder: Path, on_device: Make) -> None:
    runner = on_device(folder)
    pool = runner._pool
    pool.random_(0, 256)
    before = pool.clone()
    runner.control(Control(engine=0, epoch=1, owner="test", id=1, name="host_pages", data=b"7"))
    here: dict[str, Any] = {"engine": 0, "epoch": 1, "owner": "test", "id": 2}
    runner.move(Move(**here, blocks=i32([1, 4, 2]), pages=i32([6, 0, 3]), out=True))()
    wait = runner.move(Move(**here, blocks=i32([5, 0, 3]), pages=i32([6, 0, 3]), out=False))
    wait()
    assert torch.equal(pool[[5, 0, 3]], before[[1, 4, 2]])
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])
    assert torch.equal(pool[6:], before[6:])


def test_masked_steps_draw_what_a_list_of_allowed_tokens_draws(folder: Path, on_device: Make) -> None:
    """Between replayed steps, greedy and hot, on the kernels, launched one by one and captured."""
    vocab = on_device(folder).facts.vocab_size
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[:vocab:2] = 1
    mask = np.packbits(bits, bitorder="little").view(np.int32)
    prompt = np.arange(3, 20, dtype=np.int32)
    for params, captured in itertools.product((GREEDY, SamplingParams(temperature=1.0, seed=4)), (False, True)):
        listed = msgspec.structs.replace(params, allowed_token_ids=list(range(0, vocab, 2)))
        truth = Job(prompt=prompt, params=listed, max_tokens=6)
        Driver(on_device(folder)).run([truth])
        runner = on_device(folder)
        if captured:
            with torch.inference_mode():
                runner.capture(1)
                runner.capture_masked(1, not params.greedy)
        zero, row = i32([0]), {"engine": 1, "epoch": 1}
        tokens: list[int] = []
        for step in range(1, 7):
            first = step == 1
            starts, counts = i32([0 if first else len(prompt) + step - 2]), i32([len(prompt) if first else 1])
            placed = {
                "place_slots": zero,
                "place_counts": counts,
                "place_tokens": prompt,
                "block_slots": i32([0, 0]),
                "block_index": i32([0, 1]),
            }
            more = {**placed, "block_ids": i32([2, 3])} if first else {}
            runner.forward(Forward(**row, step=step, slots=zero, starts=starts, counts=counts, num_decode=int(not first), **more))
            places = [SlotSampling(slot=0, choice=0, prompt_len=len(prompt), params=params)] if first else []
            drawn = Sample(**row, step=step, rows=zero, slots=zero, positions=starts + counts, places=places, mask=mask, mask_rows=zero)
            tokens.append(int(runner.sample(drawn)().tokens[0]))
        assert tokens == truth.tokens


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["untied", "tied"])
@pytest.mark.parametrize("word", ["int8", "fp8", "int4"])
def test_a_head_that_was_rounded_while_it_was_loaded(family: str, word: str, make_folder: Make, on_device: Make, cpu_runner: Make) -> None:
    folder = make_folder(family, dtype=torch.bfloat16, **SHAPE)
    mine, theirs, wide = some_jobs(9), some_jobs(9), some_jobs(9)
    Driver(on_device(folder, lm_head_quantization=word)).run(mine)
    Driver(cpu_runner(folder, lm_head_quantization=word)).run(theirs)
    Driver(on_device(folder)).run(wide)
    close_enough(mine, theirs, 0.25)  # bfloat16 on both, in another order
    assert any(a.logprobs != b.logprobs for a, b in zip(mine, wide, strict=True))
