"""Whose fault it is: what plugins bring is called through here, so that their mistakes carry their names.

What it is: the sentence that blames a plugin (`fault`), a call that turns a stranger's exception into it (`guarded`), and what a spec's fields
and a factory's result must look like. Everything here runs at start-up.
What it does not know: pluggy, how plugins are found, what a factory's result is for.
"""

from __future__ import annotations

import ast
import functools
import traceback
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from penstock.core.contract.actors import PLACES
from penstock.core.contract.families import Family
from penstock.core.contract.hookspecs import ActorSpec, FormatSpec, Spec
from penstock.core.protocol.config import Config, nearest
from penstock.core.protocol.errors import PenstockError, PluginFault, described, tamed


def fault(what: str, call: str, error: Exception | str, remedy: str) -> PluginFault:
    """`what` is "The device 'x' (plugin ... of package ...)"; `error` is an exception, or says what is wrong with what `call` gave."""
    if isinstance(error, str):
        return PluginFault(f"{what} is broken: {call}() {error}. {remedy}")
    return PluginFault(f"{what} is broken: {call}() failed with {described(error)}{_place(error)}. {remedy}")


def _place(error: Exception) -> str:
    """The innermost line of the file that was called: what it called in turn is rarely to blame."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    mine = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({PurePath(mine[-1].filename).name}, line {mine[-1].lineno})" if mine else ""


def guarded(
    function: Callable[..., Any],
    blame: Callable[[Exception], PluginFault],
    skip: Callable[[PluginFault], Any] | None = None,
    check: Callable[[Any], None] | None = None,
) -> Callable[..., Any]:
    """`function`, whose exceptions are raised as `blame` words them, or handed to `skip` for an answer. Penstock's own errors pass: plugins
    raise them to speak to the user. `check` raises PluginFault for a result that will not do."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except PenstockError:
            raise
        except BaseException as raised:
            error = tamed(raised)
            wrong = blame(error)
            if skip is not None:
                return skip(wrong)
            raise wrong from error
        if check is not None:
            try:
                check(result)
            except PluginFault as wrong:
                if skip is None:
                    raise
                return skip(wrong)
        return result

    return call


def wrong_result(family: Family, result: Any) -> str | None:
    """What is wrong with a factory's result, or None."""
    lacking = [name for name in family.members() if not hasattr(result, name)]
    if lacking:
        return f"returned {_a(type(result).__name__)}, which is no {family.noun}: it has no {' and no '.join(map(repr, lacking))}"
    return None


def wrong_reason(result: Any) -> str | None:
    """What is wrong with the answer of a `supports`, or None."""
    if result is None or (isinstance(result, str) and result):
        return None
    return f"returned {result!r:.80}: it must be None (it does), or a text that says why not"


def _a(name: str) -> str:
    return name if name == "NoneType" else f"a {name}"


def wrong_field(spec: Spec) -> str | None:
    """What is wrong with a spec's fields (a Struct does not check them), or None."""
    kinds = {name: kind for one in reversed(type(spec).__mro__) for name, kind in getattr(one, "__annotations__", {}).items()}
    for name in spec.__struct_fields__:
        value, kind = getattr(spec, name), str(kinds.get(name, ""))
        if kind.startswith("Callable") and not (callable(value) or (value is None and kind.endswith("| None"))):
            wanted = "a function"
        elif kind == "str" and not isinstance(value, str):
            wanted = "a text"
        elif kind == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            wanted = "a whole number"
        elif kind.startswith("Literal[") and value not in (known := ast.literal_eval(f"[{kind[8:-1]}]")):
            wanted = " or ".join(map(repr, known))
        elif kind.startswith("list") and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            wanted = "a list of texts"
        else:
            continue
        return f"its field {name!r} must be {wanted}, not {value!r}"
    if not spec.name:
        return "its field 'name' is empty"
    if isinstance(spec, ActorSpec) and spec.where not in PLACES:
        return f"its field 'where' must be {' or '.join(map(repr, PLACES))}, not {spec.where!r}"
    for option in getattr(spec, "options", ()):
        if option not in Config.__struct_fields__:
            return f"its field 'options' names {option!r}, which is no option of this Penstock.{nearest(option, Config.__struct_fields__)}"
    return None


def careful(factory: Callable[..., Any], family: Family, blame: Callable[..., PluginFault]) -> Callable[..., Any]:
    """`factory`, whose results are called through the family's own checks."""

    def say(call: str, error: Exception | str) -> PluginFault:
        return blame(call, False, error)

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        return family.wrap(factory(*args, **kwargs), say)

    return make


def namesake_of(spec: Spec, others: Mapping[str, Spec]) -> str | None:
    """The output format of a role that this one has too, which is chosen by one of its names."""
    if not isinstance(spec, FormatSpec):
        return None
    for name, other in others.items():
        assert isinstance(other, FormatSpec)
        roles = {"tools", "reasoning"} if other.role == "both" else {other.role}
        if (spec.role == "both" or spec.role in roles) and {spec.name, *spec.aliases} & {other.name, *other.aliases}:
            return name
    return None
