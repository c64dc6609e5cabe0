"""What routes share that ask text something.

What it is: a query's answer as the error that it may be, and the look-up of one model among those that there are.
What it does not know: which API asks.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.core.protocol.errors import ModelNotFound, PenstockError
from penstock.core.protocol.messages import Answer
from penstock.core.protocol.tables import Principal
from penstock.transports.gateway import Door, Gateway, make_error
from penstock.transports.ids import split
from penstock.transports.request import ANYBODY


class _Failure(msgspec.Struct):
    """The body of an Answer that is no success: fields as in Rejected."""

    message: str = "The server could not answer."
    type: str = "server_error"
    code: str = "internal_error"
    param: str | None = None
    retry_after_s: float | None = None


def failure_of(answer: Answer) -> PenstockError:
    """The error that an Answer without success carries."""
    try:
        f = msgspec.json.decode(answer.body, type=_Failure)
    except msgspec.MsgspecError:
        f = _Failure(message=answer.body.decode(errors="replace") or _Failure().message)
    return make_error(answer.status, f.type, f.code, f.message, f.param, f.retry_after_s)


def places_of(gateway: Gateway, wanted: str) -> list[tuple[str, Door]]:
    """Which request that may be, and who may have it: a reply's id names its text process; a request's own id (x-request-id) may be anywhere."""
    doors = list(gateway.doors.values())
    found = split(wanted)
    named = [(found[0], door) for door in doors if door.pool.text == found[1]] if found is not None else []
    return [*named, *((wanted, door) for door in doors)]


async def models_for(gateway: Gateway, principal: Principal) -> list[dict[str, Any]]:
    """The entries of /v1/models that exist for it. Raises what the query ended with."""
    answer = await gateway.query("models")
    if answer.status != 200:
        raise failure_of(answer)
    known: list[dict[str, Any]] = msgspec.json.decode(answer.body).get("data", [])
    return [one for one in known if not principal.models or one.get("id") in principal.models]


async def find_model(gateway: Gateway, wanted: str, principal: Principal = ANYBODY) -> dict[str, Any]:
    """The entry of /v1/models. Raises ModelNotFound, or what the query ended with."""
    known = await models_for(gateway, principal)
    for one in known:
        if one.get("id") == wanted:
            return one
    names = ", ".join(str(one.get("id")) for one in known)
    raise ModelNotFound(f"The model {wanted[:200]!r} does not exist here. Known: {names}.", param="model")
