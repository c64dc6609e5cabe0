"""What a caller may ask of the sampler.

What it is: `SamplingParams`, validated once at the edge of the system; names and defaults follow OpenAI and vLLM.
What it does not know: tokenizers, logits, slots. Stop strings are text's business, everything else the engine's.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.wording import plain

MAX_N = 64
INT_LIMIT = 2**31
"""Counts and token ids travel as int32."""
MAX_BAD_WORDS = 1024
MAX_STOP_TOKENS = 256
"""Each costs every step of the whole batch a little: more than anybody needs would make others wait."""
GREEDY_EPSILON = 1e-5
"""A temperature below this is greedy (as in vLLM)."""

MAX_TEMPERATURE = 1000.0
"""Beyond it every token is as likely as any other; float32 could not hold the largest numbers that JSON can."""
MAX_REPETITION = 100.0
"""Repetition penalties are from its inverse to it: logits stay finite in float32."""


MOST_PROMPT_LOGPROBS = 1_000_000
"""Log-probabilities of a request's prompt tokens, over all its choices: some 70 MB of JSON."""


class StructuredOutputsParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """What an answer obeys, in Python, by vLLM's names: at most one of them, perhaps with `disable_any_whitespace`."""

    json: dict[str, Any] | bool | str | None = None
    """A JSON schema, or one as text."""
    regex: str | None = None
    choice: list[str] | None = None
    """Texts, one of which is the answer."""
    grammar: str | None = None
    """GBNF or Lark."""
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None
    """With `json` or `json_object`: no white space between the parts of the JSON."""


GuidedDecodingParams = StructuredOutputsParams
"""The name in older vLLM."""
MAX_LENGTH_PENALTY = 10.0
"""Lengths to its power stay finite."""


class Beam(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """A beam search, as transformers' generate does it: the `width` likeliest continuations are followed together, and the n answers are the best that
    ended: by the sum of their log-probabilities / length ** length_penalty, the best first. `early_stopping`: end as soon as `width` have ended (True);
    or when no better one is likely, as judged at the length so far (False) or at the longest there may be ("never")."""

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def blocks(self, prompt: int, tokens: int, size: int) -> int:
        """KV blocks of `size` tokens for beams of so many tokens each (the `prompt` included) that have nothing else in common."""
        shared = prompt // size
        return shared + self.width * (-(-tokens // size) - shared)


_APART = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "allowed_token_ids": None,
    "bad_words": [],
    "bad_words_token_ids": [],
    "stop": [],
}
"""What a beam search has none of."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling settings of one request. Call `.validate()`; it raises InvalidRequest naming the field.

    temperature 0 is greedy; top_k 0 or -1 keeps all; logprobs k returns the chosen token and the k most likely
    (None: nothing, 0: the chosen token only), from raw logits' log-softmax (before penalties and filters).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    bad_words_token_ids: list[list[int]] = []
    """Token sequences that must not be completed; text fills them from `bad_words`."""
    max_tokens: int | None = None
    """None: as far as the context reaches. 0: compute the prompt (for its log-probabilities) and draw nothing."""
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    """Of the Python API alone: Submit.grammar is what becomes of it."""
    guided_decoding: StructuredOutputsParams | None = None
    """The same under its older name."""
    beam: Beam | None = None
    """Search with beams instead of drawing: temperature and seed have no effect then."""

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def looks_back(self) -> bool:
        """A draw depends on which tokens came before, beyond what the model makes of them."""
        penalised = self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
        return penalised or any(len(word) > 1 for word in self.bad_words_token_ids)

    def validate(self, *, vocab_size: int | None = None, max_logprobs: int = 20, max_stop: int = 16) -> SamplingParams:
        """Return self, or raise InvalidRequest that names the first wrong field."""

        def need(ok: bool, param: str, what: str) -> None:
            if not ok:
                value = getattr(self, param)
                raise InvalidRequest(f"{param} {what}, but is {shorten(value) if type(value) is int else repr(value)}.", param=param)

        def finite(param: str, low: float, high: float) -> None:
            value = getattr(self, param)
            need(math.isfinite(value) and low <= value <= high, param, f"must be between {low:g} and {high:g}")

        for param in ("n", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"):
            number = getattr(self, param)
            need(number is None or abs(number) < INT_LIMIT, param, f"must be below {INT_LIMIT}")
        need(1 <= self.n <= MAX_N, "n", f"must be between 1 and {MAX_N}")
        finite("temperature", 0, MAX_TEMPERATURE)
        need(math.isfinite(self.top_p) and 0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        need(self.top_k >= -1, "top_k", "must be -1 or 0 (off) or a positive count")
        finite("min_p", 0, 1)
        finite("repetition_penalty", 1 / MAX_REPETITION, MAX_REPETITION)
        finite("frequency_penalty", -2, 2)
        finite("presence_penalty", -2, 2)
        need(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "must be 0 or more")
        need(self.min_tokens >= 0, "min_tokens", "must be 0 or more")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).", param="min_tokens")
        need(len(self.stop) <= max_stop, "stop", f"may hold at most {max_stop} strings")
        need(all(self.stop), "stop", "must not hold an empty string")
        need(self.logprobs is None or 0 <= self.logprobs <= max_logprobs, "logprobs", f"must be 0..{max_logprobs}")
        need(
            self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= max_logprobs,
            "prompt_logprobs",
            f"must be 0..{max_logprobs}",
        )
        for param, most in (("bad_words", MAX_BAD_WORDS), ("bad_words_token_ids", MAX_BAD_WORDS), ("stop_token_ids", MAX_STOP_TOKENS)):
            if len(getattr(self, param)) > most:
                raise InvalidRequest(f"{param} may hold at most {most} entries, but holds {len(getattr(self, param))}.", param=param)
        need(self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "allowed_token_ids", "must not be empty")
        self._check_bias(vocab_size)
        check_tokens(self.allowed_token_ids or [], "allowed_token_ids", vocab_size)
        check_tokens(self.stop_token_ids, "stop_token_ids", vocab_size)
        for index, sequence in enumerate(self.bad_words_token_ids):
            check_tokens(sequence, f"bad_words_token_ids[{index}]", vocab_size)
        if self.beam is not None:
            self._check_beam(self.beam)
        return self

    def _check_beam(self, beam: Beam) -> None:
        if not self.n <= beam.width <= MAX_N:
            raise InvalidRequest(f"beam.width must be between n ({self.n}) and {MAX_N}, but is {shorten(beam.width)}.", param="beam.width")
        penalty = beam.length_penalty
        if not (math.isfinite(penalty) and abs(penalty) <= MAX_LENGTH_PENALTY):
            raise InvalidRequest(
                f"length_penalty must be between {-MAX_LENGTH_PENALTY:g} and {MAX_LENGTH_PENALTY:g}, but is {penalty!r}.",
                param="length_penalty",
            )
        for param, neutral in _APART.items():
            if getattr(self, param) != neutral and not (param == "top_k" and self.top_k == -1):
                raise InvalidRequest(f"{param} and a beam search cannot both be given. Leave one of them out.", param=param)

    def _check_bias(self, vocab_size: int | None) -> None:
        """logit_bias, without a look at each entry where all are well: there may be as many as tokens."""
        ids, values = self.logit_bias.keys(), self.logit_bias.values()
        limit = vocab_size or INT_LIMIT
        if not ids or (
            min(ids) >= 0 and max(ids) < limit and all(map(math.isfinite, values)) and min(values) >= -100 and max(values) <= 100
        ):
            return
        for token, bias in self.logit_bias.items():
            name = f"logit_bias.{shorten(token)}"
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise InvalidRequest(f"{name} must be between -100 and 100, but is {bias!r}.", param=name)
            if not 0 <= token < limit:
                raise InvalidRequest(not_a_token(f"{name}: the key", token, vocab_size), param=name)


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `LLM.beam_search` takes, as in vLLM; `early_stopping` as in Beam. `temperature` has no effect."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | Literal["never"] = False

    def sampling(self) -> SamplingParams:
        """The same as settings of a request. Raises InvalidRequest naming the field."""
        try:
            params = msgspec.convert(msgspec.structs.asdict(self), BeamSearchParams)
        except msgspec.ValidationError as error:
            what, _, at = str(error).partition(" - at `$.")
            field = at.rstrip("`") or "params"
            raise InvalidRequest(f"{field} {plain(what)}." if plain(what) != what else f"{field}: {what}.", param=field) from None
        if not 1 <= params.beam_width <= MAX_N:
            raise InvalidRequest(f"beam_width must be between 1 and {MAX_N}, but is {shorten(params.beam_width)}.", param="beam_width")
        if params.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be 1 or more, but is {shorten(params.max_tokens)}.", param="max_tokens")
        beam = Beam(width=params.beam_width, length_penalty=params.length_penalty, early_stopping=params.early_stopping)
        return SamplingParams(
            n=params.beam_width,
            max_tokens=params.max_tokens,
            ignore_eos=params.ignore_eos,
            include_stop_str_in_output=params.include_stop_str_in_output,
            logprobs=0,
            beam=beam,
        )


_TYPES: dict[str, Any] = typing.get_type_hints(SamplingParams, include_extras=True)
_DEFAULTS: dict[str, Any] = {field: getattr(SamplingParams(), field) for field in SamplingParams.__struct_fields__}


def from_python(params: SamplingParams) -> SamplingParams:
    """Settings that Python code constructed, which nothing has checked: a copy whose fields have their types.

    As in vLLM, `stop` may be one text, None stands for a default, and numpy's numbers and arrays are numbers and lists.
    Raises InvalidRequest naming the field.
    """
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"sampling_params must be SamplingParams, but is {type(params).__name__}.", param="sampling_params")
    values: dict[str, Any] = {}
    for field in SamplingParams.__struct_fields__:
        value = getattr(params, field)
        if value is None:
            value = _DEFAULTS[field]
        elif hasattr(value, "tolist"):
            value = value.tolist()
        if field == "stop" and isinstance(value, str):
            value = [value]
        try:
            values[field] = msgspec.convert(value, _TYPES[field])
        except msgspec.ValidationError as error:
            what, _, at = str(error).partition(" - at `$")
            where = field + at.rstrip("`") if at.startswith("[") and "..." not in at else field
            said = plain(what)
            raise InvalidRequest(f"{where} {said}." if said != what else f"{where}: {what}.", param=where) from None
    for field in ("stop", "bad_words"):
        for index, text in enumerate(values[field]):
            check_text(text, f"{field}[{index}]")
    return SamplingParams(**values)


def check_text(text: str, param: str) -> None:
    """Raises InvalidRequest for a text that no encoding can carry (half of a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} is no valid Unicode: {text[error.start]!a} at character {error.start} is half of a pair.", param=param
        ) from None


def shorten(number: int) -> str:
    """An integer for an error message: one of a hundred digits helps nobody."""
    text = str(number) if abs(number) < 10**30 else f"{'-' if number < 0 else ''}(a number of more than 30 digits)"
    return text


def not_a_token(where: str, number: int, vocab_size: int | None) -> str:
    known = f"the vocabulary has tokens 0 to {vocab_size - 1}" if vocab_size else f"token ids are from 0 to {INT_LIMIT - 1}"
    return f"{where} is {shorten(number)}, but {known}."


def check_tokens(ids: Sequence[int], param: str, vocab_size: int | None) -> None:
    """Token ids as a client gave them, before anything narrower than an int holds them. Raises InvalidRequest naming the first wrong one."""
    limit = vocab_size or INT_LIMIT
    if ids and not (min(ids) >= 0 and max(ids) < limit):
        index = next(i for i, token in enumerate(ids) if not 0 <= token < limit)
        raise InvalidRequest(not_a_token(f"{param}[{index}]", ids[index], vocab_size), param=f"{param}[{index}]")
