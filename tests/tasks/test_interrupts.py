"""What must not be cut in two by Ctrl-C or by a cancelled flow run is not."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tasks.interrupts import WholeCalls, signals_wait


class Terminated(BaseException):
    """What the handler of SIGTERM raises here, as Prefect's does."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    def terminated(*_: object) -> None:
        raise Terminated

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, terminated)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Writer:
    def __init__(self, number: int) -> None:
        self.number, self.written = number, 0

    def write(self, times: int, *, by: int = 1) -> int:
        os.kill(os.getpid(), self.number)
        for _ in range(times):
            self.written += by
        return self.written


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_call_is_finished_and_then_the_signal_counts(number: int, error: type[BaseException]):
    writer = Writer(number)
    with pytest.raises(error):
        WholeCalls(writer).write(1000, by=2)
    assert writer.written == 2000


def test_without_a_signal_the_call_returns_what_it_returns():
    assert WholeCalls(Writer(0)).write(3, by=2) == 6


def test_blocks_in_blocks_wait_for_the_outermost():
    seen = []

    def work() -> None:
        with signals_wait():
            with signals_wait():
                os.kill(os.getpid(), signal.SIGINT)
                seen.append("inner")
            seen.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["inner", "outer"]


def test_an_error_of_the_call_is_raised_as_it_is_and_the_handlers_are_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), signals_wait():
        1 / 0  # noqa: B018
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_nobody_handles_is_left_alone():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals_wait():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_threads_may_use_it():
    done = []

    def work() -> None:
        with signals_wait():
            done.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]
