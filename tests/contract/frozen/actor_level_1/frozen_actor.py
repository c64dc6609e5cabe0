"""A plugin as somebody wrote it against level 1 of actors. Never edited: it must go on working at the level after.

What it is: an engine's actor that answers an extension with what the device queue said to its control. What it does not know: anything that came
later.
"""

from penstock.core.contract.actors import Seat
from penstock.core.contract.hookspecs import ActorSpec, hookimpl
from penstock.core.protocol.messages import Control, DeviceWork, Extension, WorkDone


class Frozen:
    name = "frozen-actor"
    takes = frozenset({WorkDone})
    gives = frozenset({DeviceWork})

    def __init__(self, context):  # type: ignore[no-untyped-def]
        self.here = {"engine": context.id, "epoch": context.epoch, "owner": self.name}

    def handle(self, message):  # type: ignore[no-untyped-def]
        if isinstance(message, Extension):
            yield DeviceWork(control=Control(id=len(message.data), name="fence", **self.here))
        else:
            yield Extension(kind="frozen.answer", data=f"{message.id}{message.error}".encode())


def seat(context):  # type: ignore[no-untyped-def]
    return Seat(party=Frozen(context), takes_kinds=frozenset({"frozen.ask"}), gives_kinds=frozenset({"frozen.answer"}))


@hookimpl
def register_actors():  # type: ignore[no-untyped-def]
    return [ActorSpec(name="frozen-actor", api_level=1, where="engine", factory=seat)]
