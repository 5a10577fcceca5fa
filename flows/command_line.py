"""One command line for every flow: ``python -m flows.<name> [--preset NAME | --config FILE] [--section.field value]``.

The settings model of a flow is its form in the Prefect UI, its TOML file and its options; nothing is declared twice.
Precedence: option, then file or preset, then default. ``None`` for a setting that can be left open is written ``None``,
in a file too, where it is the text ``"None"``: TOML has no word for it.
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
_NONE = "None"


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
    """The resolved settings as a TOML file that ``--config`` reads back."""
    return tomli_w.dumps(_without_none(run.model_dump(mode="json")))


def _parse(name: str, model: type[Run], presets: Presets[Run], argv: Sequence[str]) -> tuple[Run, bool]:
    parser = argparse.ArgumentParser(
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
