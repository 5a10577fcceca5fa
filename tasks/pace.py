"""How often to tell a server what people only watch: so seldom that telling it takes hardly any of the time."""

import contextlib
import time
from collections.abc import Callable, Iterator

_LEAST_SECONDS, _MOST_SECONDS = 2.0, 30.0
_TIMES_AS_LONG = 500


class Pace:
    """Spaces out what is told on the way.

    After each time nothing is told for 500 times as long as that took, so that what waits for it loses at most 0.2 %, whatever
    the server; but for two seconds at least, and for thirty at most, which a server that takes a tenth of a second would cost
    0.3 %.

    Args:
        clock: Seconds since whenever.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = clock() + _LEAST_SECONDS

    def is_due(self) -> bool:
        """Whether it is time to tell something again."""
        return self._clock() >= self._due

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Around what tells it."""
        started = self._clock()
        try:
            yield
        finally:
            now = self._clock()
            self._due = now + min(max(_LEAST_SECONDS, _TIMES_AS_LONG * (now - started)), _MOST_SECONDS)
