"""Files from the web: polite, bounded, never stale in silence, never unpickled.

A file is asked for with the ETag and the date of the copy that was fetched before; what fails in passing is tried again with
back-off and jitter, as the server asks (Retry-After). Size, time, redirects and protocol are limited. If the server does not
answer, that is an error even though an old copy exists, unless the user said otherwise; then the result says so.
"""

import contextlib
import datetime
import email.utils
import hashlib
import json
import logging
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urljoin, urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from charm_core.errors import ConfigError, ServiceError
from tasks.addresses import shown_address, with_secrets
from tasks.store import file_digest

logger = logging.getLogger(__name__)

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PICKLES = frozenset({".pkl", ".pickle", ".joblib", ".pt", ".pth", ".npy", ".dill"})
_PICKLE_START = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_BLOCK = 1 << 16
_LONGEST_BACKOFF = 60.0
_COPY = "copy.json"
_KEPT_SECONDS = 86_400


class FetchConfig(BaseModel):
    """How files are fetched from the web."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allow_http: bool = Field(default=False, description="Accept addresses without encryption (http).")
    max_megabytes: float = Field(default=512.0, gt=0, description="Largest file.")
    connect_seconds: float = Field(default=10.0, gt=0, description="Longest wait for a connection.")
    read_seconds: float = Field(default=30.0, gt=0, description="Longest silence of the server.")
    total_seconds: float = Field(default=300.0, gt=0, description="Longest time for one try.")
    max_tries: int = Field(default=5, ge=1, description="Tries; only what can pass is tried again.")
    backoff_seconds: float = Field(default=1.0, gt=0, description="First wait between tries; it doubles, with jitter.")
    longest_wait_seconds: float = Field(
        default=120.0, ge=0, description="Longest wait that a server may ask for; if it wants more, the run ends."
    )
    max_redirects: int = Field(default=5, ge=0, description="Most redirects; none of them may leave https.")
    when_down: Literal["error", "use_copy"] = Field(
        default="error",
        description="If the server does not answer: stop, or use the last copy and say so in the report.",
    )


class Fetched(BaseModel):
    """A file from the web, as a local copy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    url: str = Field(description="As it was asked for, with the names of secrets in it.")
    final_url: str = Field(description="After redirects, without login and query.")
    digest: str = Field(description="SHA-256 of its bytes.")
    size: int = Field(description="Bytes.")
    etag: str | None = None
    last_modified: str | None = None
    fetched_at: str = Field(description="When its content was fetched, UTC.")
    outcome: Literal["new", "unchanged", "stale"] = Field(
        default="new", description="Fetched now; the server says that the copy is current; the server did not answer."
    )


class _DownError(ServiceError):
    """The server does not answer: what an old copy may stand in for."""


class _PassingError(Exception):
    """Worth another try, after so many seconds if the server said so."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def fetch(url: str, config: FetchConfig, folder: Path, *, key: str | None = None) -> Fetched:
    """Fetch a file, or learn that the copy is current.

    Args:
        url: Where it is; may name secrets in braces.
        config: Limits.
        folder: Where copies are kept, one per key.
        key: What the file is whatever its version; the address by default.

    Raises:
        ConfigError: An address that is refused: not https, or a pickle.
        ServiceError: The server does not answer; or its answer is not the file: a web page, a pickle, nothing, too much.
    """
    check_url(url, config)
    place = folder / hashlib.sha256((key or url).encode()).hexdigest()[:32]
    copy = _known_copy(place)
    timeout = httpx.Timeout(config.read_seconds, connect=config.connect_seconds)
    try:
        with httpx.Client(timeout=timeout, follow_redirects=False) as client:
            return _with_retries(client, url, config, place, copy)
    except _DownError as error:
        if copy is None or config.when_down == "error":
            hint = f"; to use the copy of {copy.fetched_at}, set fetching.when_down = 'use_copy'" if copy else ""
            raise ServiceError(f"{error}{hint}") from None
        logger.warning("%s; the copy of %s is used", error, copy.fetched_at)
        return copy.model_copy(update={"outcome": "stale"})


def check_url(url: str, config: FetchConfig) -> None:
    """Refuse addresses that must not be fetched.

    Raises:
        ConfigError: Not https, or a pickle.
    """
    parts = urlsplit(url)
    if parts.scheme == "http" and not config.allow_http:
        raise ConfigError(
            f"{url} is not encrypted; use https, or set fetching.allow_http = true if you trust the network"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url} is not an https address; correct it")
    check_not_pickle(parts.path)


def check_not_pickle(name: str) -> None:
    """Refuse a file whose name says that it is a pickle.

    Raises:
        ConfigError: With the reason.
    """
    if Path(name).suffix.lower() in _PICKLES:
        raise ConfigError(
            f"{name} is a pickle: to open one runs whatever code its author put into it, so CHARM never does; take the same "
            f"numbers as Parquet, CSV or JSON, for example from the hub dataset lmarena-ai/leaderboard-dataset"
        )


def suffix_of(head: bytes, name: str) -> str:
    """Suffix by which a file will be read, from its first bytes and its name.

    Raises:
        ServiceError: A web page or a pickle in place of data.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(_PICKLE_START):
        raise ServiceError(f"{name} holds a pickle, whatever it is called; CHARM never unpickles, take another source")
    if start[:1] == b"<":
        raise ServiceError(
            f"{name} is a web page ({start[:40]!r}), not a leaderboard file; use the address of the file itself"
        )
    if head.startswith(b"PAR1"):
        return ".parquet"
    if start[:1] in (b"{", b"["):
        lines = Path(urlsplit(name).path).suffix.lower() in (".jsonl", ".ndjson")
        return ".jsonl" if lines or _is_line_of_json(start) else ".json"
    return ".csv"


def _is_line_of_json(start: bytes) -> bool:
    line, found, rest = start.partition(b"\n")
    if not found or not rest.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _with_retries(client: httpx.Client, url: str, config: FetchConfig, place: Path, copy: Fetched | None) -> Fetched:
    for number in range(1, config.max_tries + 1):
        try:
            return _one_try(client, url, config, place, copy)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url} is not an address: {error}; correct it") from None
        except (_PassingError, httpx.TransportError) as error:
            reason = str(error) or type(error).__name__
            wait = error.wait if isinstance(error, _PassingError) else None
            if wait is not None and wait > config.longest_wait_seconds:
                raise _DownError(f"{url} asks to come back in {wait:.0f} s ({reason}); run again then") from None
            if number == config.max_tries:
                tries = "1 try" if number == 1 else f"{number} tries"
                raise _DownError(f"{url} could not be fetched in {tries}: {reason}; try again later") from None
            pause = _backoff(number, config) if wait is None else wait + _jitter(config.backoff_seconds)
            logger.warning("%s: %s; again in %.1f s (try %d of %d)", url, reason, pause, number, config.max_tries)
            time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def _backoff(number: int, config: FetchConfig) -> float:
    """Full jitter: many that failed together do not come back together."""
    return _jitter(min(config.backoff_seconds * 2 ** (number - 1), _LONGEST_BACKOFF))


def _jitter(most: float) -> float:
    return random.SystemRandom().uniform(0.0, most)


def _one_try(client: httpx.Client, url: str, config: FetchConfig, place: Path, copy: Fetched | None) -> Fetched:
    deadline = time.monotonic() + config.total_seconds
    current = with_secrets(url)
    for _ in range(config.max_redirects + 1):
        with client.stream("GET", current, headers=_headers(copy)) as response:
            if response.status_code not in _REDIRECTS:
                return _received(response, url, config, place, copy, deadline)
            target = urljoin(current, response.headers.get("location", ""))
        _check_redirect(current, target, config)
        current = target
    raise ServiceError(f"{url} redirects more than {config.max_redirects} times; use the final address")


def _headers(copy: Fetched | None) -> dict[str, str]:
    # encoded bodies would need a limit of their own: a small one can unpack to anything
    headers = {"User-Agent": "charm-rm (https://pypi.org/project/charm-rm)", "Accept-Encoding": "identity"}
    if copy is not None and copy.etag:
        headers["If-None-Match"] = copy.etag
    if copy is not None and copy.last_modified:
        headers["If-Modified-Since"] = copy.last_modified
    return headers


def _check_redirect(current: str, target: str, config: FetchConfig) -> None:
    if urlsplit(current).scheme == "https" and urlsplit(target).scheme != "https":
        raise ServiceError(
            f"{shown_address(current)} redirects to {shown_address(target)}, which is not encrypted; this is refused"
        )
    try:
        check_url(shown_address(target), config)
    except ConfigError as error:
        raise ServiceError(f"{shown_address(current)} redirects to an address that is refused: {error}") from None


def _received(
    response: httpx.Response, url: str, config: FetchConfig, place: Path, copy: Fetched | None, deadline: float
) -> Fetched:
    status = response.status_code
    if status == httpx.codes.NOT_MODIFIED and copy is not None:
        return copy.model_copy(update={"outcome": "unchanged"})
    if status in _RETRIED_STATUS:
        raise _PassingError(f"the server answered {status} {response.reason_phrase}", _retry_after(response))
    if status != httpx.codes.OK:
        raise ServiceError(f"{url} answered {status} {response.reason_phrase}; correct the address")
    place.mkdir(parents=True, exist_ok=True)
    with _temporary_file(place) as temporary:
        size = _write_body(response, temporary, config, deadline, url)
        with temporary.open("rb") as file:
            suffix = suffix_of(file.read(_BLOCK), url)
        digest = file_digest(temporary)
        body = temporary.replace(place / f"{digest}{suffix}")
    fetched = Fetched(
        path=body,
        url=url,
        final_url=shown_address(str(response.url)),
        digest=digest,
        size=size,
        etag=response.headers.get("etag"),
        last_modified=response.headers.get("last-modified"),
        fetched_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    _remember(place, fetched)
    return fetched


def _write_body(response: httpx.Response, target: Path, config: FetchConfig, deadline: float, url: str) -> int:
    limit = int(config.max_megabytes * 1_000_000)
    too_large = f"{url} is larger than {config.max_megabytes:g} MB; raise fetching.max_megabytes if that is right"
    if int(response.headers.get("content-length", "0")) > limit:
        raise ServiceError(too_large)
    size = 0
    with target.open("wb") as file:
        for block in response.iter_bytes():
            size += len(block)
            if size > limit:
                raise ServiceError(too_large)
            if time.monotonic() > deadline:
                raise _PassingError(f"not complete after {config.total_seconds:g} s ({size:,} bytes)")
            file.write(block)
    if size == 0:
        raise ServiceError(f"{url} is empty; check the address")
    return size


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, or a date, that the server asks to wait."""
    asked = response.headers.get("retry-after", "").strip()
    if asked.isdigit():
        return float(asked)
    with contextlib.suppress(ValueError, TypeError):
        then = email.utils.parsedate_to_datetime(asked)
        return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None


@contextlib.contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".fetching-", delete=False) as file:
        path = Path(file.name)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _remember(place: Path, fetched: Fetched) -> None:
    """Keep the last copy; older ones go when no run can be reading them any more. The store keeps what was made of them."""
    with _temporary_file(place) as temporary:
        temporary.write_text(fetched.model_dump_json(), encoding="utf-8")
        temporary.replace(place / _COPY)
    for old in place.iterdir():
        if old.name not in (_COPY, fetched.path.name) and old.stat().st_mtime < time.time() - _KEPT_SECONDS:
            old.unlink(missing_ok=True)


def _known_copy(place: Path) -> Fetched | None:
    """The last copy, if it is whole."""
    try:
        copy = Fetched.model_validate_json((place / _COPY).read_bytes())
        # the folder may have been moved
        copy = copy.model_copy(update={"path": place / copy.path.name})
        return copy if file_digest(copy.path) == copy.digest else None
    except (OSError, ValidationError):
        return None
