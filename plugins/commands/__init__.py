"""Commands that come as root plugins: `penstock chat`, `bench`, `doctor`, `quantize`, `quant report` and `tune`.

What it is: the hook that adds them. What it does not know: what they import when they run (nothing of it is imported here).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.core.contract.hookspecs import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def register_commands(group: click.Group) -> None:
    from penstock.plugins.commands.bench.command import bench
    from penstock.plugins.commands.chat import chat
    from penstock.plugins.commands.doctor.command import doctor
    from penstock.plugins.commands.quant.command import quant, quantize
    from penstock.plugins.commands.tune.command import tune

    group.add_command(bench)
    group.add_command(chat)
    group.add_command(doctor)
    group.add_command(quant)
    group.add_command(quantize)
    group.add_command(tune)
