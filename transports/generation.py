"""What a client asks for, whatever API it speaks.

What it is: `Generation`, a checked request in Penstock's own terms: prompts, sampling settings, priority. A surface's parser makes it, a Job submits
it.
What it does not know: any API's names for these things but the ones it is told (`names`), what the reply looks like, HTTP.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from penstock.core.protocol.calling import Calling
from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.messages import Grammar
from penstock.core.protocol.sampling import SamplingParams
from penstock.transports.request import PRIORITY


def idle(priority: int, config: Config) -> list[str]:
    """The name of a priority that the scheduling policy does not look at, if it asks for something: the reply says so (request.ignored_header)."""
    return [PRIORITY] if priority and config.scheduling_policy == "fcfs" else []


DRAFTS: dict[bool | str | None, bool | None] = {None: None, "auto": None, True: True, "force": True, False: False, "off": False}


def drafts_of(asked: bool | str | None) -> bool | None:
    """What a request's `spec_decode` says: drafts always, never, or (None) as far as they pay. Raises InvalidRequest."""
    if asked not in DRAFTS:
        raise InvalidRequest(f"spec_decode must be true, false, 'auto', 'off' or 'force', but is {str(asked)[:40]!r}.", param="spec_decode")
    return DRAFTS[asked]


class Generation(msgspec.Struct, kw_only=True):
    """One request. What is not explained here means what it means in Submit."""

    kind: Literal["chat", "completion"]
    """What the prompts are: conversations, or texts and token ids."""
    prompts: list[dict[str, Any]]
    """Submit's fields of each prompt: `messages`, or `prompt` or `prompt_ids`, and what belongs to them (`template_kwargs`, `prompt_name`, ...).
    At least one."""
    sampling: SamplingParams
    """Already validated."""
    explicit: list[str] = msgspec.field(default_factory=list)
    """Sampling fields that the client itself gave, by our names; the others take the model's defaults."""
    names: dict[str, str] = msgspec.field(default_factory=dict)
    """What the client calls fields that are called otherwise here: our name -> the client's, for errors."""
    model: str | None = None
    """None: the default one."""
    priority: int = 0
    spec_decode: bool | None = None
    cache_salt: str = ""
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    echo: bool = False
    """The answer begins with the prompt."""
    want_ids: bool = False
    """The reply shows token ids: the prompt's come with the first row, and a whole reply's choices keep theirs."""
    detokenize: bool = True
    grammar: Grammar | None = None
    """What every answer must obey."""
    stream: bool = False
    stream_interval: int = 1
    """A stream's rows are passed once they are so many tokens, from the second on."""
    smoothing_ms: float = 0.0
    """Tokens of a stream that come together are passed one after the other, none more than so much later; 0: as they come."""
    split: bool = False
    parallel_calls: bool = True
    calling: Calling | None = None
    tells: int = -1
    """How many answers to a prompt tell its log-probabilities; -1: all, and a conversation's reply once."""
    retain_s: float | None = None
    """The stream can be resumed until so long after its end, or after its last reader left; None: the body does not say."""
    on_disconnect: str | None = None
    request_id: str | None = None
    """The client's own id for it, if it came in the body; a header goes before it."""
    ignored: list[str] = msgspec.field(default_factory=list)
    """Fields of the body that nobody understands, which the reply's headers name."""

    @property
    def choices(self) -> int:
        """How many answers there will be: n for each prompt."""
        return self.sampling.n * len(self.prompts)
