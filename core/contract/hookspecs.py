"""The whole plugin contract.

What it is: every hook that Penstock calls, grouped by when. Hooks that register return specs with an `api_level`; the step loop never
calls a hook: it only touches the objects that hooks returned at start-up. A plugin is an object or module whose functions carry
`@hookimpl`, found through the entry-point groups `penstock.root`, `penstock.edge`, `penstock.text`, `penstock.engine` (a plugin loads only
in the processes that it names); built-ins enter through the same groups' door.
What it does not know: any plugin.

Order of start: root: register_commands | engine: register_devices, register_models, register_attention_backends,
register_weight_sources, register_quantizers, register_drafters, register_schedule_policies, then choose_*, register_grammars, register_actors | text: register_tokenizers,
register_chat_renderers, register_output_formats, register_grammars, register_actors | edge: register_transports | while running, at request boundaries: request_finished, engine_ready, engine_lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import pluggy

if TYPE_CHECKING:
    import click

    from penstock.core.contract.actors import ActorContext, Seat
    from penstock.core.contract.devices import Device, ModelFacts
    from penstock.core.contract.formats import Opening, Spelling, Splitter, Thinking
    from penstock.core.contract.grammars import Grammars
    from penstock.core.contract.policy import SchedulePolicy
    from penstock.core.contract.transports import Transport

PROJECT: Final = "penstock"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

API_LEVEL: Final[dict[str, int]] = {
    "devices": 1,
    "models": 2,
    "attention_backends": 2,
    "weight_sources": 1,
    "quantizers": 1,
    "drafters": 1,
    "schedule_policies": 1,
    "tokenizers": 1,
    "chat_renderers": 1,
    "output_formats": 1,
    "grammars": 1,
    "transports": 2,
    "actors": 1,
    "commands": 1,
}
"""The current level of each family. The host accepts the current and the previous one."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what registering hooks return. All fields are given by name."""

    name: str
    """What options and reports call it: not empty, and unique in its family over all packages, built-in names included."""
    api_level: int
    """The level of the family's contract that this was written for."""
    doc: str = ""
    """One line for people."""


class DeviceSpec(Spec, frozen=True, kw_only=True):
    """A hardware target, chosen by `--device NAME`, or by `--device auto` among those that are available."""

    available: Callable[[], bool]
    """Is the hardware here? Probes it without taking it (no context, no memory)."""
    factory: Callable[[], Device]
    """Called once, for the device that was chosen. Gives a Device."""
    priority: int = 0
    """The highest wins `--device auto`; of equal ones the first by name."""


class ModelSpec(Spec, frozen=True, kw_only=True):
    """A model family, chosen by config.json."""

    architectures: list[str]
    """The entries of config.json's `architectures` (of which the first counts) that it serves."""
    facts: Callable[[dict[str, Any]], ModelFacts]
    """`facts(config)`: the shape. `config` is config.json as a dictionary, `--hf-overrides` merged over it; where it names no dtype and weights
    come from safetensors, "dtype" is the one stored there. Raises CheckpointError for a missing or impossible field, UnsupportedFeature for
    one that would change the answers and is not served; both name it. What it does not understand it must refuse, not ignore."""
    factory: Callable[..., Any]
    """Called by the device, once: `factory(facts=ModelFacts, builder=Builder, attention=Attention, max_len=int)` gives a Model. `max_len` is the
    longest sequence in tokens. It names every tensor that it needs to `builder`, which makes layers of them, then calls `builder.finish()`."""
    priority: int = 0
    """Of the families that serve an architecture the highest is taken; of equal ones later plugins before earlier and built-in ones."""


class AttentionSpec(Spec, frozen=True, kw_only=True):
    """An attention backend, chosen by `--attention-backend NAME`; without that option by a choose_attention_backend hook, or by priority."""

    devices: list[str]
    """Names of the devices that it works on: "cpu", "cuda", or a plugin's."""
    supports: Callable[[ModelFacts, str], str | None]
    """`supports(facts, dtype)`, dtype as "bfloat16", "float16" or "float32": None, or the reason why not, a part of a sentence that the user
    gets to read."""
    factory: Callable[..., Any]
    """Called by the device, once, before weights are loaded: `factory(facts=ModelFacts, dtype=torch.dtype, device=torch.device, block_size=int, max_rows=int,
    deterministic=bool)` gives an Attention; `max_rows` is the largest number of sequences in a decode step. Take `**options` besides: a
    later device may say more."""
    priority: int = 0
    """Of those that support the model the highest is taken (native and triton have 10, torch 0); of equal ones the first by name."""
    kv_dtypes: tuple[str, ...] = ()
    """In what it keeps keys and values beside the model's dtype: "fp8_e4m3", "fp8_e5m2", "int8". Where one of these is wanted, the others are not candidates,
    the factory gets `kv=` with its name, and the Attention has `fix_scales`."""


class WeightSourceSpec(Spec, frozen=True, kw_only=True):
    """A way to get a checkpoint's tensors, chosen by `--load-format WORD`."""

    load_formats: list[str]
    """Words of `--load-format` that it serves. Of several sources that serve one word later plugins come before earlier and built-in ones, so that
    one which names "auto" (what is used when nobody says) stands in for safetensors."""
    factory: Callable[..., Any]
    """Called by the device, once: `factory(path, load_format, dtype=torch.dtype, seed=int, std=float)` gives a Weights; on "cuda" there is
    `device=torch.device` besides. `path` is the model's, absolute: a folder that holds a config.json, or a file that `matches` takes; `load_format` the word that the user gave, `dtype`
    what tensors are to be given in; `seed` (`--seed`) and `std` (config.json's initializer_range) are for sources that make tensors up. Take
    `**options` besides. A folder that lacks the source's files is a CheckpointError."""
    matches: Callable[[str], bool] | None = None
    """`matches(path)`: can it read this? Looks at names. None: every folder, and no file (`--model` may be a .gguf file)."""
    config: Callable[[str], dict[str, Any]] | None = None
    """`config(path)`: what config.json would hold, for a path that matches and has its configuration elsewhere, whatever `--load-format` is. Raises
    CheckpointError and UnsupportedFeature naming the field. None: it is read from config.json."""


class QuantizerSpec(Spec, frozen=True, kw_only=True):
    """A way to read, or to make, quantised weights: chosen by `quantization_config` in config.json, or by `--quantization WORD`."""

    methods: list[str]
    """Values of `quantization_config.quant_method` that it reads. Of several quantizers that read one method later plugins come before earlier and built-in
    ones."""
    schemes: list[str] = []
    """Words of `--quantization` for which it makes quantised weights of wide ones while they load."""
    factory: Callable[..., Any]
    """Called by the device, once, before weights are loaded: `factory(method=str, config=dict, facts=ModelFacts, device=str)` gives a Quantizer
    (plugins/models/api.py). `method` is one of `methods` and `config` its quantization_config, or one of `schemes` and {}, with `head=True` for the output head alone
    (`--lm-head-quantization`; otherwise that stays wide). Raises CheckpointError for a configuration that is wrong,
    UnsupportedFeature naming the field for one that it cannot read rightly. Take `**options` besides: a later device may say more."""


class DrafterSpec(Spec, frozen=True, kw_only=True):
    """Who guesses the next tokens of sequences, chosen by `--speculative-config '{"method": WORD}'`, or by what a drafter's own config.json says."""

    methods: list[str]
    """Words of "method" that it serves."""
    where: Literal["device", "host"]
    """"device": a part of the runner, which asks it behind each draw. "host": an actor of the engine's cell, whose drafts enter by Forward.write_*."""
    factory: Callable[..., Any]
    """Called once, when the model is loaded. On the device by the runner: `factory(config=DraftConfig, ...)` gives a Drafter of plugins/drafters/api.py. On the
    host by the engine: `factory(config=DraftConfig, vocab=int, longest=int)` gives a HostDrafter. Raises ConfigError, CheckpointError or UnsupportedFeature naming
    the field. Take `**options` besides: a later caller may say more."""
    priority: int = 0
    """Of those that serve a method the highest is taken; of equal ones later plugins before earlier and built-in ones."""


class SchedulePolicySpec(Spec, frozen=True, kw_only=True):
    """A scheduling order, chosen by `--scheduling-policy NAME`."""

    factory: Callable[..., SchedulePolicy]
    """Called once with the options named below, as keyword arguments (none: without any). Gives a SchedulePolicy, which is tried on one and on four
    made-up rows before the first request."""
    options: list[str] = msgspec.field(default_factory=list)
    """Names of options (`priority_ageing_s`, as in docs/configuration.md, underscores for hyphens) that the factory takes."""


class TokenizerSpec(Spec, frozen=True, kw_only=True):
    """A tokenizer family. The first spec that matches is taken, later plugins before earlier and built-in ones."""

    matches: Callable[[str], bool]
    """`matches(model_path)`: can it read this folder or file (`--tokenizer`, else the model's)? Looks at names; reads little."""
    factory: Callable[[str], Any]
    """`factory(model_path)` gives a Tokenizer. Raises CheckpointError naming the file."""


class ChatRendererSpec(Spec, frozen=True, kw_only=True):
    """What turns messages into a prompt. The first spec that matches is taken, later plugins before earlier and built-in ones."""

    matches: Callable[[str], bool]
    """`matches(model_path)`: can it render for this folder or file (`--tokenizer`, else the model's)?"""
    factory: Callable[[str, str | None], Any]
    """`factory(model_path, template)` gives a ChatRenderer. `template` is `--chat-template` as it was given (a path or a text), or None. Raises
    CheckpointError or, for a wrong `template`, ConfigError."""


class GrammarSpec(Spec, frozen=True, kw_only=True):
    """What makes answers obey JSON schemas, expressions and grammars. Text, its checking process and the engine each make their own, of the same spec."""

    kinds: list[str]
    """What it can compile: "json" (the source is a JSON schema), "compact_json" (the same, without white space), "regex", "choice" (a JSON list of texts), "grammar" (the client's own language), "layout" (a Part of
    core/contract/layouts.py as JSON: calls of tools, and answers after reasoning). Others are refused."""
    factory: Callable[[list[bytes], list[int]], Grammars]
    """`factory(tokens, special)`, when the first request needs it: `tokens` are the bytes of every id of the model's vocabulary (b"": no token), `special`
    the ids that are no text. Gives a Grammars. Runs on a thread of its own."""
    priority: int = 0
    """Without `--grammar-backend` the highest is used; of equal ones the first by name."""


class FormatSpec(Spec, frozen=True, kw_only=True):
    """How models write reasoning, calls of tools, or both into their answers. `--tool-call-parser NAME` and `--reasoning-parser NAME` choose one; without
    them, of those that match the model's chat template, later plugins' before earlier and built-in ones."""

    role: Literal["tools", "reasoning", "both"]
    """What it takes apart. One of each is used, or one of both."""
    matches: Callable[[str], bool]
    """`matches(template)`: is this the chat template (its source) of a model that writes so?"""
    factory: Callable[[Opening], Splitter]
    """`factory(opening)`, once an answer, gives its Splitter. Only answers of requests with tools get one of role "tools"."""
    aliases: list[str] = msgspec.field(default_factory=list)
    """Other names for the options."""
    marks: list[str] = msgspec.field(default_factory=list)
    """Its marks, so far as they may be special tokens: the splitter sees them, though `skip_special_tokens` leaves them out of texts."""
    short_ids: bool = False
    """The model's template takes calls' ids only of nine letters and digits."""
    spelling: Callable[[str], Spelling] | None = None
    """`spelling(template)`: how the model writes calls, for grammars. None: calls cannot be asked for (tool_choice, strict), only taken apart."""
    thinking: Thinking | None = None
    """How it writes reasoning, for grammars. None: an answer that obeys a grammar has none, and is not taken apart."""


class TransportSpec(Spec, frozen=True, kw_only=True):
    """Routes of the edges' HTTP application, and ports beside it. Only those that `--transports` names are used (`openai`, `anthropic`, `responses`, `tgi`, `tokens`, `websocket`, `grpc`, `playground` when
    nobody says; give those too that are to stay: `--transports openai,mine`)."""

    factory: Callable[..., Transport]
    """`factory(gateway)`, once in each edge, on its event loop: a Transport, whose routes share that Gateway. A route handler's
    `opt={"scope": ...}` names the scope that a key of `--tables` needs for it: "inference" (also without a word), "metrics", "admin", or None for any key."""


class ActorSpec(Spec, frozen=True, kw_only=True):
    """An actor or a port beside the built-in ones of an engine or of text. All that are registered are used."""

    where: str
    """"engine" or "text": the process that has its seat. Elsewhere the spec is passed over, so that one module may register both sides in both."""
    factory: Callable[[ActorContext], Seat]
    """Called once a life of the process, on its loop, when it can serve (in an engine the model is loaded). Gives a Seat."""


# ------------------------------------------------------------------ root, at start


@hookspec
def register_commands(group: click.Group) -> None:
    """When: `penstock` starts, whatever command is given. Who: plugins of `penstock.root`. Add click commands to `group` (a click.Group: `group.add_command`, or
    `@group.command()`); import nothing heavy before one runs. A command raises PenstockError to end with one line on stderr and status 2."""


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
def register_quantizers() -> list[QuantizerSpec]:  # type: ignore[empty-body]
    """When: an engine starts. Who: `penstock.engine`. Returns readers and makers of quantised weights."""


@hookspec
def register_drafters() -> list[DrafterSpec]:  # type: ignore[empty-body]
    """When: an engine starts that is to speculate. Who: `penstock.engine`. Returns what guesses the next tokens, by the words of "method"."""


@hookspec
def register_schedule_policies() -> list[SchedulePolicySpec]:  # type: ignore[empty-body]
    """When: an engine starts. Who: `penstock.engine`. Returns orders for `--scheduling-policy`; the one that is
    chosen is tried on made-up rows before the first request."""


@hookspec(firstresult=True)
def choose_device(candidates: list[str]) -> str | None:
    """When: `--device auto`. Who: `penstock.engine`. Given the names of available devices, best first: one of them, or None to pass. Any other name is a PluginError."""


@hookspec(firstresult=True)
def choose_attention_backend(facts: ModelFacts, device: str, dtype: str, candidates: list[str]) -> str | None:
    """When: no `--attention-backend` was given. Who: `penstock.engine`. `device` is "cpu" or "cuda", `dtype` "bfloat16", "float16" or
    "float32"; `candidates` are the names of the backends that support the model, best first: one of them, or None to pass."""


# ------------------------------------------------------------------ text, at start


@hookspec
def register_tokenizers() -> list[TokenizerSpec]:  # type: ignore[empty-body]
    """When: text starts. Who: `penstock.text`. Returns tokenizer families; the first match wins, later plugins before built-ins."""


@hookspec
def register_chat_renderers() -> list[ChatRendererSpec]:  # type: ignore[empty-body]
    """When: text starts. Who: `penstock.text`. Returns what turns messages into a prompt."""


@hookspec
def register_output_formats() -> list[FormatSpec]:  # type: ignore[empty-body]
    """When: text starts. Who: `penstock.text`. Returns how models write reasoning and calls of tools."""


# ------------------------------------------------------------------ engine and text, at start


@hookspec
def register_grammars() -> list[GrammarSpec]:  # type: ignore[empty-body]
    """When: an engine or text starts. Who: both `penstock.engine` and `penstock.text` (a plugin that is in one alone is used in neither). Returns what makes
    answers obey a grammar."""


@hookspec
def register_actors() -> list[ActorSpec]:  # type: ignore[empty-body]
    """When: an engine or text starts. Who: `penstock.engine`, `penstock.text`. Returns actors and ports for seats beside the built-in ones. They speak to
    each other across processes in Extensions, and to the device queue in DeviceWork (move, control)."""


# ------------------------------------------------------------------ edge, at start


@hookspec
def register_transports() -> list[TransportSpec]:  # type: ignore[empty-body]
    """When: an edge starts. Who: `penstock.edge`. Returns streaming faces and other routes."""


# ------------------------------------------------------------------ while running, at request boundaries


class RequestSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request, frozen. Durations in seconds, 0 for what was never reached."""

    rid: str
    """The id that the client sees (`x-request-id`). The prompts of one HTTP request share it: each is a request of its own here."""
    model: str
    """The served name."""
    tenant: str
    """Whose API key it was, as a digest; "" where the server has none."""
    prompt_tokens: int
    output_tokens: int
    """Of all choices together."""
    cached_tokens: int
    """Prompt tokens that the prefix cache held."""
    finish_reasons: list[str]
    """One a choice: "stop", "length", "tool_calls", "abort" (cancelled) or "error"."""
    queue_s: float
    """From the end of tokenising until an engine first computed something of it."""
    prefill_s: float
    """From there until the first token."""
    decode_s: float
    """From the first token until the last."""
    total_s: float
    """From its arrival at the edge until now."""


@hookspec
def request_finished(summary: RequestSummary) -> None:
    """When: a request that was admitted ended, for whatever reason. Who: `penstock.text`. Runs on the loop that serves all streams, so it must return within
    microseconds: hand the summary to a thread of yours for anything slower. Exceptions are logged and counted, never felt."""


@hookspec
def engine_ready(engine: int, epoch: int) -> None:
    """When: an engine can take requests, also after a restart. Who: `penstock.text`, and as quickly as request_finished. `engine` is its index (0 so
    far), `epoch` counts its lives from 1."""


@hookspec
def engine_lost(engine: int, epoch: int, reason: str) -> None:
    """When: an engine died; its requests wait to be replayed. Who: `penstock.text`, and as quickly as request_finished. `reason` is for
    people."""
