"""Built-in scheduling policies: they enter by the same hook as a stranger's (`examples/` shows one).

What it is: the plugin module `penstock.plugins.policies` of the group `penstock.engine`.
What it does not know: the scheduler.
"""

from __future__ import annotations

from penstock.core.contract.hookspecs import API_LEVEL, SchedulePolicySpec, hookimpl
from penstock.plugins.policies.fcfs import FirstComeFirstServed
from penstock.plugins.policies.priority import PriorityWithAgeing


@hookimpl
def register_schedule_policies() -> list[SchedulePolicySpec]:
    level = API_LEVEL["schedule_policies"]
    return [
        SchedulePolicySpec(
            name="fcfs",
            api_level=level,
            doc="First come, first served; the latest arrival is preempted first.",
            factory=FirstComeFirstServed,
        ),
        SchedulePolicySpec(
            name="priority",
            api_level=level,
            doc="Lower priority numbers first; waiting --priority-ageing-s seconds is worth one level.",
            factory=PriorityWithAgeing,
            options=["priority_ageing_s"],
        ),
    ]
