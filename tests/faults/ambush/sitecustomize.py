"""Halts a process at a named point, so that a test can end something exactly then; imported by Python when it starts.

``NIGHT_AMBUSH`` holds a list as JSON, whose points are met one after the other: each counts only when the one before has been
left. A point is ``event``, ``pattern``, ``passed`` and ``flag`` (a file): ``passed`` matches go by in a process, and the first
process that comes to the next one writes its number into the file and waits until it is killed or the file ``flag.go`` is there;
at most fifteen minutes. Events are

- the interpreter's audit events ``os.rename``, ``open`` and ``http.client.send``; the pattern is searched in the new name, in the
  path, in the request;
- ``call``, in the main thread of processes that torchrun has started; the pattern is the full name of a function.

Nothing of CHARM is replaced: the interpreter itself tells.

``NIGHT_CLOCK`` holds seconds by which ``time.time`` is moved.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

_SECONDS = 900


class _Point:
    def __init__(self, event: str, pattern: str, passed: int, flag: str, before: str | None) -> None:
        self.event, self._pattern, self._passed = event, re.compile(pattern), passed
        self._flag, self._released = flag, Path(f"{flag}.go")
        self._left = Path(f"{before}.go") if before else None

    def meet(self, text: str) -> None:
        """Halt here if this is the point, its turn has come and nobody has been here before."""
        if not self._pattern.search(text) or (self._left is not None and not self._left.exists()):
            return
        self._passed -= 1
        if self._passed >= 0:
            return
        try:
            file = os.open(self._flag, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:  # only once
            return
        os.write(file, str(os.getpid()).encode())
        os.close(file)
        deadline = time.monotonic() + _SECONDS
        while not self._released.exists() and time.monotonic() < deadline:
            time.sleep(0.02)


def _lie_in_wait(points: list[dict[str, Any]]) -> None:
    flags = [None, *(point["flag"] for point in points)]
    waiting = [_Point(**point, before=before) for point, before in zip(points, flags, strict=False)]
    events = {point.event for point in waiting} - {"call"}
    calls = [point for point in waiting if point.event == "call"]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in events:
            text = _text(arguments[0 if name == "open" else 1])
            for point in waiting:
                if point.event == name:
                    point.meet(text)

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        if event != "call":
            return
        # not __name__, which is __main__ for the worker's own module
        module = getattr(frame.f_globals.get("__spec__"), "name", "")
        if module.startswith("charm_core."):  # most calls are of others
            for point in calls:
                point.meet(f"{module}.{frame.f_code.co_qualname}")

    sys.addaudithook(hook)
    if calls and "RANK" in os.environ:
        sys.setprofile(profile)


def _text(value: Any) -> str:
    return value[:300].decode("latin-1") if isinstance(value, bytes) else str(value)


def _set_clock(seconds: float) -> None:
    """Move what this process takes for the time of day."""
    real, nanoseconds = time.time, time.time_ns
    time.time = lambda: real() + seconds
    time.time_ns = lambda: nanoseconds() + int(seconds * 1e9)


if "NIGHT_CLOCK" in os.environ:
    _set_clock(float(os.environ["NIGHT_CLOCK"]))
if "NIGHT_AMBUSH" in os.environ:
    _lie_in_wait(json.loads(os.environ["NIGHT_AMBUSH"]))
