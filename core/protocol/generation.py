"""A model's sampling defaults, as generation_config.json has them.

What it is: the names of that file that mean something here, what they are called in SamplingParams, and `--override-generation-config`, which has the
same names.
What it does not know: files, requests.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.core.protocol.errors import ConfigError, InvalidRequest
from penstock.core.protocol.sampling import SamplingParams

# generation_config.json's name -> ours
NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
DO_SAMPLE = "do_sample"


UNUSED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ((), []),
    "begin_suppress_tokens": ((), []),
    "diversity_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({},),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "top_h": (1,),
    "typical_p": (1,),
}
"""Names of that file that change answers in transformers and have no place here, with the values that mean nothing besides null."""


def unused(raw: Mapping[str, Any]) -> list[str]:
    """The names of a generation_config.json that would change answers, and are not obeyed."""
    return [name for name, plain in UNUSED.items() if raw.get(name) is not None and raw[name] not in plain]


def settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a generation_config.json by our names. `"do_sample": false` means temperature 0, as in transformers: said in so many
    words, this model is to be greedy unless a request asks otherwise. Raises ValueError for impossible values."""
    found = {ours: raw[theirs] for theirs, ours in NAMES.items() if raw.get(theirs) is not None}
    if found.get("max_tokens") == 0:
        raise ValueError("max_new_tokens must be at least 1.")
    if raw.get(DO_SAMPLE) is False:
        found["temperature"] = 0.0
    try:
        msgspec.convert(found, SamplingParams).validate()
    except (msgspec.ValidationError, InvalidRequest) as error:
        raise ValueError(str(error)) from None
    return found


def overridden(raw: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json with the override over it. A temperature that is given there means that it is to be sampled with."""
    merged = {**raw, **override}
    if "temperature" in override and DO_SAMPLE not in override:
        merged.pop(DO_SAMPLE, None)
    return merged


def override_of(text: str) -> dict[str, Any]:
    """--override-generation-config, checked. Raises ConfigError naming the key."""
    flag, param = "--override-generation-config", "override_generation_config"
    given: dict[str, Any] = json.loads(text)
    for key, value in given.items():
        if key not in NAMES and key != DO_SAMPLE:
            near = difflib.get_close_matches(key, NAMES, n=1, cutoff=0.7)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(NAMES)}, {DO_SAMPLE}."
            raise ConfigError(f"{flag}: {key!r} cannot be set there.{hint}", param=param)
        if key == DO_SAMPLE and not isinstance(value, bool) and value is not None:
            raise ConfigError(f"{flag}: {key} must be true or false, but is {value!r:.50}.", param=param)
    try:
        settings(given)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}", param=param) from None
    return given
