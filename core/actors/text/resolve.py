"""From what a client asked to what an engine is told.

What it is: pure arithmetic and checks: the model's sampling defaults, limits, context and KV pool, prompt truncation, and the cache key's
tenant salt. Each refusal names the field and holds the numbers.
What it does not know: tokenizers, queues, actors.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from penstock.core.actors.text.stops import MAX_STOP_CHARS
from penstock.core.protocol.columns import I32, Column, i32
from penstock.core.protocol.config import Config
from penstock.core.protocol.control import EngineFacts
from penstock.core.protocol.errors import CheckpointError, ContextLengthExceeded, InvalidRequest, ModelNotFound, UnsupportedFeature
from penstock.core.protocol.generation import overridden, override_of, settings, unused
from penstock.core.protocol.hashing import CacheKey
from penstock.core.protocol.messages import Submit
from penstock.core.protocol.model_files import optional_object, read_object
from penstock.core.protocol.sampling import SamplingParams, check_tokens, not_a_token
from penstock.core.protocol.wording import FEWER_ANSWERS, GRAMMAR_FAILED, NOTHING_ALLOWED

log = logging.getLogger("penstock.models")

MODELS = "This model's"
"""Whose context it is, where a tenant has none of its own."""


def generation_defaults(config: Config, model_path: str) -> dict[str, Any]:
    """Sampling defaults from generation_config.json, as --generation-config says ("auto": the model's; "vllm", "openai": none; a folder), with
    --override-generation-config over them.

    Raises CheckpointError if the file cannot be read or holds impossible values.
    """
    raw, path = _generation_config(config, model_path)
    if ignored := unused(raw):
        log.warning("%s: these are not obeyed: %s. Requests may say what they want instead.", path, ", ".join(ignored))
    override = override_of(config.override_generation_config) if config.override_generation_config is not None else {}
    try:
        settings(raw)
        return settings(overridden(raw, override))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _generation_config(config: Config, model_path: str) -> tuple[dict[str, Any], Path]:
    own = config.generation_config in ("auto", "model")
    folder = Path(model_path if own else config.generation_config)
    path = folder if not own and folder.suffix == ".json" and not folder.is_dir() else folder / "generation_config.json"
    if config.generation_config in ("vllm", "openai"):
        return {}, path
    try:
        return optional_object(path) if own else read_object(path), path
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist (--generation-config).", param="generation_config") from None


def check_submit(submit: Submit, names: Sequence[str]) -> None:
    """Raises ModelNotFound or InvalidRequest."""
    if submit.model and submit.model not in names:
        raise ModelNotFound(f"The model {submit.model[:200]!r} does not exist here. Known: {', '.join(names)}.", param="model")
    if submit.kind == "chat":
        if not submit.messages:
            raise InvalidRequest("messages is required.", param="messages")
    elif (submit.prompt is None) == (submit.prompt_ids is None):
        raise InvalidRequest("Give exactly one of a text prompt and token ids.", param="prompt")
    if submit.sampling.stop and not submit.detokenize:
        field = submit.names.get("stop", "stop")
        raise UnsupportedFeature(f"{field} needs the answer's text, and none is made here. Use stop_token_ids.", param=field)
    if submit.truncate_prompt_tokens is not None and submit.truncate_prompt_tokens != -1 and submit.truncate_prompt_tokens < 1:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be at least 1, or -1 for what fits, but is {submit.truncate_prompt_tokens}.",
            param="truncate_prompt_tokens",
        )


def prompt_name(submit: Submit) -> str:
    """What the client calls its prompt."""
    return submit.prompt_name or ("messages" if submit.kind == "chat" else "prompt")


def check_ids(ids: Column, vocab_size: int, param: str) -> None:
    """Token ids that a client sent as its field `param`."""
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        index = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise InvalidRequest(not_a_token(f"{param}[{index}]", int(ids[index]), vocab_size), param=f"{param}[{index}]")


def check_prompt(ids: Column, vocab_size: int, spelling: Callable[[int], str], param: str) -> None:
    """What the tokenizer made of the client's text: it may know tokens (added ones, say) for which the model has no row.
    `spelling(id)` is the token's text. Raises InvalidRequest."""
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        token = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise InvalidRequest(
            f"{param} spells the token {spelling(token)[:80]!r} (id {token}) of the tokenizer, which the model does not have:"
            f" it has tokens 0 to {vocab_size - 1}. Leave it out.",
            param=param,
        )


def drawable(ends: Iterable[int], vocab_size: int) -> tuple[I32, list[int]]:
    """End tokens as files and tokenizers name them: (those that the model can draw, the others)."""
    known = list(dict.fromkeys(ends))
    return i32([token for token in known if 0 <= token < vocab_size]), [token for token in known if not 0 <= token < vocab_size]


def check_words(sequences: list[list[int]], vocab_size: int) -> None:
    """bad_words as the tokenizer spells them. Raises InvalidRequest for one that names a token the model does not have."""
    for sequence in sequences:
        for token in sequence:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"bad_words names the tokenizer's token {token}, which the model does not have (it has tokens 0 to {vocab_size - 1}):"
                    f" it is never drawn. Leave that word out.",
                    param="bad_words",
                )


def nothing_obeys(said: str, field: str, params: SamplingParams) -> InvalidRequest | None:
    """The error of a request with the grammar `field` whose engine `said` that nothing could be drawn. None: it is not the request's own doing."""
    if said.startswith(FEWER_ANSWERS):
        found = said.removeprefix(FEWER_ANSWERS)
        return InvalidRequest(f"n is {params.n}, but the search found only {found} answers that obey {field}. Lower n.", param="n")
    if said.startswith(GRAMMAR_FAILED):
        return InvalidRequest(f"{field} is too much to be followed further. {said.removeprefix(GRAMMAR_FAILED)}", param=field)
    narrowing = {
        "allowed_token_ids": params.allowed_token_ids is not None,
        "bad_words": params.bad_words_token_ids,
        "logit_bias": params.logit_bias,
        "stop_token_ids": params.stop_token_ids,
    }
    blamed = [name for name, given in narrowing.items() if given]
    if said != NOTHING_ALLOWED or not blamed:
        return None
    return InvalidRequest(f"There is no token that both {field} and {' and '.join(blamed)} allow here.", param=blamed[0])


def nothing_left(params: SamplingParams, eos: Column, vocab_size: int, history: Column, outputs: int) -> list[str]:
    """The settings that together leave no token to draw after `history` (prompt and outputs), of which `outputs` were drawn; [] if some
    token is left. The engine's masks are these and no others (see kernels' samplers), so this is the reason for a draw of nothing."""
    if params.allowed_token_ids is None and not params.bad_words_token_ids and not params.min_tokens:
        return []
    left = np.zeros(vocab_size, bool)
    left[slice(None) if params.allowed_token_ids is None else params.allowed_token_ids] = True
    blamed = [] if params.allowed_token_ids is None else ["allowed_token_ids"]
    last = [word[-1] for word in params.bad_words_token_ids if word and history[len(history) - len(word) + 1 :].tolist() == word[:-1]]
    if left[last].any():
        left[last] = False
        blamed.append("bad_words")
    if outputs < params.min_tokens:
        ends = [*([] if params.ignore_eos else eos.tolist()), *params.stop_token_ids]
        if left[ends].any():
            left[ends] = False
            blamed.append("min_tokens")
    return [] if left.any() else blamed


def nothing_to_draw(blamed: list[str], outputs: int) -> InvalidRequest:
    """The error of settings that `nothing_left` blames."""
    names = " and ".join(blamed)
    when = f" after {outputs} tokens of the answer" if outputs else ""
    return InvalidRequest(f"{names} leave no token that could be drawn{when}. Allow more tokens, or forbid fewer.", param=blamed[0])


def sampling_of(submit: Submit, defaults: dict[str, Any], config: Config, vocab_size: int) -> SamplingParams:
    """The request's sampling settings with the model's defaults under what the client gave, validated. Raises InvalidRequest."""
    params = submit.sampling
    missing = {name: value for name, value in defaults.items() if name not in submit.explicit}
    if params.beam is not None:  # the others are for drawing
        missing = {name: value for name, value in missing.items() if name == "max_tokens"}
        if params.beam.width > config.max_n:
            field = submit.names.get("beam.width", "beam.width")
            raise InvalidRequest(f"{field} must be at most {config.max_n} (--max-n), but is {params.beam.width}.", param=field)
    if "max_tokens" in missing and params.min_tokens > missing["max_tokens"]:
        del missing["max_tokens"]  # the model's default must not contradict what the client did ask
    if missing:
        params = msgspec.structs.replace(params, **missing)
    if params.n > config.max_n:
        raise InvalidRequest(f"n must be at most {config.max_n} (--max-n), but is {params.n}.", param="n")
    params.validate(vocab_size=vocab_size, max_logprobs=config.max_logprobs, max_stop=config.max_stop)
    for stop in params.stop:
        if len(stop) > MAX_STOP_CHARS:
            raise InvalidRequest(f"A stop string may have at most {MAX_STOP_CHARS} characters, but one has {len(stop)}.", param="stop")
    return params


def check_beam(submit: Submit, params: SamplingParams, facts: EngineFacts, ends: I32) -> None:
    """Can the engine search so? Raises InvalidRequest or UnsupportedFeature naming the field."""
    beam = params.beam
    if beam is None:
        return
    field = submit.names.get("beam", "beam")
    if not facts.beams:
        raise UnsupportedFeature(f"This server cannot search with beams. Leave {field} out.", param=field)
    field = submit.names.get("beam.width", "beam.width")
    for most, what in (
        (facts.max_num_seqs, "run at once here (--max-num-seqs)"),
        (facts.max_num_batched_tokens, "fit in a step (--max-num-batched-tokens)"),
        (facts.vocab_size - len(ends) - len(params.stop_token_ids), "can begin with a token of their own"),
    ):
        if beam.width > most:
            raise InvalidRequest(f"{field} is {beam.width}, but only {most} beams {what}.", param=field)


def context_of(facts: EngineFacts) -> int:
    """The longest sequence that can run: the model's context, or the whole KV pool if that is smaller."""
    return min(facts.max_model_len, facts.num_blocks * facts.block_size)


def keep_of(submit: Submit, params: SamplingParams, facts: EngineFacts) -> int:
    """How many of the prompt's last tokens to keep; 0: all."""
    wanted = submit.truncate_prompt_tokens
    if wanted is None:
        return 0
    output = 1 if params.max_tokens is None else params.max_tokens
    fits = max(1, context_of(facts) - min(output, context_of(facts) - 1))
    return fits if wanted == -1 else wanted


def check_fits(prompt_tokens: int, params: SamplingParams, facts: EngineFacts, param: str, whose: str = MODELS) -> None:
    """Does the prompt leave room for what is asked of it? `whose` context that is, for errors. Raises ContextLengthExceeded or InvalidRequest naming `param`."""
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt is empty: it must have at least one token.", param=param)
    limit = facts.max_model_len
    least = 0 if params.max_tokens == 0 else 1
    more = ", and at least one more is needed for the answer" if least else ""
    if prompt_tokens + least > limit:
        raise ContextLengthExceeded(
            f"{whose} maximum context length is {limit} tokens. However, your {param} resulted in {prompt_tokens} tokens{more}."
            f" Please shorten the {param}.",
            param=param,
        )
    pool = facts.num_blocks * facts.block_size
    if prompt_tokens + least > pool:
        needed = -(-(prompt_tokens + least) // facts.block_size)
        raise InvalidRequest(
            f"The prompt of {prompt_tokens} tokens needs {needed} KV blocks, but this server has only {facts.num_blocks} blocks of"
            f" {facts.block_size} tokens. Shorten it, or start the server with a larger --kv-cache-memory-bytes.",
            param=param,
        )


def max_tokens_of(prompt_tokens: int, params: SamplingParams, facts: EngineFacts, submit: Submit, whose: str = MODELS) -> int:
    """The output limit. What the client asked for must fit; a default gets what is left of the context. 0 (draw nothing) leaves the whole
    context to the prompt. Raises ContextLengthExceeded or InvalidRequest."""
    param = prompt_name(submit)
    check_fits(prompt_tokens, params, facts, param, whose)
    limit, pool = facts.max_model_len, facts.num_blocks * facts.block_size
    if params.beam is not None and params.max_tokens != 0:  # every beam may come to need blocks of its own for all but the prompt
        shared = prompt_tokens // facts.block_size
        pool = min(pool, (shared + (facts.num_blocks - shared) // params.beam.width) * facts.block_size)
    room = min(limit, pool) - prompt_tokens
    if room < 1 and params.beam is not None and params.max_tokens != 0:
        field = submit.names.get("beam.width", "beam.width")
        raise InvalidRequest(f"The KV cache does not hold {params.beam.width} beams of a prompt of {prompt_tokens} tokens.", param=field)
    asked = params.max_tokens
    if asked is not None and asked > room and "max_tokens" in submit.explicit:
        field = submit.names.get("max_tokens", "max_tokens")
        what = f"{whose} maximum context length is {limit} tokens" if limit <= pool else f"This server's KV cache holds {pool} tokens"
        if params.beam is not None and limit > pool:
            what += f" for each of {params.beam.width} beams"
        raise ContextLengthExceeded(
            f"{what}. However, you requested {prompt_tokens + asked} tokens ({prompt_tokens} in the {param}, {asked} by {field})."
            f" Lower {field} to at most {room}, leave it out to use what is left, or shorten the {param}.",
            param=field,
        )
    return room if asked is None else min(asked, room)


def root_hash(facts: EngineFacts, secret: bytes, tenant: str, cache_salt: str) -> bytes:
    """The hash chain's root. The salt is derived with the server's secret, so that no client can choose itself into another's cache."""
    salt = ""
    if tenant or cache_salt:
        salt = hmac.new(secret, msgspec.msgpack.encode([tenant, cache_salt]), hashlib.sha256).hexdigest()
    return CacheKey(weights=f"{facts.model}\n{facts.fingerprint}", layout=facts.kv_layout, tenant_salt=salt).root()


def as_ids(values: Sequence[int], vocab_size: int, param: str) -> Column:
    """A JSON list of token ids as a column. Raises InvalidRequest."""
    check_tokens(values, param, vocab_size)
    return np.array(values, dtype=np.int32)
