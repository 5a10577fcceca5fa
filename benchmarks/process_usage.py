"""What the processes that a benchmark starts use: memory, on GPUs theirs, and processor time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Self

import psutil
import torch

SAMPLE_SECONDS = 0.05


class PeakMemory:
    """The most memory that the processes below this one hold together while it is open, or, where there are GPUs, on the first ones."""

    def __init__(self, gpus: int) -> None:
        self.most = 0
        self._gpus = gpus
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._before = gpu_bytes(self._gpus)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(SAMPLE_SECONDS):
            now = gpu_bytes(self._gpus) - self._before if torch.cuda.is_available() else _resident_bytes()
            self.most = max(self.most, now)


def gpu_bytes(gpus: int) -> int:
    """What is in use on the first so many GPUs, whoever uses it; 0 without GPUs."""
    if not torch.cuda.is_available():
        return 0
    each: list[tuple[int, int]] = [torch.cuda.mem_get_info(number) for number in range(gpus)]
    return sum(total - free for free, total in each)


def _resident_bytes() -> int:
    return sum(_of_children(lambda process: process.memory_info().rss))


def cpu_seconds() -> float:
    """What the processes below this one have used so far."""
    times = _of_children(psutil.Process.cpu_times)
    return sum(each.user + each.system for each in times)


def _of_children(ask: Callable[[psutil.Process], Any]) -> Iterator[Any]:
    """What the processes below this one answer, those that end meanwhile left out."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            yield ask(process)
