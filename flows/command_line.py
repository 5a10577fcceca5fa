"""One command line for every flow: ``python -m flows.<name> [--preset NAME | --config FILE] [--section.field value]``.

The settings model of a flow is its form in the Prefect UI, its TOML file and its options; nothing is declared twice.
Precedence: option, then file or preset, then default. ``None`` for a setting that can be left open is written ``None``,
in a file too, where it is the text ``"None"``: TOML has no word for it.

Standard output has the summary, or with ``--json`` one JSON object, and nothing else. What happens on the way goes to standard
error: warnings, on a terminal how far the stages are, with ``--verbose`` everything that is logged.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from charm_core.errors import CharmError, ConfigError
from flows.console import quiet_console

Run = TypeVar("Run", bound=BaseModel)
Presets = Mapping[str, Callable[[], Run]]


class HasSummary(Protocol):
    """What a flow returns: a record with its result in a few lines."""

    @property
    def summary(self) -> str:
        """The result in a few lines."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """All of it."""
        ...


_INTERRUPTED = 130
_NONE = "None"


def run_from_command_line(
    name: str,
    model: type[Run],
    presets: Presets[Run],
    start: Callable[[Run], HasSummary | str],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run, print the summary or, if asked for, JSON.

    Args:
        name: Of the flow, for the usage line.
        model: Its settings.
        presets: Named complete settings; the first one is the default.
        start: Runs the flow and returns what came out, or only the text to print.
        argv: Arguments; those of the process by default.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong settings, 130 interrupted.
    """
    given = sys.argv[1:] if argv is None else argv
    tell = _Teller(name, as_json="--json" in given)
    try:
        run, options = _parse(name, model, presets, given)
    except ConfigError as error:
        return tell.failure(2, error)
    if options.show_config:
        return tell.settings(run)
    try:
        # a library that prints must not get between the lines of the result
        with contextlib.redirect_stdout(sys.stderr), contextlib.nullcontext() if options.verbose else quiet_console():
            outcome = start(run)
    except KeyboardInterrupt as error:
        said = "interrupted; finished steps are kept, run the same command to go on"
        return tell.failure(_INTERRUPTED, error, said)
    except CharmError as error:
        return tell.failure(1, error)
    except Exception as error:
        if (away := _server_away(error)) is not None:
            return _leave(tell.failure(1, away), at_once=argv is None)
        logging.getLogger(__name__).exception("the run failed")
        return tell.failure(
            1, error, "the run failed unexpectedly; what is above says where" if not tell.as_json else ""
        )
    return tell.outcome(outcome)


def _server_away(error: Exception) -> CharmError | None:
    from flows.session import server_away  # late: it imports what the help does not need

    return server_away(error)


def _leave(status: int, *, at_once: bool) -> int:
    """End this process without the interpreter's exit handlers: Prefect's would try for minutes to reach its server."""
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


class _Teller:
    """Says how it went: for people, or as one JSON object for machines."""

    def __init__(self, name: str, *, as_json: bool) -> None:
        self.as_json, self._name = as_json, name

    def outcome(self, outcome: HasSummary | str) -> int:
        """It is done."""
        if isinstance(outcome, str):
            return self._said(outcome, {"outcome": {"summary": outcome}})
        return self._said(outcome.summary, {"outcome": outcome.model_dump(mode="json")} if self.as_json else {})

    def settings(self, run: BaseModel) -> int:
        """Only the settings were asked for."""
        return self._said(settings_toml(run), {"settings": run.model_dump(mode="json")})

    def failure(self, status: int, error: BaseException, text: str = "") -> int:
        """It went wrong."""
        if self.as_json:
            kind = "Interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
            self._json(status, {"error": {"kind": kind, "message": text or str(error)}})
        else:
            _say(text or f"error: {error}", sys.stderr)
        return status

    def _said(self, text: str, record: dict[str, Any]) -> int:
        self._json(0, record) if self.as_json else _say(text)
        return 0

    def _json(self, status: int, record: dict[str, Any]) -> None:
        _say(json.dumps({"flow": self._name, "exit_status": status, **record}))


def settings_toml(run: BaseModel) -> str:
    """The resolved settings as a TOML file that ``--config`` reads back."""
    return tomli_w.dumps(_without_none(run.model_dump(mode="json")))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As any other wrong setting: argparse would print the hundred options of a flow first."""
        raise ConfigError(f"{message}; see --help")


def _parse(name: str, model: type[Run], presets: Presets[Run], argv: Sequence[str]) -> tuple[Run, argparse.Namespace]:
    parser = _Parser(
        prog=f"python -m flows.{name}",
        description=model.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what an abbreviation means would change with every new setting
    )
    base = parser.add_mutually_exclusive_group()
    first = next(iter(presets), None)
    base.add_argument("--preset", choices=list(presets), help=f"named settings to start from (default: {first})")
    base.add_argument("--config", metavar="FILE.toml", help="file of settings to start from")
    parser.add_argument("--show-config", action="store_true", help="print the resolved settings as TOML and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the outcome or the error")
    parser.add_argument("--verbose", action="store_true", help="print everything that is logged, to standard error")
    settings, source = _settings_class(model, parser)
    options = parser.parse_args(list(argv))
    values = _base_values(options, presets, first)
    try:
        found = settings(_cli_settings_source=source(parsed_args=options), **values)
        return model.model_validate(found.model_dump(exclude_unset=True)), options
    except ValidationError as error:
        raise ConfigError(_readable(error)) from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None


def _settings_class(model: type[Run], parser: argparse.ArgumentParser) -> tuple[Any, Any]:
    class Settings(BaseSettings, model):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(frozen=True, extra="forbid")

        @classmethod
        def settings_customise_sources(  # type: ignore[override] # pydantic passes the sources by name
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **others: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del settings_cls, others
            return (init_settings,)  # a variable called NAME or ARENA in the environment is not meant for us

    source: Any = CliSettingsSource(Settings, root_parser=parser, cli_hide_none_type=True, cli_avoid_json=True)
    return Settings, source


def _base_values(options: argparse.Namespace, presets: Presets[Run], first: str | None) -> dict[str, Any]:
    if options.config:
        path = Path(options.config)
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the settings file {path} is not TOML: {error}") from None
        return {name: _with_none(value) for name, value in document.items()}
    preset = options.preset or first
    return presets[preset]().model_dump(exclude_unset=True) if preset else {}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return _NONE if value is None else value


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_none(item) for item in value]
    return None if value == _NONE else value


def _readable(error: ValidationError) -> str:
    lines = [
        f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg']}"
        + ("" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})")
        for problem in error.errors()
    ]
    return "; ".join(lines) + "; see --help"


def _say(text: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(text + "\n")
