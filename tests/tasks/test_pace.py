"""What is told on the way costs a fixed share of the time, however slow the server is."""

import pytest

from tasks.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("took", "pause"),
    [(0.0, 2.0), (0.003, 2.0), (0.02, 10.0), (0.05, 25.0), (0.1, 30.0), (60.0, 30.0)],
)
def test_the_pause_is_500_times_as_long_as_telling_within_bounds(took: float, pause: float):
    clock = Clock()
    pace = Pace(clock)
    with pace.telling():
        clock.now += took
    clock.now += pause - 0.001
    assert not pace.is_due()
    clock.now += 0.002
    assert pace.is_due()


def test_at_the_beginning_there_is_nothing_to_tell_yet():
    clock = Clock()
    pace = Pace(clock)
    assert not pace.is_due()
    clock.now += 2.0
    assert pace.is_due()


def test_a_telling_that_fails_counts_too():
    clock = Clock()
    pace = Pace(clock)

    def tell() -> None:
        with pace.telling():
            clock.now += 0.02
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tell()
    clock.now += 9.0
    assert not pace.is_due()
