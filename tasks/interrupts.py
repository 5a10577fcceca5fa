"""Calls that Ctrl-C or a cancelled flow run must not cut in two: what raises waits until they have returned."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Ctrl-C and termination take effect at the end of the block, if Python code handles them in this thread.

    Only for what ends soon by itself. It may be used within itself, and in other threads than the main one it does nothing: no
    signal is ever raised there.
    """
    came: list[tuple[signal.Signals, FrameType | None]] = []
    handlers: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, lambda number, frame: came.append((signal.Signals(number), frame)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in came:
        handlers[number](number, frame)


class WholeCalls:
    """An object whose methods are never cut in two by a signal."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        """A method of the wrapped object."""
        method = getattr(self._wrapped, name)

        def whole(*args: Any, **options: Any) -> Any:
            with signals_wait():
                return method(*args, **options)

        return whole
