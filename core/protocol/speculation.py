"""Which drafters an engine is to have: the speculation options, read and resolved.

What it is: `--speculative-config` (vLLM's fields), `--speculative-model` and `--num-speculative-tokens` as one `SpeculationConfig`; `resolved` finds the models'
folders, before any process starts, and the method of a model that does not say one. Every error names the option, the field and what may stand there.
What it does not know: which methods plugins bring, what a drafter does, how many drafts a step has.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.protocol.errors import ConfigError, spelled
from penstock.core.protocol.model_files import GGUF, read_object
from penstock.core.protocol.wording import type_words

log = logging.getLogger("penstock.config")

CONFIG, MODEL, TOKENS = "--speculative-config", "--speculative-model", "--num-speculative-tokens"
MOST_TOKENS = 64
"""Drafts behind a token: a step takes so many rows more."""
MOST_METHODS = 8
"""Drafters of one engine: which of them are on is a set of bits."""
MOST_NODES = 63
"""Of a tree of drafts: with its root it fits into 64 bits."""
MOST_CHILDREN = 16
SHIPPED = "brook-"
"""Names of models that come with the package beside the demo model begin so."""


class DraftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One drafter, as the options ask for it."""

    method: str | None = None
    """A word of DrafterSpec.methods: "ngram", "draft_model". None only before `resolved`."""
    model: str | None = None
    """Its model's folder, absolute; None for a method that has none."""
    num_speculative_tokens: int | None = None
    """The most drafts behind a token; None: as many as the drafter makes by itself."""
    prompt_lookup_max: int | None = None
    """The longest run of tokens that is looked for (method "ngram")."""
    prompt_lookup_min: int | None = None
    """The shortest."""
    speculative_token_tree: str | None = None
    """The drafts as a tree, as vLLM writes it: "[(0,), (1,), (0, 0)]" has two tokens for the next place, the likeliest and the second, and one behind the first. None: a chain."""
    quantization: str | None = None
    """How wide weights of its model are quantised while they load: a word of --quantization."""
    options: dict[str, Any] = {}
    """What else a plugin's drafter takes."""


class SpeculationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The drafters of an engine, the first one asked first: a sequence takes the drafts of the first that has any for it."""

    methods: list[DraftConfig]

    @property
    def most(self) -> int | None:
        """The most drafts behind a token that anybody asked for; None: nobody said."""
        said = [one.num_speculative_tokens for one in self.methods if one.num_speculative_tokens is not None]
        return max(said) if said else None


FIELDS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(DraftConfig)}
SPECULATIVE_FIELDS = ", ".join(FIELDS)
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "draft_tensor_parallel_size": ((None, 1), "an engine has one device so far"),
    "tensor_parallel_size": ((None, 1), "an engine has one device so far"),
    "parallel_drafting": ((None, False), "there is no drafter that makes all its drafts at once"),
    "rejection_sample_method": (
        (None, "strict", "standard"),
        "the answer is always exactly what it is without speculation",
    ),
    "posterior_threshold": ((None,), "the answer is always exactly what it is without speculation"),
    "posterior_alpha": ((None,), "the answer is always exactly what it is without speculation"),
    "acceptance_method": ((None, "rejection_sampler"), "the answer is always exactly what it is without speculation"),
    "synthetic_acceptance_rate": ((None,), "the answer is always exactly what it is without speculation"),
    "synthetic_acceptance_rates": ((None,), "the answer is always exactly what it is without speculation"),
    "synthetic_acceptance_length": ((None,), "the answer is always exactly what it is without speculation"),
    "draft_load_config": ((None,), "a drafter's weights are loaded as the model's are"),
    "dspark_draft_topk": ((None,), "there is no such drafter"),
    "revision": ((None,), "nothing is downloaded; name the folder"),
    "code_revision": ((None,), "nothing is downloaded; name the folder"),
}
"""vLLM's fields that are accepted with these values only: why not with others."""
IDLE = {
    "disable_by_batch_size": "how many drafts a step has follows from acceptance and from what steps of that size take",
    "disable_logprobs": "log-probabilities are what they are without speculation",
    "disable_mqa_scorer": "it is about kernels that Penstock does not have",
    "disable_padded_drafter_batch": "it is about kernels that Penstock does not have",
    "enforce_eager": "--enforce-eager is for the drafter as well",
    "max_model_len": "a drafter reaches as far as the model",
    "num_speculative_tokens_per_batch_size": "how many drafts a step has follows from acceptance and from what steps of that size take",
    "enable_adaptive_verification": "how many drafts a step has follows from acceptance and from what steps of that size take",
    "draft_sample_method": "a drafter draws with the noise of the model's own draw",
    "use_heterogeneous_vocab": "a draft model's vocabulary is looked at in any case",
    "attention_backend": "--attention-backend is for the drafter as well",
    "kv_cache_dtype": "--kv-cache-dtype is for the drafter as well",
    "moe_backend": "kernels are the device's choice",
    "use_local_argmax_reduction": "an engine has one device so far",
    "index_share_for_mtp_iteration": "it is about layers that Penstock does not have",
    "disable_eagle_block_drop": "a shared prefix has the drafter's keys and values, too",
    "suffix_decoding_max_tree_depth": "its 'options' bound the method 'suffix'",
    "suffix_decoding_max_cached_requests": "its 'options' bound the method 'suffix'",
    "suffix_decoding_max_spec_factor": "its 'options' bound the method 'suffix'",
    "suffix_decoding_min_token_prob": "its 'options' bound the method 'suffix'",
}
"""vLLM's fields that change nothing here: why."""
NGRAM = ("ngram", "[ngram]")
"""How vLLM spells that method, in "method" and, since it has no model, in "model"."""
MARKS = (("eagle3", "eagle3"), ("eagle", "eagle"), ("medusa", "medusa"), ("nextn", "mtp"), ("mtp", "mtp"))
"""Of a drafter's architectures and model_type, in small letters: what says which method. The first one counts."""


def parsed(config: str | None, model: str | None, tokens: int | None) -> SpeculationConfig | None:
    """The three options as one, names as they are given; None where none of them is. Raises ConfigError."""
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise ConfigError(f"{TOKENS} must be from 1 to {MOST_TOKENS}.", param="num_speculative_tokens")
    if config is None:
        if model is None:
            if tokens is not None:
                raise ConfigError(
                    f'{TOKENS} says how many, but nothing says who drafts: give {MODEL} FOLDER or {CONFIG} \'{{"method": "ngram"}}\' besides.',
                    param="num_speculative_tokens",
                )
            return None
        return SpeculationConfig(methods=[_checked({}, model, tokens, "")])
    raw = json.loads(config)
    several = raw.pop("methods", None)
    if several is None:
        return SpeculationConfig(methods=[_checked(raw, model, tokens, "")])
    if not isinstance(several, list) or not several or not all(isinstance(one, dict) for one in several):
        raise _wrong("methods", "must be a list of objects, one a drafter, the first asked first")
    if raw:
        raise _wrong(next(iter(raw)), 'stands beside "methods": it belongs into the objects of that list')
    if len(several) > MOST_METHODS:
        raise _wrong("methods", f"has {len(several)} drafters; at most {MOST_METHODS} are possible")
    if len(several) > 1 and any(one.get("speculative_token_tree") for one in several):
        raise _wrong("speculative_token_tree", "is for a drafter that is alone: leave it or the others out")
    if model is not None:
        raise ConfigError(
            f'{MODEL} does not say of which of the "methods" in {CONFIG} it is. Give it there as "model".', param="speculative_model"
        )
    return SpeculationConfig(methods=[_checked(one, None, tokens, f"methods[{at}].") for at, one in enumerate(several)])


def _wrong(field: str, what: str) -> ConfigError:
    return ConfigError(f"{CONFIG}: {field!r} {what}.", param="speculative_config")


def _checked(raw: Mapping[str, Any], model: str | None, tokens: int | None, where: str) -> DraftConfig:
    """One drafter's object, with what other options say of it."""
    from penstock.core.protocol.config import nearest

    given: dict[str, Any] = {}
    for name, value in raw.items():
        if name in NEUTRAL:
            fine, why = NEUTRAL[name]
            if value not in fine:
                raise _wrong(where + name, f"cannot be {value!r:.40}: {why}. Leave it out")
        elif name == "suffix_decoding_max_cached_requests" and value == 0:  # that is a promise to somebody
            raise _wrong(where + name, 'is not obeyed here: say "options": {"past_tokens": 0}, which remembers nobody\'s answers')
        elif name in IDLE:
            log.warning("%s: %r has no effect: %s.", CONFIG, where + name, IDLE[name])
        elif name not in FIELDS:
            raise _wrong(where + name, f"is not a known field.{nearest(name, FIELDS)} Known: {', '.join(FIELDS)}")
        elif value is not None:
            try:
                given[name] = msgspec.convert(value, FIELDS[name])
            except msgspec.ValidationError:
                raise _wrong(where + name, f"must be {type_words(FIELDS[name])}, but is {value!r:.80}") from None
    for name, value, flag in (("model", model, MODEL), ("num_speculative_tokens", tokens, TOKENS)):
        if value is not None and given.setdefault(name, value) != value:
            raise ConfigError(f"{flag} {value}: {CONFIG} says {given[name]!r}. Leave one of them out.", param=flag[2:].replace("-", "_"))
    for name, most in (("num_speculative_tokens", MOST_TOKENS), ("prompt_lookup_max", 1 << 20), ("prompt_lookup_min", 1 << 20)):
        if name in given and not 1 <= given[name] <= most:
            raise _wrong(where + name, f"must be from 1 to {most}, but is {given[name]}")
    if given.get("prompt_lookup_min", 1) > given.get("prompt_lookup_max", 1 << 20):
        raise _wrong(
            where + "prompt_lookup_min", f"is {given['prompt_lookup_min']}, more than prompt_lookup_max ({given['prompt_lookup_max']})"
        )
    _spell_ngram(given, where)
    if "speculative_token_tree" in given:
        _tree(given, where)
    for name in ("method", "model"):
        if isinstance(given.get(name), str) and not given[name].strip():
            raise _wrong(where + name, "must not be empty")
    if not given.get("method") and not given.get("model"):
        raise _wrong(where + "method", 'is missing, and no "model" says it: give one of them, such as "ngram"')
    return DraftConfig(**given)


def _spell_ngram(given: dict[str, Any], where: str) -> None:
    """The ways in which vLLM's configurations ask for the method without a model."""
    method, model = given.get("method"), given.get("model")
    if method in NGRAM or (method is None and model in NGRAM):
        given["method"] = method = NGRAM[0]
    if method == NGRAM[0] and model in NGRAM:
        given["model"] = None
    elif method == NGRAM[0] and model:
        why = f"is {model!r:.80}, but the method 'ngram' has no model: it copies what the text said before. Leave it out, or leave the method out if that is a drafter's folder"
        raise _wrong(where + "model", why)
    elif model in NGRAM:
        raise _wrong(
            where + "model", f"is {model!r}, which means the method 'ngram', but 'method' is {method!r:.40}. Leave one of them out"
        )


def tree_of(text: str) -> list[tuple[int, ...]]:
    """The nodes of a tree of drafts, each as the ranks that lead to it, by depth: parents come first. Raises ValueError saying what is wrong."""
    try:
        read = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        read = None
    if not isinstance(read, list | tuple) or not read or not all(isinstance(path, tuple) and path for path in read):
        raise ValueError('must be a list of paths such as "[(0,), (1,), (0, 0)]"')
    paths: list[tuple[int, ...]] = sorted(read, key=lambda path: (len(path), path)) if _ranks(read) else []
    if not paths:
        raise ValueError(f"must have paths of numbers from 0 to {MOST_CHILDREN - 1}: 0 is the likeliest token at a place, 1 the second")
    if len(set(paths)) < len(paths):
        raise ValueError("names a path twice")
    missing = next((path for path in paths if len(path) > 1 and path[:-1] not in paths), None)
    if missing is not None:
        raise ValueError(f"has {missing}, but not {missing[:-1]}, which leads there")
    if len(paths) > MOST_NODES:
        raise ValueError(f"has {len(paths)} paths; at most {MOST_NODES} are possible")
    return paths


def _ranks(read: Any) -> bool:
    return all(type(rank) is int and 0 <= rank < MOST_CHILDREN for path in read for rank in path)


def _tree(given: dict[str, Any], where: str) -> None:
    """As many drafts as nodes; a tree that is a chain is one."""
    try:
        paths = tree_of(given["speculative_token_tree"])
    except ValueError as error:
        raise _wrong(where + "speculative_token_tree", str(error)) from None
    if given.setdefault("num_speculative_tokens", len(paths)) != len(paths):
        raise _wrong(
            where + "speculative_token_tree",
            f"has {len(paths)} paths, but num_speculative_tokens is {given['num_speculative_tokens']}. Leave that out",
        )
    if len(paths[-1]) == len(paths) and not any(paths[-1]):
        del given["speculative_token_tree"]


def resolved(found: SpeculationConfig, shipped: Path) -> SpeculationConfig:
    """With models as absolute folders, and every drafter's method. `shipped` holds the models of the package. Raises ConfigError and CheckpointError."""
    return SpeculationConfig(methods=[_resolved(one, shipped) for one in found.methods])


def _resolved(one: DraftConfig, shipped: Path) -> DraftConfig:
    if one.model is None:
        return one
    folder = Path(one.model).expanduser().absolute()
    if not folder.exists() and one.model.startswith(SHIPPED) and (shipped / one.model / "config.json").is_file():
        folder = shipped / one.model
    if not folder.exists():
        known = ", ".join(sorted(place.parent.name for place in shipped.glob(SHIPPED + "*/config.json")))
        raise ConfigError(
            f"{MODEL} {spelled(one.model)}: there is no such folder. Penstock downloads nothing: give the path of a drafter's folder"
            + (f", or one of those that come with it for the demo model: {known}." if known else "."),
            param="speculative_model",
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{MODEL} {spelled(one.model)}: the folder holds no config.json.", param="speculative_model")
    if folder.is_file():
        _look_at(folder, one)
    method = one.method or (method_of(read_object(folder / "config.json")) if folder.is_dir() else "draft_model")
    return msgspec.structs.replace(one, model=str(folder), method=method)


def _look_at(file: Path, one: DraftConfig) -> None:
    """A model that is a file: GGUF of a draft model. What a plugin's method reads nobody here knows."""
    heads = {method for _, method in MARKS}
    if one.method in heads:
        raise ConfigError(
            f"{MODEL} {spelled(one.model or '')} ('model' in {CONFIG}): a file, but the method {one.method!r} reads a folder with config.json and weights. Give its path.",
            param="speculative_model",
        )
    if one.method in (None, "draft_model") and file.suffix != GGUF:
        raise ConfigError(
            f"{MODEL} {spelled(one.model or '')} ('model' in {CONFIG}): a file, and none whose name ends in {GGUF}. Give the path of a drafter's folder or of a GGUF file.",
            param="speculative_model",
        )


def method_of(config: Mapping[str, Any]) -> str:
    """What a drafter's config.json says that it is; a model like any other is a draft model."""
    said = config.get("speculators_model_type")
    if isinstance(said, str) and said:
        return said
    named = config.get("architectures")
    words = [*(named if isinstance(named, list) else []), config.get("model_type")]
    text = " ".join(word.lower() for word in words if isinstance(word, str))
    return next((method for mark, method in MARKS if mark in text), "draft_model")


def encoded(found: SpeculationConfig) -> str:
    """As the value of --speculative-config that says all of it."""
    return msgspec.json.encode({"methods": [_plain(one) for one in found.methods]}).decode()


def _plain(one: DraftConfig) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(one).items() if value not in (None, {})}
