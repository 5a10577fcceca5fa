"""Addresses that need a login or a key: settings name the secret, ``https://host/board.csv?token={BOARD_TOKEN}``, and hold none.

Settings are shown and kept: as parameters in Prefect and MLflow, in reports, in cache keys. So a secret in one is refused, and
the name of a secret is replaced by its value only for the request.
"""

import re
from typing import Any
from urllib.parse import quote, urlsplit

from tasks.secrets import secret

_NAMED = r"\{[A-Z][A-Z0-9_]*\}"
_TELLING = ("token", "key", "secret", "sig", "password", "passwd", "pwd", "auth", "credential", "session", "jwt")
# in capitals too: browsers, which read this pattern as well, know no flag within it
_TELLING_NAME = "|".join("".join(f"[{char}{char.upper()}]" for char in word) for word in _TELLING)
_LONGEST_PLAIN_VALUE = 20
_SECRETLESS = (
    rf"^(?![A-Za-z][A-Za-z0-9+.-]*://(?!{_NAMED}@)[^/?#]*@)"
    rf"(?!.*[?&][^=&#]*(?:{_TELLING_NAME})[^=&#]*=(?!{_NAMED}(?:[&#]|$)))"
    rf"(?!.*[?&][^=&#]*=(?!{_NAMED}(?:[&#]|$))[^&#]{{{_LONGEST_PLAIN_VALUE + 1},}})"
)

SECRETLESS_SCHEMA: dict[str, Any] = {"pattern": _SECRETLESS}
"""For JSON schemas: Prefect's server refuses a run with a secret in an address before it keeps the run's parameters."""


def check_secretless(address: str, setting: str) -> None:
    """Refuse an address with a login, or with a query that looks like a key; the message does not show it.

    Raises:
        ValueError: With the name of the setting and what to write instead.
    """
    if re.search(_SECRETLESS, address) is None:
        raise ValueError(
            f"{setting} (host {_host(address)}) holds a login or a key, and settings are kept and shown: put it into a secret "
            f"(environment variable or Prefect Secret block) and name that in braces, https://{{LOGIN}}@host/file or "
            f"https://host/file?token={{TOKEN}}"
        )


def with_secrets(address: str) -> str:
    """The address with the values of the secrets that it names, for a request and nothing else.

    Raises:
        ConfigError: There is no such secret.
    """
    login = re.compile(rf"(?<=://){_NAMED}(?=@)")
    address = login.sub(lambda found: quote(_value(found), safe=":"), address)
    return re.sub(rf"(?<==){_NAMED}(?=[&#]|$)", lambda found: quote(_value(found), safe=""), address)


def shown_address(address: str) -> str:
    """An address without login, query and fragment; a path as it is."""
    if "://" not in address:
        return address
    return re.split(r"[?#]", re.sub(r"(?<=://)[^/?#]*@", "", address))[0]


def _value(named: re.Match[str]) -> str:
    return secret(named[0].strip("{}")).get_secret_value()


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or "unknown"
    except ValueError:
        return "unknown"
