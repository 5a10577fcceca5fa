"""How fast to ask a server: waits between tries, pauses that it asks for, and fewer requests at a time after them."""

import asyncio
import email.utils
import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """How long to wait before the next try, and when to give up on the server."""

    first_wait_seconds: float = 0.5
    """Before the second try; doubled before every further one. Up to half of it is taken off at random."""
    longest_wait_seconds: float = 60.0
    """Most that the doubling comes to."""
    longest_retry_after_seconds: float = 600.0
    """Most that a server may ask for with Retry-After. One that asks for more has closed for the day: that is an error."""
    hopeless_failures: int = 20
    """So many failures of requests in a row, without one answer, are an error of all."""

    def wait(self, tries: int) -> float:
        """Seconds to wait after so many tries; drawn anew every time, so that not all come back at once."""
        longest = min(self.first_wait_seconds * 2.0 ** min(max(tries, 1) - 1, 30), self.longest_wait_seconds)
        return random.uniform(longest / 2, longest)  # noqa: S311 - no secret


class Gate:
    """Lets requests of one event loop through: none while the server asks for a pause, then fewer at a time than before."""

    def __init__(self, most: int) -> None:
        self.inside = 0
        """Requests under way."""
        self.pauses_in_a_row = 0
        """Pauses since the last answer."""
        self._most = float(most)
        self._room = float(most)
        self._opens = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """Most requests that may be under way."""
        return int(self._room)

    async def enter(self) -> None:
        """Wait for the end of a pause and for room."""
        loop = asyncio.get_running_loop()
        while True:
            pause = self._opens - loop.time()
            if pause > 0:
                await asyncio.sleep(pause * random.uniform(1.0, 1.1))  # noqa: S311 - so that not all come at once
            elif self.inside < self.limit:
                self.inside += 1
                return
            else:
                turn = loop.create_future()
                self._waiting.append(turn)
                await turn

    def leave(self) -> None:
        """Make room for another one."""
        self.inside -= 1
        self._let_in()

    def pause(self, seconds: float) -> bool:
        """Let nobody in for a while, and from then on fewer at a time: a quarter less, or half where nobody was answered since.

        Returns:
            Whether this begins a pause; within one, as when many are refused together, it is only made longer.
        """
        now = asyncio.get_running_loop().time()
        begins = self._opens <= now
        if begins:
            self._room = max(1.0, self._room * (0.5 if self.pauses_in_a_row else 0.75))
            self.pauses_in_a_row += 1
        self._opens = max(self._opens, now + seconds)
        return begins

    def answered(self) -> None:
        """Let in one more for every four answers, up to the most that are allowed."""
        self.pauses_in_a_row = 0
        self._room = min(self._most, self._room + 0.25)
        self._let_in()

    def _let_in(self) -> None:
        free = self.limit - self.inside
        while self._waiting and free > 0:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1


def retry_after_seconds(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """How long a server asks to wait before the next try.

    Args:
        headers: Of its answer, by names in lower case: ``retry-after`` in seconds or as a date, or ``retry-after-ms``.
        now: The time; default: the server's own clock (its ``date`` header), else ours.

    Returns:
        Seconds, or None where it does not say, says what cannot be read, or says "at once".
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000 or None
    said = headers.get("retry-after")
    seconds = _number(said)
    if seconds is None:
        at = _date(said)
        now = now or _date(headers.get("date")) or datetime.now(UTC)
        seconds = max(0.0, (at - now).total_seconds()) if at else None
    return seconds or None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _date(text: str | None) -> datetime | None:
    try:
        value = email.utils.parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)
