"""Every message has a giver and a taker, and every link carries what is sent over it."""

from __future__ import annotations

import typing
from typing import Any

from penstock.core.actors.drafters import HostDrafters
from penstock.core.actors.executor import Executor
from penstock.core.actors.kv import KvManager
from penstock.core.actors.masks import Masks
from penstock.core.actors.sampler import Sampler
from penstock.core.actors.scheduler import Scheduler, SchedulerSettings
from penstock.core.actors.text import TextActor
from penstock.core.processes import text_side
from penstock.core.processes.supervisor import Supervisor
from penstock.core.protocol.control import Boot, Extension, Hello, Message, PeerDown, PeerUp
from penstock.core.protocol.messages import (
    Abort,
    Admit,
    CheckGrammar,
    ChildDown,
    ChildUp,
    DeviceWork,
    Drain,
    Drained,
    Encode,
    Encoded,
    EngineDown,
    EngineUp,
    GrammarChecked,
    Heartbeat,
    Park,
    Spending,
    StartupPhase,
    StepTokens,
    Stop,
    Tables,
    Tick,
    Unpark,
    Vitals,
    Vocabulary,
    WorkDone,
    message_types,
    union_of,
)
from penstock.core.runtime.clock import FakeClock
from penstock.core.runtime.device_queue import ThreadDeviceQueue
from penstock.plugins.policies.fcfs import FirstComeFirstServed


def scheduler() -> Scheduler:
    settings = SchedulerSettings(
        engine=0, epoch=1, max_num_seqs=1, max_num_batched_tokens=1, max_model_len=1, block_size=1, num_blocks=1, grammars=True,
        lookahead=1, drafters=("suffix",), hosted=(True,),
    )  # fmt: skip
    return Scheduler(settings, FirstComeFirstServed(), FakeClock())


ACTORS: list[Any] = [scheduler(), KvManager, Executor, Sampler(engine=0, epoch=1, masks=True), Masks, HostDrafters, TextActor, Supervisor]

PORTS_TAKE: dict[str, set[type[Message]]] = {
    "device queue": set(ThreadDeviceQueue.takes),
    "tokenizer worker": {Encode},
    "grammar worker": {CheckGrammar},
    "edges": set(text_side.TO_EDGES),
    "process mains": {Stop, EngineUp, EngineDown, Tables},
    "root's process port and screen": {
        kind for kind in Supervisor.gives if kind.__name__ in ("StartChild", "KillChild", "Notice", "Ready", "Leave")
    },
    "root": {Spending},
    "links": {Hello, Boot, Extension},
    "plugins' actors": {Extension, WorkDone},
}
PORTS_GIVE: dict[str, set[type[Message]]] = {
    "device queue": set(ThreadDeviceQueue.gives),
    "tokenizer worker": {Encoded},
    "grammar worker": {GrammarChecked},
    "clock": {Tick},
    "edges": set(text_side.FROM_EDGES),
    "process mains": {ChildUp, ChildDown, EngineUp, Heartbeat, StartupPhase, Drained, PeerUp, PeerDown},
    "root's process port": {kind for kind in Supervisor.takes if kind.__name__ in ("ChildExited", "Signalled")},
    "root": {Tables},
    "links": {Hello, Boot, Extension},
    "plugins' actors": {Extension, DeviceWork},
}


def test_every_message_has_a_giver_and_a_taker() -> None:
    takers = set().union(*(actor.takes for actor in ACTORS), *PORTS_TAKE.values())
    givers = set().union(*(actor.gives for actor in ACTORS), *PORTS_GIVE.values())
    names = {kind.__name__ for kind in message_types()}
    assert {kind.__name__ for kind in takers} == names
    assert {kind.__name__ for kind in givers} == names


def members(link: Any) -> set[type[Message]]:
    return set(typing.get_args(union_of(link)))


def test_every_link_carries_exactly_what_is_sent_over_it() -> None:
    shared = {Hello, Extension}
    local = {PeerUp, PeerDown}  # made by the host where a link begins or ends
    assert members("edge>text") == text_side.FROM_EDGES - local | shared
    assert members("text>edge") == text_side.TO_EDGES | shared
    assert members("text>engine") == {Admit, Abort, Park, Unpark, Vocabulary} | shared == text_side.TO_ENGINES | shared
    assert members("engine>text") == {EngineUp, StepTokens} | shared == text_side.FROM_ENGINES - local | shared
    assert members("root>child") == {Boot, Drain, Stop, EngineUp, EngineDown, Vitals, StartupPhase, Tables} | shared
    assert members("child>root") == {ChildUp, ChildDown, EngineUp, Heartbeat, StartupPhase, Drained, Spending} | shared


def test_actors_are_pure_modules() -> None:
    """No actor imports a loop, a socket or a thread."""
    import importlib
    import inspect

    for actor in ACTORS:
        module = importlib.import_module(actor.__module__ if isinstance(actor, type) else type(actor).__module__)
        names = {name for name, value in vars(module).items() if inspect.ismodule(value)}
        assert not names & {"trio", "asyncio", "socket", "threading", "torch", "subprocess"}, actor
