"""From the speculation options to a runner's drafters.

What it is: the choice among plugins' drafters (core/contract/drafters.py), what each of them is made of, and how many drafts a runner then has to verify. A drafter that
runs on the host is the engine's; of it only its number of drafts counts here.
What it does not know: any drafter, how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from penstock.core.contract.devices import ModelFacts, RunnerConfig
from penstock.core.contract.drafters import drafter_for
from penstock.core.contract.hookspecs import DrafterSpec
from penstock.core.contract.text import Tokenizer
from penstock.core.protocol.errors import CheckpointError, PenstockError, UnsupportedFeature, spelled
from penstock.core.protocol.speculation import DraftConfig
from penstock.plugins import drafters as builtin_drafters
from penstock.plugins import tokenizers as builtin_tokenizers
from penstock.plugins.devices.lane import Lane
from penstock.plugins.devices.loading import Choice, builder_for, choose, load_model
from penstock.plugins.devices.ops import DeviceOps
from penstock.plugins.drafters.api import Drafter, Parts
from penstock.plugins.models.api import Attention, Model
from penstock.plugins.models.builder import Builder

HOST_DRAFTS = 8
"""Of drafters on the host for which no number is asked."""


def drafters_of(config: RunnerConfig) -> Mapping[str, DrafterSpec]:
    """Drafters by name, built-in ones first."""
    return config.plugins.drafters() if config.plugins is not None else {s.name: s for s in builtin_drafters.register_drafters()}


def most_drafts(config: RunnerConfig) -> int:
    """At most so many drafts will stand behind a token, before it is known how many drafters make by themselves."""
    if config.speculation is None:
        return 0
    return max(one.num_speculative_tokens or HOST_DRAFTS for one in config.speculation.methods)


def trees_of(config: RunnerConfig) -> list[str]:
    """Trees of drafts that are asked for."""
    methods = config.speculation.methods if config.speculation is not None else []
    return [one.speculative_token_tree for one in methods if one.speculative_token_tree]


def load_drafters(
    config: RunnerConfig,
    choice: Choice,
    model: Model,
    ops: DeviceOps,
    lane: Lane,
    *,
    max_len: int,
    max_rows: int,
    progress: Callable[[str, float], None],
    graphs: bool = False,
) -> tuple[list[Drafter], int]:
    """(the drafters that run on the device, the most drafts behind a token, whoever makes them). Raises what their factories raise."""
    if config.speculation is None:
        return [], 0
    made: list[Drafter] = []
    _refuse_trees(config, model)
    most = config.speculation.most or 0
    for one in config.speculation.methods:
        spec = drafter_for(one.method or "", drafters_of(config))
        if spec.where != "device":
            most = max(most, one.num_speculative_tokens or HOST_DRAFTS)
            continue
        progress(f"loading the drafter ({one.method})", 0.0)
        parts = _parts(config, choice, model, ops, lane, max_len, max_rows, progress, graphs)
        drafter = _made(spec, one, parts)
        if one.speculative_token_tree is not None and getattr(drafter, "tree", None) is None:
            raise UnsupportedFeature(
                f"--speculative-config: the drafts of the method {one.method!r} are a chain. Leave 'speculative_token_tree' out.",
                param="speculative_config",
            )
        made.append(drafter)
        most = max(most, drafter.max_lookahead)
    return made, most


def _made(spec: DrafterSpec, one: DraftConfig, parts: Parts) -> Drafter:
    """What the factory gives. What is wrong with its folder is said of that folder, which is not the model's."""
    try:
        drafter: Drafter = spec.factory(config=one, parts=parts)
    except PenstockError as error:
        if "--speculative" not in error.message:
            whose = f"{one.method!r}" if one.model is None else f"{one.method!r} in {spelled(one.model)}"
            error.message = f"--speculative-config: the drafter {whose}: {error.message}"
            error.args = (error.message,)
        raise
    return drafter


def _refuse_trees(config: RunnerConfig, model: Model) -> None:
    """Raises UnsupportedFeature for a tree of drafts where something cannot serve one."""
    if not trees_of(config):
        return
    reason = ""
    if not getattr(model.attention, "trees", False):
        reason = f"by the attention backend {model.attention.name!r}"
    elif getattr(model, "program", None) is not None:
        reason = "by a model that brings a program of its own"
    if reason:
        raise UnsupportedFeature(
            f"--speculative-config: a 'speculative_token_tree' is not served {reason}. Leave it out: drafts are a chain then.",
            param="speculative_config",
        )


def _parts(
    config: RunnerConfig,
    choice: Choice,
    model: Model,
    ops: DeviceOps,
    lane: Lane,
    max_len: int,
    max_rows: int,
    progress: Callable[[str, float], None],
    graphs: bool,
) -> Parts:
    device = lane.device
    twice = 2 * max_rows  # a draft model computes two tokens of each row at once

    def other(folder: str, quantization: str | None) -> tuple[RunnerConfig, Choice]:
        # Of the overrides none is meant for it; its dtype is the model's, whose hidden states it may read.
        its = msgspec.structs.replace(
            config, model_path=folder, quantization=quantization, hf_overrides={}, dtype=choice.dtype_name, speculation=None
        )
        return its, choose(its, choice.device, {choice.dtype_name: choice.dtype}, other=choice.dtype_name, attention=choice.attention)

    def load(folder: str, quantization: str | None) -> Model:
        its, chosen = other(folder, quantization)
        found, _ = load_model(its, chosen, ops, device, max_len=max_len, max_rows=twice, progress=progress, finite=True)
        return found

    def tokenizer(path: str) -> Tokenizer:
        # Of the built-in ones: other plugins' belong to the text process, and are not loaded here.
        spec = next((spec for spec in builtin_tokenizers.register_tokenizers() if spec.matches(path)), None)
        if spec is None:
            raise CheckpointError(
                f"--speculative-model: {spelled(path)} has no tokenizer that comes with Penstock (tokenizer.json, GGUF).",
                param="speculative_config",
            )
        made: Tokenizer = spec.factory(path)
        return made

    def attention(facts: ModelFacts) -> Attention:
        made: Attention = choice.attention.factory(
            facts=facts,
            dtype=choice.dtype,
            device=device,
            block_size=config.block_size,
            max_rows=twice,
            deterministic=config.deterministic,
        )
        return made

    def builder(folder: str) -> Builder:
        its = msgspec.structs.replace(config, model_path=folder, hf_overrides={}, load_format="auto")
        return builder_for(its, ops, choice.dtype, device, finite=True)

    return Parts(
        facts=choice.facts,
        model=model,
        ops=ops,
        lane=lane,
        dtype=choice.dtype,
        block_size=config.block_size,
        max_rows=max_rows,
        max_tokens=config.max_num_batched_tokens,
        graphs=graphs,
        max_len=max_len,
        slots=config.max_num_seqs,
        folder=config.model_path,
        load=load,
        tokenizer=tokenizer,
        builder=builder,
        attention=attention,
    )
