"""Secrets by name: settings say which secret is meant, the flow says where secrets come from, and no value is kept."""

import contextlib
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from pydantic import SecretStr

from charm_core.errors import ConfigError

Lookup = Callable[[str], str | None]
"""From the name of a secret to its value, or None where there is none."""

_NAME = r"^[A-Z][A-Z0-9_]*$"
SECRET_NAME_SCHEMA: dict[str, Any] = {"pattern": _NAME}
"""For JSON schemas: Prefect's server refuses a key in place of its name before it keeps the run's parameters."""

_lookup: ContextVar[Lookup] = ContextVar("charm_secrets")


@contextlib.contextmanager
def use_secrets(lookup: Lookup) -> Iterator[None]:
    """Code called inside finds its secrets with this function."""
    token = _lookup.set(lookup)
    try:
        yield
    finally:
        _lookup.reset(token)


def check_secret_name(name: str, setting: str) -> None:
    """Refuse what is no name, probably the key itself; the message does not show it.

    Raises:
        ValueError: With the name of the setting.
    """
    if re.fullmatch(_NAME, name) is None:
        raise ValueError(
            f"{setting} is the name of a secret, in capitals, such as MY_KEY, and not the key: put that into an environment "
            f"variable or Prefect Secret block of that name"
        )


def secret(name: str) -> SecretStr:
    """The secret of that name.

    Raises:
        ConfigError: There is none.
    """
    lookup = _lookup.get(None)
    value = lookup(name) if lookup else None
    if not value:
        raise ConfigError(
            f"there is no secret {name!r}: set the environment variable {name}, or make a Prefect Secret block of that name"
        )
    return SecretStr(value)
