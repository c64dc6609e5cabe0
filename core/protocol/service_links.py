"""Environment variables that Kubernetes (and Docker's links) set in a container for each service beside it.

What it is: `is_service_link`, which tells them from options: a service named penstock, or penstock-something, gives every pod PENSTOCK_PORT=tcp://...,
PENSTOCK_SERVICE_HOST and more.
What it does not know: which options there are.
Source: "Service", section "Environment variables", of the Kubernetes documentation.
"""

from __future__ import annotations

import re

_NAMES = re.compile(r".+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")


def is_service_link(name: str, value: str) -> bool:
    """`name` and `value` of a variable. NAME_PORT alone may be an option too: then the value decides."""
    return bool(_NAMES.fullmatch(name)) or (name.endswith("_PORT") and bool(_ADDRESS.fullmatch(value)))
