"""One engine: a device, and the actors that keep it busy.

What it is: the assembly. It picks the device plugin, loads the runner on the device's own thread, builds scheduler, KV manager, executor and
sampler for what the runner turned out to be, seats them beside those of plugins, and hosts them as a cell or as tasks (`--wiring`). Messages go
in by `post`, come out by the `output` callback; the device's results enter on the trio thread.
What it does not know: sockets, processes, text. core/processes/kernel.py puts it into a process or beside text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Protocol

import trio

from penstock.core.actors.executor import Executor
from penstock.core.actors.kv import KvManager
from penstock.core.actors.masks import Masks
from penstock.core.actors.sampler import Sampler
from penstock.core.actors.scheduler import Scheduler, SchedulerSettings
from penstock.core.contract.actors import Seat
from penstock.core.contract.devices import Device, DeviceCapabilities, Runner, RunnerConfig, prompt_logprobs_weight
from penstock.core.contract.hookspecs import GrammarSpec, SchedulePolicySpec
from penstock.core.contract.host import PluginHost
from penstock.core.contract.policy import CheckedPolicy, SchedulePolicy, probe
from penstock.core.processes.plugin_seats import PluginSeats
from penstock.core.processes.speculation import Drafters
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import Drain, Drained, EngineFacts, Message, PeerDown
from penstock.core.protocol.errors import ConfigError, EngineFailure
from penstock.core.protocol.messages import Abort, Admit, DeviceLost, Park, Plan, StepTokens, Unpark, Vocabulary
from penstock.core.protocol.quality import quality_of
from penstock.core.protocol.speculation import parsed
from penstock.core.runtime.clock import Clock, SystemClock
from penstock.core.runtime.device_queue import ThreadDeviceQueue
from penstock.core.runtime.hosts import FusedHost, TaskHost
from penstock.core.runtime.seats import House
from penstock.core.runtime.wiring import CallPort, Port

DTYPES = {"half": "float16", "float": "float32"}


class DeviceQueue(Port, Protocol):
    """A port for DeviceWork that can be closed."""

    def close(self) -> None: ...


def runner_config(config: Config, plugins: PluginHost | None = None) -> RunnerConfig:
    """What a device needs of the configuration."""
    return RunnerConfig(
        model_path=config.model or "",
        dtype=DTYPES.get(config.dtype, config.dtype),
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        num_gpu_blocks_override=config.num_gpu_blocks_override,
        gpu_memory_utilization=config.gpu_memory_utilization,
        load_format=config.load_format,
        deterministic=config.deterministic,
        enforce_eager=config.enforce_eager,
        attention_backend=config.attention_backend,
        seed=config.seed,
        threads=config.threads,
        max_logprobs=config.max_logprobs,
        kv_cache_dtype="fp8_e4m3" if config.kv_cache_dtype == "fp8" else config.kv_cache_dtype,
        quantization=config.quantization,
        lm_head_quantization=config.lm_head_quantization,
        hf_overrides=json.loads(config.hf_overrides) if config.hf_overrides else {},
        speculation=parsed(config.speculative_config, config.speculative_model, config.num_speculative_tokens),
        plugins=plugins,
    )


def facts_of(config: Config, device: DeviceCapabilities, runner: Runner, drafters: Drafters, grammars: GrammarSpec | None) -> EngineFacts:
    memory = runner.memory
    kv_dtype = getattr(runner, "kv_dtype", runner.dtype)
    return EngineFacts(
        model=config.served_model_name[0] if config.served_model_name else (config.model or runner.facts.architecture),
        architecture=runner.facts.architecture,
        dtype=runner.dtype,
        device=device.name,
        attention=runner.attention,
        vocab_size=runner.facts.vocab_size,
        max_model_len=runner.max_model_len,
        block_size=config.block_size,
        num_blocks=runner.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        deterministic=config.deterministic,
        fingerprint=runner.fingerprint,
        kv_layout=runner.kv_layout,
        weights_bytes=memory.weights,
        workspace_bytes=memory.workspace + memory.graphs,
        kv_bytes=memory.kv,
        slack_bytes=memory.slack,
        enable_prefix_caching=config.enable_prefix_caching,
        bounded_steps=device.bounded_steps,
        grammars="" if grammars is None else grammars.name,
        beams=device.writes,
        kv_dtype=kv_dtype,
        quality=quality_of(config, "" if kv_dtype == runner.dtype else kv_dtype),
        drafters=list(drafters.names),
        lookahead=drafters.lookahead,
    )


PARKS_S = 0.5
"""So often an engine looks whether somebody has been parked for too long."""


class Engine:
    """`await start(nursery)` once, then `post`. `output` gets StepTokens, Drained and Extensions for text on the trio thread. A failure of an
    actor or of the device ends the nursery with the error (EngineFailure for the device)."""

    def __init__(
        self,
        config: Config,
        *,
        output: Callable[[Message], None],
        engine: int = 0,
        epoch: int = 1,
        device: Device | None = None,
        policy: SchedulePolicy | None = None,
        plugins: PluginHost | None = None,
        progress: Callable[[str, float], None] | None = None,
        clock: Clock | None = None,
        queue: Callable[..., DeviceQueue] | None = None,
    ) -> None:
        if plugins is None and (device is None or policy is None):
            plugins = PluginHost("engine", skip_broken=config.skip_broken_plugins).load()
        self.config = config
        self.engine = engine
        self.epoch = epoch
        self._plugins = plugins
        self._device = device
        self._policy = policy
        self._output = output
        self._progress = progress or (lambda phase, fraction: None)
        self._clock: Clock = clock or SystemClock()
        self._make_queue = queue
        self._queue: DeviceQueue | None = None
        self._house: House | None = None
        self.host: FusedHost | TaskHost | None = None
        self.facts: EngineFacts | None = None
        self._scheduler: Scheduler | None = None

    # --- life

    async def start(self, nursery: trio.Nursery) -> EngineFacts:
        """Load and wire. Raises PenstockError for what the user can mend."""
        device, policy = self._choose()
        config = runner_config(self.config, self._plugins)
        drafters = Drafters(config.speculation, self._plugins)
        if self._make_queue is None:
            runner = await self._load(device, config)
        else:  # tests: a queue without a thread
            runner = device.load(config, self._progress)
            self._queue = self._make_queue(runner, engine=self.engine, epoch=self.epoch, post=self._device_says)
        self._check_kv_dtype(device.capabilities, config.kv_cache_dtype)
        drafters.settle(device.capabilities, runner)
        grammars = self._grammars(device.capabilities)
        settings = SchedulerSettings(
            engine=self.engine,
            epoch=self.epoch,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            mixed_prefill_tokens=self.config.mixed_prefill_tokens or 0,
            itl_target_ns=self._itl_target_ns(device.capabilities),
            prefill_knee=device.capabilities.mixed_prefill_tokens,
            forecasts=self.config.admission_forecast,
            prompt_logprobs_weight=prompt_logprobs_weight(runner.facts, device.capabilities),
            max_model_len=runner.max_model_len,
            block_size=self.config.block_size,
            num_blocks=runner.num_blocks,
            depth=device.capabilities.depth,
            enable_chunked_prefill=self.config.enable_chunked_prefill,
            enable_prefix_caching=self.config.enable_prefix_caching,
            vocab=runner.facts.vocab_size,
            clones=device.capabilities.clones,
            grammars=grammars is not None,
            beams=device.capabilities.writes,
            lookahead=drafters.lookahead,
            widths=tuple(getattr(runner, "widths", ())),
            drafters=drafters.names,
            hosted=drafters.hosted,
            masks_ahead=bool(getattr(runner, "masks_ahead", False)),
            loose=bool(getattr(runner, "loose", False)),
            adjusts_ahead=bool(getattr(runner, "adjusts_ahead", True)),
            reads=tuple(getattr(runner, "reads", ())),
            park_kv_s=self.config.park_kv_s,
        )
        assert self._queue is not None
        self._scheduler = Scheduler(settings, policy, self._clock)
        facts = facts_of(self.config, device.capabilities, runner, drafters, grammars)
        caching = self.config.enable_prefix_caching
        parties = (
            self._scheduler,
            KvManager(runner.num_blocks, self.config.block_size, enable_prefix_caching=caching),
            Executor(engine=self.engine, epoch=self.epoch),
            Sampler(engine=self.engine, epoch=self.epoch, masks=grammars is not None),
            *self._ports(grammars is not None),
        )
        hosts = drafters.actor(facts.vocab_size, facts.max_model_len)
        masks = []
        if grammars is not None:  # with a queue that has no thread, in tests, nothing else has one
            assert self._plugins is not None
            blame = functools.partial(self._plugins.blame, "grammars", grammars.name)
            party = Masks(grammars.factory, vocab=facts.vocab_size, blame=blame)
            masks.append(Seat(party=party, host="thread" if self._make_queue is None else "cell"))
        mine = self._plugin_seats(facts)
        seats = [
            *(Seat(party=party) for party in (*parties, *([hosts] if hosts is not None else []))),
            *masks,
            Seat(party=self._queue, host="thread"),
            *mine.seats,
        ]
        self._house = House(seats, link="text", wiring=self.config.wiring, blame=mine.blame)
        self.host = self._house.host
        await nursery.start(self._house.run)
        nursery.start_soon(self._watch_parks)
        self.facts = facts
        return self.facts

    def _plugin_seats(self, facts: EngineFacts) -> PluginSeats:
        def say(party: str, message: Message) -> None:
            if self._house is not None:
                self._house.say_soon(party, message)

        return PluginSeats(self._plugins, say, config=self.config, id=self.engine, epoch=self.epoch, clock=self._clock, facts=facts)

    def _choose(self) -> tuple[Device, SchedulePolicy]:
        device, policy = self._device, self._policy
        if device is None:
            assert self._plugins is not None
            device = self._plugins.choose_device(self.config.device).factory()
        if policy is None:
            assert self._plugins is not None
            self._plugins.schedule_policies()
            spec = self._plugins.pick("schedule_policies", self.config.scheduling_policy, "scheduling-policy")
            assert isinstance(spec, SchedulePolicySpec)
            made = spec.factory(**{name: getattr(self.config, name) for name in spec.options})
            policy = CheckedPolicy(made, functools.partial(self._plugins.blame, "schedule_policies", spec.name))
            probe(policy)
        return device, policy

    def _check_kv_dtype(self, device: DeviceCapabilities, wanted: str) -> None:
        """A device that has never heard of the option must not make it mean nothing."""
        if wanted not in ("auto", *device.dtypes, *device.kv_dtypes):
            raise ConfigError(
                f"--kv-cache-dtype {self.config.kv_cache_dtype}: the device {device.name} keeps keys and values as it computes them. Leave the option out.",
                param="kv_cache_dtype",
            )

    def _itl_target_ns(self, capabilities: DeviceCapabilities) -> int | None:
        """As in SchedulerSettings. Who bounds prompts by a number has said what they want; and a device without advice is one whose steps take longer with every
        token, so that there is nothing to gain by default."""
        config = self.config
        if config.itl_target_ms is not None:
            return round(config.itl_target_ms * 1e6) or None
        learned = config.enable_chunked_prefill and config.mixed_prefill_tokens is None and capabilities.mixed_prefill_tokens > 0
        return 0 if learned else None

    def _grammars(self, device: DeviceCapabilities) -> GrammarSpec | None:
        """Who makes masks, if the device takes them."""
        return self._plugins.grammars(self.config.grammar_backend) if self._plugins is not None and device.masks else None

    def _ports(self, grammars: bool) -> tuple[Port, ...]:
        more: set[type[Message]] = {Vocabulary} if grammars else set()
        return (
            CallPort("text", self._emit, takes={StepTokens}, gives={Admit, Abort, Park, Unpark, PeerDown, *more}),
            CallPort("root", self._emit, takes={Drained}, gives={Drain, Plan}),
        )

    async def _load(self, device: Device, config: RunnerConfig) -> Runner:
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        queue = ThreadDeviceQueue(
            engine=self.engine, epoch=self.epoch, post=lambda message: token.run_sync_soon(self._device_says, message)
        )
        self._queue = queue
        future = queue.load(device, config, lambda phase, fraction: token.run_sync_soon(self._progress, phase, fraction))
        future.add_done_callback(lambda _: token.run_sync_soon(done.set))
        await done.wait()
        return future.result()

    def close(self) -> None:
        """End the host and the device's thread (waits for the step that runs)."""
        if self._house is not None:
            self._house.close()
        elif self._queue is not None:  # it never came to serving
            self._queue.close()

    # --- messages

    def post(self, *messages: Message) -> None:
        """Admit, Abort, Park, Unpark, PeerDown, Drain; on the trio thread, after `start`."""
        assert self.host is not None
        self.host.post(*messages)

    async def room(self) -> None:
        assert self.host is not None
        await self.host.room()

    async def _watch_parks(self) -> None:
        """Have it planned when somebody who is parked has to give memory up, for where nothing runs nothing is planned. Until the nursery ends."""
        assert self._scheduler is not None
        assert self.host is not None
        while True:
            await trio.sleep(PARKS_S)
            until = self._scheduler.parks_until_ns
            if until is not None and until <= self._clock.now_ns() and not self.host.closed:
                self.host.post(Plan())

    def _emit(self, message: Message, index: int | None) -> None:
        self._output(message)

    def _device_says(self, message: Message) -> None:
        if self.host is None or self.host.closed:
            return
        self.host.post(message)
        if type(message) is DeviceLost:
            self.host.fail(EngineFailure(f"The device failed at step {message.step}: {message.error}"))

    @property
    def progress(self) -> tuple[int, int]:
        """(steps done, sequences and steps that should move it): what a heartbeat tells."""
        return (0, 0) if self._scheduler is None else self._scheduler.progress
