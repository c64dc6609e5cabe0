"""The text actor and what it needs around it.

What it is: the assembly: tokenizer and chat renderer from plugins, the worker thread, sampling defaults, traces, the actor, those of plugins beside it,
and their host. The ports to edges, engines and root are the caller's: links in the text process (core/processes/text_process.py), plain calls in one
process (core/processes/local.py).
What it does not know: sockets, which of the two it is in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import trio

from penstock.core.actors.text import TextActor, resolve
from penstock.core.actors.text.actor import FROM_ROOT, TO_ROOT
from penstock.core.actors.text.careful import CarefulTokenizer, TokenizerFailed
from penstock.core.actors.text.formats import Formats
from penstock.core.actors.text.log_line import StatsLine
from penstock.core.actors.text.worker import TokenizerWorker
from penstock.core.contract.actors import Seat
from penstock.core.contract.hookspecs import GrammarSpec, Spec
from penstock.core.contract.host import BUILT_IN, PluginHost
from penstock.core.contract.text import ChatRenderer, Tokenizer
from penstock.core.processes.grammars import GrammarWorker
from penstock.core.processes.plugin_seats import PluginSeats
from penstock.core.processes.templates import FencedRenderer, TemplateSetup
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import EngineUp, Message, PeerDown, PeerUp, Tick
from penstock.core.protocol.errors import CheckpointError, PluginFault, shown
from penstock.core.protocol.messages import (
    Abort,
    Admit,
    Answer,
    Attach,
    Attached,
    Cancel,
    CheckGrammar,
    Counted,
    Detach,
    EdgeStats,
    Encode,
    Encoded,
    Finished,
    GrammarChecked,
    Park,
    Query,
    Rejected,
    StepTokens,
    Submit,
    TextDelta,
    TextReady,
    Unpark,
    Vocabulary,
)
from penstock.core.runtime.clock import Clock, SystemClock
from penstock.core.runtime.seats import House
from penstock.core.runtime.wiring import CallPort, Dropped
from penstock.core.telemetry.traces import NO_TRACES, Traces

S = TypeVar("S", bound=Spec)
TICK_S = 1.0

FROM_EDGES: frozenset[type[Message]] = frozenset({Submit, Cancel, Park, Unpark, Attach, Detach, Query, EdgeStats, PeerUp, PeerDown})
TO_EDGES: frozenset[type[Message]] = frozenset({TextDelta, Attached, Counted, Finished, Rejected, Answer, TextReady})
FROM_ENGINES: frozenset[type[Message]] = frozenset({EngineUp, StepTokens, PeerUp, PeerDown})
TO_ENGINES: frozenset[type[Message]] = frozenset({Admit, Abort, Park, Unpark, Vocabulary})

Deliver = Callable[[Message, int | None], None]


def first_match(specs: Mapping[str, S], model_path: str, what: str) -> S:
    """The spec that takes this model; later plugins are asked before built-ins. Raises CheckpointError."""
    for spec in reversed(list(specs.values())):
        if spec.matches(model_path):  # type: ignore[attr-defined]
            return spec
    raise CheckpointError(f"No {what} plugin can read {model_path}. Give --tokenizer a folder with a tokenizer.json.", param="tokenizer")


class WithDefaults:
    """A chat renderer with --default-chat-template-kwargs under what a request gives."""

    def __init__(self, renderer: ChatRenderer, defaults: dict[str, Any]) -> None:
        self._renderer = renderer
        self._defaults = defaults

    def render(self, messages: list[dict[str, Any]], *, kwargs: dict[str, Any], **how: Any) -> str:
        return self._renderer.render(messages, kwargs={**self._defaults, **kwargs}, **how)

    def __getattr__(self, name: str) -> Any:  # what a renderer has besides
        found = getattr(self._renderer, name)
        return (lambda template: WithDefaults(found(template), self._defaults)) if name == "with_template" else found


class TextSide:
    """Construct (loads the tokenizer: blocks), then `await nursery.start(side.run)`, then `post`. `to_root` None: there is no root here."""

    def __init__(
        self,
        config: Config,
        plugins: PluginHost,
        *,
        to_edges: Deliver,
        to_engines: Deliver,
        to_root: Deliver | None,
        shard: int = 0,
        epoch: int = 1,
        traces: Traces = NO_TRACES,
        clock: Clock | None = None,
        log: Any = None,
        inline: bool = True,
    ) -> None:
        self._clock: Clock = clock or SystemClock()
        self._house: House | None = None
        model = config.model or ""
        source = config.tokenizer or model
        reads = first_match(plugins.tokenizers(), source, "tokenizer")
        tokenizer = CarefulTokenizer(reads.factory(source), plugins.who("tokenizers", reads.name))
        spec = first_match(plugins.chat_renderers(), source, "chat renderer")
        renderer = spec.factory(source, config.chat_template)
        sources = getattr(renderer, "templates", {})
        if not isinstance(sources, Mapping) or not all(isinstance(text, str) for text in sources.values()):
            wrong = f"gave a renderer whose 'templates' are {shown(sources)}: they must be texts by their names"
            raise plugins.blame("chat_renderers", spec.name, "factory", wrong)
        self._fenced: FencedRenderer | None = None
        if config.trust_request_chat_template and hasattr(renderer, "with_template"):
            setup = TemplateSetup(list(plugins.extra), config.skip_broken_plugins, spec.name, source, config.chat_template)
            renderer = self._fenced = FencedRenderer(renderer, setup)
        if config.default_chat_template_kwargs:
            renderer = WithDefaults(renderer, json.loads(config.default_chat_template_kwargs))
        self.tokenizer: Tokenizer = tokenizer
        self.renderer: ChatRenderer = renderer
        template = "\n".join(getattr(renderer, "templates", {}).values())
        formats = Formats.choose(plugins.output_formats(), template, config)
        self.traces = traces
        grammars = plugins.grammars(config.grammar_backend)
        try:
            self.actor = TextActor(
                config,
                tokenizer,
                names=config.served_model_name or [model],
                model_path=model,
                defaults=resolve.generation_defaults(config, model),
                clock=self._clock,
                traces=traces,
                hooks=plugins.hook,
                log=log,
                shard=shard,
                root=to_root is not None,
                grammars="" if grammars is None else grammars.name,
                formats=formats,
            )
        except TokenizerFailed as error:  # its bytes are asked for every token
            raise PluginFault(f"{plugins.who('tokenizers', reads.name)} is broken: {error}.") from error
        if grammars is not None and plugins.package_of("grammars", grammars.name) != BUILT_IN:
            _try_grammars(grammars, self.actor.vocabulary())
        self._grammars: GrammarWorker | None = None
        self._extra, self._backend = plugins.extra, config.grammar_backend
        stats = log is not None and config.log_stats
        self._stats = StatsLine(self.actor.metrics, lambda: self.actor.admission.requests, log) if stats else None
        ports = [
            CallPort("edges", to_edges, takes=TO_EDGES, gives=FROM_EDGES),
            CallPort("engines", to_engines, takes=TO_ENGINES, gives=FROM_ENGINES),
            CallPort("tokenizer", self._to_worker, takes={Encode}, gives={Encoded}),
            CallPort("grammars", self._to_grammars, takes={CheckGrammar}, gives={GrammarChecked}),
            CallPort("clock", _nowhere, gives={Tick}),
        ]
        if to_root is not None:
            ports.append(CallPort("root", to_root, takes=TO_ROOT, gives=FROM_ROOT))
        mine = PluginSeats(plugins, self._say_soon, config=config, id=shard, epoch=epoch, clock=self._clock)
        seats = [*(Seat(party=party) for party in (self.actor, *ports)), *mine.seats]
        self._house = House(seats, link="engines", inline=inline, blame=mine.blame)
        self.host = self._house.host
        self._worker = TokenizerWorker(tokenizer, renderer, self.host.post_soon, clock=self._clock)
        self._taken = 0

    def _say_soon(self, party: str, message: Message) -> None:
        if self._house is not None:
            self._house.say_soon(party, message)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until `close`, or raises what the actor could not survive."""
        house = self._house
        assert house is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            await house.run(task_status)
            nursery.cancel_scope.cancel()

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            now = self._clock.now_ns()
            self.host.post(Tick(now_ns=now))
            if self._stats is not None:
                self._stats.tick(now)

    def _to_worker(self, message: Message, index: int | None) -> None:
        assert isinstance(message, Encode)
        self._worker.submit(message)

    def _to_grammars(self, message: Message, index: int | None) -> None:
        assert isinstance(message, CheckGrammar)
        if self._grammars is None:  # the first one
            vocabulary = self.actor.vocabulary()
            self._grammars = GrammarWorker(
                self.tokenizer, vocabulary, lambda checked: self.host.post_soon(checked), extra=self._extra, backend=self._backend
            )
        self._grammars.submit(message)

    def post(self, messages: Iterable[Message]) -> None:
        """On the trio thread."""
        batch = tuple(messages)
        self._taken += len(batch)
        self.host.post(*batch)

    @property
    def progress(self) -> tuple[int, int]:
        """(messages from outside, open requests): what a heartbeat tells."""
        return self._taken, len(self.actor.ledger.requests)

    def close(self) -> None:
        if self._house is not None:
            self._house.close()
        if self._fenced is not None:
            self._fenced.close()
        self._worker.close()
        if self._grammars is not None:
            self._grammars.close()
        self.traces.shutdown()


def _try_grammars(spec: GrammarSpec, vocabulary: Vocabulary) -> None:
    """A stranger's factory is called once at start, so that one that is broken is known before the first request. Raises PluginFault."""
    ends = np.cumsum(vocabulary.counts).tolist()
    tokens = [vocabulary.data[end - count : end] for end, count in zip(ends, vocabulary.counts.tolist(), strict=True)]
    spec.factory(tokens, vocabulary.special.tolist())


def no_engine(lost: Dropped, kind: str, index: int | None) -> None:
    """Note an extension to engine `index`, or to all of them where it is None, that nobody was there for."""
    where = "any engine" if index is None else f"engine {index}"
    lost.note((kind, index), "an extension of the kind %.100r to %s is dropped: none is connected", kind, where)


def _nowhere(message: Message, index: int | None) -> None:
    raise AssertionError("nothing is sent to the clock")
