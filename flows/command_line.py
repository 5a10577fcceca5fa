"""One command line for every flow: ``python -m flows.<name> [--preset NAME | --config FILE.toml] [--section.field value]``.

The settings model of a flow is its form in the Prefect UI, its TOML file and its options; nothing is declared twice.
Precedence: option, then file or preset, then default.
"""

import argparse
import logging
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from charm_core.errors import CharmError, ConfigError

Run = TypeVar("Run", bound=BaseModel)
Presets = Mapping[str, Callable[[], Run]]

_INTERRUPTED = 130


def run_from_command_line(
    name: str, model: type[Run], presets: Presets[Run], start: Callable[[Run], str], argv: Sequence[str] | None = None
) -> int:
    """Parse the command line, run, print the summary.

    Args:
        name: Of the flow, for the usage line.
        model: Its settings.
        presets: Named complete settings; the first one is the default.
        start: Runs the flow and returns the text to print.
        argv: Arguments; those of the process by default.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong settings, 130 interrupted.
    """
    try:
        run, show_only = _parse(name, model, presets, sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        _say(f"error: {error}", sys.stderr)
        return 2
    if show_only:
        _say(settings_toml(run))
        return 0
    try:
        summary = start(run)
    except KeyboardInterrupt:
        _say("interrupted; finished steps are kept, run the same command to go on", sys.stderr)
        return _INTERRUPTED
    except CharmError as error:
        _say(f"error: {error}", sys.stderr)
        return 1
    except Exception:
        logging.getLogger(__name__).exception("the run failed")
        return 1
    _say(summary)
    return 0


def settings_toml(run: BaseModel) -> str:
    """The resolved settings as a TOML file that ``--config`` reads back; what is not set is left out."""
    return tomli_w.dumps(run.model_dump(mode="json", exclude_none=True))


def _parse(name: str, model: type[Run], presets: Presets[Run], argv: Sequence[str]) -> tuple[Run, bool]:
    parser = argparse.ArgumentParser(
        prog=f"python -m flows.{name}", description=model.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    base = parser.add_mutually_exclusive_group()
    first = next(iter(presets), None)
    base.add_argument("--preset", choices=list(presets), help=f"named settings to start from (default: {first})")
    base.add_argument("--config", metavar="FILE.toml", help="file of settings to start from")
    parser.add_argument("--show-config", action="store_true", help="print the resolved settings as TOML and stop")
    settings, source = _settings_class(model, parser)
    options = parser.parse_args(list(argv))
    values = _base_values(options, presets, first)
    try:
        found = settings(_cli_settings_source=source(parsed_args=options), **values)
        return model.model_validate(found.model_dump(exclude_unset=True)), bool(options.show_config)
    except ValidationError as error:
        raise ConfigError(_readable(error)) from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None


def _settings_class(model: type[Run], parser: argparse.ArgumentParser) -> tuple[Any, Any]:
    class Settings(BaseSettings, model):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(frozen=True, extra="forbid")

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)  # a variable called NAME or ARENA in the environment is not meant for us

    source: Any = CliSettingsSource(Settings, root_parser=parser, cli_hide_none_type=True, cli_avoid_json=True)
    return Settings, source


def _base_values(options: argparse.Namespace, presets: Presets[Run], first: str | None) -> dict[str, Any]:
    if options.config:
        path = Path(options.config)
        try:
            return tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the settings file {path} is not TOML: {error}") from None
    preset = options.preset or first
    return presets[preset]().model_dump(exclude_unset=True) if preset else {}


def _readable(error: ValidationError) -> str:
    lines = [
        f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg']}"
        + ("" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})")
        for problem in error.errors()
    ]
    return "; ".join(lines) + "; see --help"


def _say(text: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(text + "\n")
