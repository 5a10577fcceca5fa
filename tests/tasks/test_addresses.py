"""No secret in an address that is kept or shown; the request has it."""

import re

import pytest

from charm_core.errors import ConfigError
from tasks.addresses import SECRETLESS_SCHEMA, check_secretless, shown_address, with_secrets
from tasks.secrets import use_secrets

CANARY = "c4n4ry-5f1d"


@pytest.mark.parametrize(
    "address",
    [
        f"https://user:{CANARY}@example.org/board.csv",
        f"https://{CANARY}@example.org/board.csv",
        f"http://user:{CANARY}@127.0.0.1:80/b",
        f"https://example.org/board.csv?token={CANARY}",
        f"https://example.org/board.csv?a=1&X-Amz-Signature={CANARY}",
        f"https://example.org/board.csv?ACCESS_KEY={CANARY}#there",
        f"https://example.org/board.csv?x={CANARY * 2}",
        f"https://example.org/board.csv?token={{NAME}}{CANARY}",
        f"https://{{LOGIN}}:{CANARY}@example.org/board.csv",
    ],
)
def test_a_secret_is_refused_without_showing_it(address: str):
    with pytest.raises(ValueError, match=r"^arena.source \(host [a-z0-9.]+\) holds a login or a key") as refused:
        check_secretless(address, "arena.source")
    assert CANARY not in str(refused.value)
    assert not re.search(SECRETLESS_SCHEMA["pattern"], address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "boards/2025-02-28.csv",
        "lmarena-ai/leaderboard-dataset",
        "C:\\boards?\\me@home.csv",
        "https://example.org/board.csv?format=csv&download=1",
        "https://example.org/@someone/board.csv",
        "https://{LOGIN}@example.org/board.csv?token={TOKEN}&v=2",
    ],
)
def test_what_holds_none_is_accepted(address: str):
    check_secretless(address, "source")


def test_named_secrets_are_put_in_for_the_request():
    known = {"LOGIN": "me:pass/word", "TOKEN": "a&b"}
    with use_secrets(known.get):
        assert (
            with_secrets("https://{LOGIN}@host/f.csv?token={TOKEN}&v=2#{TOKEN}")
            == "https://me:pass%2Fword@host/f.csv?token=a%26b&v=2#{TOKEN}"
        )
        assert with_secrets("https://host/{TOKEN}.csv") == "https://host/{TOKEN}.csv"
        with pytest.raises(ConfigError, match="no secret 'NOBODY'"):
            with_secrets("https://host/f.csv?token={NOBODY}")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:s@cret@host:8/a/b.csv?token=x#y", "https://host:8/a/b.csv"),
        ("postgresql+psycopg2://charm:secret@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("/data/me@home?", "/data/me@home?"),
        ("https://host/@me", "https://host/@me"),
    ],
)
def test_what_is_shown_of_an_address(address: str, shown: str):
    assert shown_address(address) == shown
