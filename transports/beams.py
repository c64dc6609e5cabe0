"""What a request says about a beam search.

What it is: `beam_of`, its fields as settings of a search, checked; and what a client calls those settings, for errors.
What it does not know: what else a request holds, how a search goes.
"""

from __future__ import annotations

from penstock.core.protocol.config import Config
from penstock.core.protocol.errors import InvalidRequest
from penstock.core.protocol.sampling import Beam, shorten
from penstock.transports.openai_schema import GenerationRequest


def beam_of(request: GenerationRequest, n: int, config: Config) -> Beam | None:
    """None: no search. Raises InvalidRequest."""
    early, penalty = request.early_stopping, request.length_penalty
    if not request.use_beam_search:
        for name, idle in (("length_penalty", penalty in (None, 1)), ("early_stopping", early in (None, False))):
            if not idle:
                raise InvalidRequest(f"{name} needs use_beam_search to be true.", param=name)
        return None
    width = n if request.best_of is None else request.best_of
    check_best_of(width, n, config)
    if isinstance(early, str) and early != "never":
        raise InvalidRequest(f"early_stopping must be true, false or 'never', but is {early[:40]!r}.", param="early_stopping")
    return Beam(
        width=width, length_penalty=1.0 if penalty is None else penalty, early_stopping="never" if isinstance(early, str) else bool(early)
    )


def beam_names(request: GenerationRequest) -> dict[str, str]:
    """What the client calls a beam search and its width."""
    return {"beam": "use_beam_search", "beam.width": "n" if request.best_of is None else "best_of"} if request.use_beam_search else {}


def check_best_of(best_of: int, n: int, config: Config) -> None:
    """Raises InvalidRequest."""
    if not n <= best_of <= config.max_n:
        raise InvalidRequest(f"best_of must be between n ({n}) and {config.max_n} (--max-n), but is {shorten(best_of)}.", param="best_of")
