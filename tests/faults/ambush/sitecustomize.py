"""Halts a process at a named point, so that a test can end something exactly then; imported by Python when it starts.

``NIGHT_AMBUSH`` holds JSON: ``event`` (os.rename or http.client.send), ``pattern`` (of the new name, or of the request) and
``flag`` (a file). The first process that comes to the point writes its number into the file and waits until it is killed or
the file ``flag.go`` is there; at most fifteen minutes. Nothing of CHARM is replaced: the interpreter's own audit events tell.

``NIGHT_CLOCK`` holds seconds by which ``time.time`` is moved.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

_SECONDS = 900


def _lie_in_wait(event: str, pattern: str, flag: str) -> None:
    point, released = re.compile(pattern), Path(f"{flag}.go")

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name != event or not point.search(_text(arguments[1])):
            return
        try:
            file = os.open(flag, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:  # only once
            return
        os.write(file, str(os.getpid()).encode())
        os.close(file)
        deadline = time.monotonic() + _SECONDS
        while not released.exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    sys.addaudithook(hook)


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
    _lie_in_wait(**json.loads(os.environ["NIGHT_AMBUSH"]))
