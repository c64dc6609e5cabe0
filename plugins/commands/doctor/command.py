"""`penstock doctor stream URL`: do the events of a stream arrive as the server sends them, and if not, who holds them?

What it is: the click group and its options. The exit status is 0 where all is well, 1 with a finding, 2 where nothing could be measured.
What it does not know: how it is measured (probes.py) and judged (rules.py).
"""

from __future__ import annotations

import json
import sys

import click


@click.group()
def doctor() -> None:
    """Find out what is wrong with an installation, and what to do."""


@doctor.command()
@click.argument("url")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Key for the server; others can read a command line.")
@click.option("--model", help="Model name; default: the server's first.")
@click.option("--tokens", type=click.IntRange(1), help="Length of the streamed answer; default: as many as take a few seconds.")
@click.option(
    "--idle-s", type=click.FloatRange(0), default=12.0, show_default=True, help="How long a stream is kept silent; 0: not at all."
)
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="Longest wait for the next byte."
)
@click.option("--insecure", is_flag=True, help="Trust any certificate.")
@click.option("--direct", metavar="URL", help="The server itself, without what lies between, to compare with.")
@click.option("--json", "wants_json", is_flag=True, help="JSON instead of a report.")
def stream(
    url: str,
    api_key: str | None,
    model: str | None,
    tokens: int | None,
    idle_s: float,
    timeout_s: float,
    insecure: bool,
    direct: str | None,
    wants_json: bool,
) -> None:
    """Measure how a stream arrives from URL (a server's address as clients use it, with or without /v1, or the whole one of its chat completions): is it held back, compressed, cut, changed, and by whom?

    A Penstock server says when it sent each event; of another one give --direct too. Exit status: 0 all is well, 1 there is a finding, 2 it could not be measured.
    """
    from rich.console import Console

    from penstock.plugins.commands.doctor import probes, report
    from penstock.plugins.commands.doctor.rules import findings, unmeasured
    from penstock.plugins.commands.doctor.wire import Unmeasurable, target_of

    narrator = Console(stderr=True)
    status = narrator.status("measuring") if narrator.is_terminal and not wants_json else None
    try:
        target = target_of(url, key=api_key, insecure=insecure, timeout_s=timeout_s)
        beside = target_of(direct, key=api_key, insecure=insecure, timeout_s=timeout_s) if direct else None
        if status is not None:
            status.start()
        try:
            evidence = probes.examine(target, beside, probes.Asked(model, tokens, idle_s), status.update if status else lambda _: None)
        finally:
            if status is not None:
                status.stop()
    except Unmeasurable as error:
        if wants_json:
            click.echo(json.dumps({"url": url, "error": str(error)}, indent=2))
        else:
            click.echo(f"penstock: {error}", err=True)
        sys.exit(2)
    evidence.url = url
    found, unknown = findings(evidence), unmeasured(evidence)
    if wants_json:
        click.echo(json.dumps(report.as_json(evidence, found, unknown), indent=2))
    else:
        report.show(Console(highlight=False, width=None if sys.stdout.isatty() else 160), evidence, found, unknown)
    if any(not finding.note for finding in found):
        sys.exit(1)
    sys.exit(2 if unknown else 0)
