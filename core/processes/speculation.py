"""The drafters of one engine.

What it is: which of the configuration's methods are the device's and which the host's, who all of them are once the runner is loaded, and the actor of those on the
host. A method that no plugin serves is said before anything is loaded.
What it does not know: steps, how many drafts one has, what a drafter does.
"""

from __future__ import annotations

from penstock.core.actors.drafters import HostDrafters, Named
from penstock.core.contract.devices import DeviceCapabilities, Runner
from penstock.core.contract.drafters import drafter_for
from penstock.core.contract.hookspecs import DrafterSpec
from penstock.core.contract.host import PluginHost
from penstock.core.protocol.errors import UnsupportedFeature
from penstock.core.protocol.speculation import DraftConfig, SpeculationConfig


class Drafters:
    """`config` None: what the device has by itself. Raises ConfigError for a method that nobody knows (`plugins` None: all are the device's)."""

    def __init__(self, config: SpeculationConfig | None, plugins: PluginHost | None) -> None:
        self._asked: list[tuple[DraftConfig, DrafterSpec | None]] = []
        for one in [] if config is None else config.methods:
            spec = None if plugins is None else drafter_for(one.method or "", plugins.drafters())
            self._asked.append((one, spec if spec is not None and spec.where == "host" else None))
        self.lookahead = 0
        """The most drafts behind a token; 0: there is no speculation."""
        self.names: tuple[str, ...] = ()
        """Methods, the first asked first; the second of a method has "-2" behind it."""
        self.hosted: tuple[bool, ...] = ()

    def settle(self, device: DeviceCapabilities, runner: Runner) -> None:
        """The runner is loaded. Raises UnsupportedFeature if it cannot verify drafts."""
        self.lookahead = int(getattr(runner, "lookahead", device.lookahead))
        names = ", ".join(one.method or "" for one, _ in self._asked)
        if self._asked and not self.lookahead:
            raise UnsupportedFeature(
                f"--speculative-config: the device {device.name!r} cannot speculate with {names}. Leave the option out.",
                param="speculative_config",
            )
        if not self.lookahead:
            return
        own = list(getattr(runner, "drafters", ()))
        both: list[tuple[str, bool]] = []
        for one, spec in self._asked:
            if spec is not None:
                both.append((one.method or "", True))
            elif own:
                both.append((own.pop(0), False))
        both += [(name, False) for name in own]
        self.names, self.hosted = _apart([name for name, _ in both]), tuple(hosted for _, hosted in both)

    def actor(self, vocab: int, longest: int) -> HostDrafters | None:
        """Those on the host; None: there are none."""
        found = [
            Named(one.method or "", spec.factory(config=one, vocab=vocab, longest=longest)) for one, spec in self._asked if spec is not None
        ]
        return HostDrafters(found, vocab) if found else None


def _apart(methods: list[str]) -> tuple[str, ...]:
    """Metrics and logs know a drafter by its name, so that two of a method need two."""
    return tuple(f"{name}-{methods[: at + 1].count(name)}" if name in methods[:at] else name for at, name in enumerate(methods))
