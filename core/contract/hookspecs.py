"""The whole plugin contract.

What it is: every hook that Penstock calls, grouped by when. Hooks that register return specs with an `api_level`; the step loop never
calls a hook: it only touches the objects that hooks returned at start-up. A plugin is an object or module whose functions carry
`@hookimpl`, found through the entry-point groups `penstock.root`, `penstock.edge`, `penstock.text`, `penstock.engine` (a plugin loads only
in the processes that it names); built-ins enter through the same groups' door.
What it does not know: any plugin.

Order of start: root: register_commands | engine: register_devices, register_models, register_attention_backends,
register_weight_sources, register_schedule_policies, then choose_* | text: register_tokenizers, register_chat_renderers |
edge: register_transports | while running, at request boundaries: request_finished, engine_ready, engine_lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pluggy

if TYPE_CHECKING:
    import click

    from penstock.core.contract.devices import Device, ModelFacts
    from penstock.core.contract.policy import SchedulePolicy

PROJECT: Final = "penstock"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

API_LEVEL: Final[dict[str, int]] = {
    "devices": 1,
    "models": 1,
    "attention_backends": 1,
    "weight_sources": 1,
    "schedule_policies": 1,
    "tokenizers": 1,
    "chat_renderers": 1,
    "transports": 1,
    "commands": 1,
}
"""The current level of each family. The host accepts the current and the previous one."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what registering hooks return. `name` is what flags and reports call it; names are unique in a family."""

    name: str
    api_level: int
    doc: str = ""


class DeviceSpec(Spec, frozen=True, kw_only=True):
    """`available()` probes the hardware without touching it; `factory()` makes the Device; higher `priority` wins `--device auto`."""

    available: Callable[[], bool]
    factory: Callable[[], Device]
    priority: int = 0


class ModelSpec(Spec, frozen=True, kw_only=True):
    """`architectures`: names in config.json (of several families that serve one, later plugins come before built-ins); `facts(config)` reads
    the shape or raises CheckpointError; `factory` is called by the device plugin (its signature belongs to the device family, see
    plugins/models/api.py)."""

    architectures: list[str]
    facts: Callable[[dict[str, Any]], ModelFacts]
    factory: Callable[..., Any]


class AttentionSpec(Spec, frozen=True, kw_only=True):
    """An attention backend for the named devices; `supports(facts, dtype)` gives None, or the reason why not."""

    devices: list[str]
    supports: Callable[[ModelFacts, str], str | None]
    factory: Callable[..., Any]
    priority: int = 0


class WeightSourceSpec(Spec, frozen=True, kw_only=True):
    """A way to get tensors: `load_formats` (words of `--load-format`) that it serves; of several that serve one word, "auto" too, later plugins
    come before built-ins. `factory(path, load_format, ...)` is called by the device plugin, see plugins/models/api.py: Weights."""

    load_formats: list[str]
    factory: Callable[..., Any]


class SchedulePolicySpec(Spec, frozen=True, kw_only=True):
    """A scheduling order; `factory()` gives key columns for order and victims, see core/contract/policy.py. `options` names fields of Config that
    the factory takes as keyword arguments (none: it is called without any)."""

    factory: Callable[..., SchedulePolicy]
    options: list[str] = msgspec.field(default_factory=list)


class TokenizerSpec(Spec, frozen=True, kw_only=True):
    """`matches(model_path)`; `factory(model_path)` gives an object of core/contract/text.py's Tokenizer protocol."""

    matches: Callable[[str], bool]
    factory: Callable[[str], Any]


class ChatRendererSpec(Spec, frozen=True, kw_only=True):
    """`matches(model_path)`; `factory(model_path, template)` gives an object of core/contract/text.py's ChatRenderer protocol."""

    matches: Callable[[str], bool]
    factory: Callable[[str, str | None], Any]


class TransportSpec(Spec, frozen=True, kw_only=True):
    """Routes for the edge's application; `factory(gateway)` returns Litestar route handlers. Allow-listed by `--transports`."""

    factory: Callable[..., list[Any]]


# ------------------------------------------------------------------ root, at start


@hookspec
def register_commands(group: click.Group) -> None:
    """When: `penstock` starts. Who: plugins of `penstock.root`. Add click commands to `group`; import nothing heavy before one runs."""


# ------------------------------------------------------------------ engine, at start


@hookspec
def register_devices() -> list[DeviceSpec]:  # type: ignore[empty-body]
    """When: an engine starts. Who: `penstock.engine`. Returns hardware targets."""


@hookspec
def register_models() -> list[ModelSpec]:  # type: ignore[empty-body]
    """When: an engine starts. Who: `penstock.engine`. Returns model families by config.json architecture."""


@hookspec
def register_attention_backends() -> list[AttentionSpec]:  # type: ignore[empty-body]
    """When: an engine starts. Who: `penstock.engine`. Returns attention implementations."""


@hookspec
def register_weight_sources() -> list[WeightSourceSpec]:  # type: ignore[empty-body]
    """When: an engine starts. Who: `penstock.engine`. Returns loaders for `--load-format`."""


@hookspec
def register_schedule_policies() -> list[SchedulePolicySpec]:  # type: ignore[empty-body]
    """When: an engine starts. Who: `penstock.engine`. Returns orders for `--scheduling-policy`; the one that is
    chosen is tried on made-up rows before the first request."""


@hookspec(firstresult=True)
def choose_device(candidates: list[str]) -> str | None:
    """When: `--device auto`. Who: `penstock.engine`. Given the names of available devices, best first: one name, or None to pass."""


@hookspec(firstresult=True)
def choose_attention_backend(facts: ModelFacts, device: str, dtype: str, candidates: list[str]) -> str | None:
    """When: no `--attention-backend` was given. Who: `penstock.engine`. One of `candidates` (best first), or None to pass."""


# ------------------------------------------------------------------ text, at start


@hookspec
def register_tokenizers() -> list[TokenizerSpec]:  # type: ignore[empty-body]
    """When: text starts. Who: `penstock.text`. Returns tokenizer families; the first match wins, later plugins before built-ins."""


@hookspec
def register_chat_renderers() -> list[ChatRendererSpec]:  # type: ignore[empty-body]
    """When: text starts. Who: `penstock.text`. Returns what turns messages into a prompt."""


# ------------------------------------------------------------------ edge, at start


@hookspec
def register_transports() -> list[TransportSpec]:  # type: ignore[empty-body]
    """When: an edge starts. Who: `penstock.edge`. Returns streaming faces and other routes."""


# ------------------------------------------------------------------ while running, at request boundaries


class RequestSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request, frozen. Durations in seconds."""

    rid: str
    model: str
    tenant: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    finish_reasons: list[str]
    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float


@hookspec
def request_finished(summary: RequestSummary) -> None:
    """When: a request ended, for whatever reason. Who: `penstock.text`. Must return quickly; exceptions are logged, never felt."""


@hookspec
def engine_ready(engine: int, epoch: int) -> None:
    """When: an engine can take requests. Who: `penstock.text`."""


@hookspec
def engine_lost(engine: int, epoch: int, reason: str) -> None:
    """When: an engine died; its requests wait to be replayed. Who: `penstock.text`."""
