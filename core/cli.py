"""The `penstock` command.

What it is: `serve` with one flag for every option of core/protocol/config.py (and the spellings of vLLM and SGLang), `plugins`, `config`, and
whatever commands root plugins add (`chat`, `bench`, `doctor` are such plugins). Imports nothing heavy before a command runs.
What it does not know: processes, models, HTTP.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from penstock.core.protocol import config as cfg
from penstock.core.protocol.argv import tidy
from penstock.core.protocol.errors import PenstockError
from penstock.core.protocol.keys import with_keys
from penstock.version import __version__

GROUP_TITLES = {
    "model": "Model",
    "engine": "Memory and batching",
    "speculation": "Speculation",
    "plugins": "Plugins",
    "server": "Server",
    "limits": "Limits",
    "storage": "Storage",
    "observability": "Observability",
    "machinery": "Machinery",
    "later": "Known, not supported yet (neutral values are accepted)",
}


FOREIGN_GIVEN = "penstock.foreign"
"""Key in a context's meta: options of vLLM's and SGLang's that Penstock does not have."""


class _Value(click.ParamType[Any]):
    """Parses one option's text by the same rules as the environment."""

    def __init__(self, option: cfg.Option) -> None:
        self.option = option
        self.name = "size" if option.is_size else "json" if option.is_json else getattr(cfg._one(option), "__name__", "text")
        if option.choices:
            self.name = "|".join(map(str, option.choices))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return cfg.from_text(self.option, value, where=self.option.flag)
        except PenstockError as error:
            self.fail(error.message, param, ctx)


class _Option(click.Option):
    """An option that remembers its group for --help."""

    group: str = ""


class _ServeCommand(click.Command):
    """--help by groups; an unknown flag names the nearest known one (click does). Spellings are core/protocol/argv.py's business."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "group", "") or "", []).append(record)
        for group, rows in sections.items():
            with formatter.section(GROUP_TITLES.get(group, "Options")):
                formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            line = tidy(args)
        except click.UsageError as error:
            error.ctx = ctx  # for the usage line
            raise
        ctx.meta[FOREIGN_GIVEN] = line.foreign
        return super().parse_args(ctx, line.args if line.model is None else [*line.args, "--", line.model])


def config_options(skip: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: one click option per configuration option."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(list(cfg.OPTIONS.values())):
            if option.name not in skip:
                function = _decorator(option)(function)
        return function

    return decorate


def _decorator(option: cfg.Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    names = [option.flag, *("--" + alias for alias in option.aliases), *([option.extra["short"]] if "short" in option.extra else [])]
    shown = {None: "", (): "", "": ""}.get(
        option.default if not isinstance(option.default, list) else tuple(option.default), f"{option.default}"
    )
    doc = option.doc + (f" [default: {shown}]" if shown != "" else "")
    kwargs: dict[str, Any] = {"default": None, "help": doc, "cls": _Option, "show_default": False}
    if option.is_bool:
        inverse = ["--no-" + option.flag[2:]]
        if option.extra.get("no"):
            inverse.append("--" + option.extra["no"])
        decl = f"{option.flag}/{inverse[0]}"
        decls = [decl, *(f"--{a}" for a in option.aliases)]
        if len(inverse) > 1:
            decls.append(f" /{inverse[1]}")
        decorated = click.option(*decls, option.name, **kwargs)
    else:
        if option.is_list:  # again and again: each adds
            kwargs |= {"multiple": True, "callback": lambda ctx, param, parts: [value for part in parts or () for value in part] or None}
        decorated = click.option(*names, option.name, type=_Value(option), metavar=_Value(option).name, **kwargs)

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        function = decorated(function)
        function.__click_params__[-1].group = option.group  # type: ignore[attr-defined]
        return function

    return apply


def load_config(file: str | None, given: dict[str, Any], note: Callable[[str], None] | None = None) -> cfg.Config:
    """Defaults < TOML file (--config or PENSTOCK_CONFIG) < PENSTOCK_* < command line. `note` gets what the user should know besides."""
    note = note or logging.getLogger("penstock.config").warning
    file = file or os.environ.get("PENSTOCK_CONFIG")
    layers = [cfg.from_toml(file)] if file else []
    typed = {k: v for k, v in given.items() if v is not None}
    return with_keys(cfg.build(*layers, cfg.from_env(note=note), typed, note=note), note, typed="api_key" in typed)


HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="penstock")
def cli() -> None:
    """Penstock: an LLM inference server."""


# Underscores in flags are what people paste from Python calls.
@cli.command(cls=_ServeCommand, context_settings={**HELP, "token_normalize_func": lambda token: token.replace("_", "-")})
@click.argument("model_folder", metavar="[MODEL]", required=False)
@click.option("--config", "config_file", type=click.Path(dir_okay=False), help="TOML file with options.")
@config_options()
@click.pass_context
def serve(context: click.Context, /, **_: Any) -> None:
    """Serve MODEL (a Hugging Face folder or a GGUF file; without it the demo model) over the OpenAI API."""
    notes: list[str] = []
    config = _config_of(context, notes.append)
    if notes:
        from penstock.core.telemetry.logs import configure_logging  # late: it takes as long as starting the children

        log = configure_logging(config.log_level, config.log_format, "root")
        for note in notes:
            log.warning(note)
    from penstock.core.processes.kernel import serve as run

    sys.exit(run(config))


def _config_of(context: click.Context, note: Callable[[str], None] | None = None) -> cfg.Config:
    given = dict(context.params)
    folder, file = given.pop("model_folder"), given.pop("config_file")
    if folder is not None:
        given["model"] = folder
    return load_config(file, {**given, **context.meta[FOREIGN_GIVEN]}, note)


@cli.command("config")
@click.option("--config", "config_file", type=click.Path(dir_okay=False), help="TOML file with options.")
def show_config(config_file: str | None) -> None:
    """Print the configuration that the file and the environment give, as JSON; keys are hidden."""
    import msgspec

    shown = msgspec.to_builtins(load_config(config_file, {}))
    shown["api_key"] = ["***"] * len(shown["api_key"])
    click.echo(json.dumps(shown, indent=2))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def plugins(as_json: bool) -> None:
    """List plugins: name, package, version, process, hooks; broken ones with their error."""
    from penstock.core.contract.families import Role
    from penstock.core.contract.host import PluginHost

    roles: tuple[Role, ...] = ("root", "edge", "text", "engine")
    rows = [row for role in roles for row in PluginHost(role, skip_broken=True).load().check().report()]
    head = ["plugin", "package", "version", "process", "hooks"]
    if as_json:
        click.echo(json.dumps([dict(zip(head, row, strict=True)) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def build_cli() -> click.Group:
    """The group with the commands of root plugins added."""
    from penstock.core.contract.host import PluginHost

    shows = sys.argv[1:2] in ([], ["plugins"], ["--help"])  # what is broken must not hide what is broken
    skip = "--skip-broken-plugins" in sys.argv or os.environ.get("PENSTOCK_SKIP_BROKEN_PLUGINS", "").lower() in ("1", "true", "yes")
    host = PluginHost("root", skip_broken=skip or shows).load()
    host.hook.register_commands(group=cli)
    return cli


def main() -> None:
    """Entry point: a PenstockError is one line on stderr and exit status 2, never a traceback."""
    try:
        build_cli()(prog_name="penstock")
    except PenstockError as error:
        click.echo(f"penstock: {error.message}", err=True)
        sys.exit(2)


def parse_serve_args(args: Sequence[str]) -> cfg.Config:
    """The Config that `penstock serve ARGS` would use. Raises ConfigError or click's usage errors."""
    return _config_of(serve.make_context("serve", list(args)))
