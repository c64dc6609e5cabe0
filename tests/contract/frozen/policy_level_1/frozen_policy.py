"""A plugin as somebody wrote it against level 1 of scheduling policies. Never edited: it must go on working at the level after.

What it is: longest prompt first. What it does not know: anything that came later.
"""

from penstock.core.hookspecs import SchedulePolicySpec, hookimpl


class LongestFirst:
    name = "frozen-longest"

    def order(self, waiting):  # type: ignore[no-untyped-def]
        return -waiting.prompt_tokens

    def victims(self, running):  # type: ignore[no-untyped-def]
        return running.arrival_ns


@hookimpl
def register_schedule_policies():  # type: ignore[no-untyped-def]
    return [SchedulePolicySpec(name="frozen-longest", api_level=1, factory=LongestFirst)]
