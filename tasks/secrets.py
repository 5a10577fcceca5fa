"""Secrets by name: settings say which secret is meant, the flow says where secrets come from, and no value is kept."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from pydantic import SecretStr

from charm_core.errors import ConfigError

Lookup = Callable[[str], str | None]
"""From the name of a secret to its value, or None where there is none."""

_lookup: ContextVar[Lookup] = ContextVar("charm_secrets")


@contextlib.contextmanager
def use_secrets(lookup: Lookup) -> Iterator[None]:
    """Code called inside finds its secrets with this function."""
    token = _lookup.set(lookup)
    try:
        yield
    finally:
        _lookup.reset(token)


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
