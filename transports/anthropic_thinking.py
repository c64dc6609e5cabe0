"""Signatures of thinking blocks.

What it is: `UNSIGNED`, the signature of a block that has its text; `sealed`, that of a block whose text the client did not want to see (`display: omitted`):
the text itself, so that it comes back with the conversation; and `unsealed`, its reading. Nothing is signed: whoever sends a thinking block may have
written it.
What it does not know: blocks, requests, replies.
"""

from __future__ import annotations

import base64
import binascii

UNSIGNED = "penstock-unsigned"
_SEALED = "penstock-text:"


def sealed(text: str) -> str:
    return _SEALED + base64.b64encode(text.encode()).decode()


def unsealed(signature: str) -> str | None:
    """The text in it; None: there is none, as in every signature that is not ours. Raises ValueError for one that was cut or changed."""
    if not signature.startswith(_SEALED):
        return None
    try:
        return base64.b64decode(signature[len(_SEALED) :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
