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
