"""Only time in which a process ran and looked counts as waiting."""

import pytest

from cupy_syncbn.comm import clock

pytestmark = pytest.mark.mpi_skip


@pytest.fixture
def time_of(monkeypatch):
    """Set the time of the operating system."""
    now = [1000.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_time_between_looks_counts(time_of):
    running = clock.RunningClock()
    for _ in range(100):
        time_of(0.01)
        running.look()
    assert running.seconds == pytest.approx(1)


@pytest.mark.parametrize("stop", [1.5, 10, 86400])
def test_a_stop_counts_little(time_of, stop):
    running = clock.RunningClock()
    time_of(0.1)
    running.look()
    time_of(stop)
    assert running.look() == pytest.approx(0.1 + clock.LONGEST_LOOK)


def test_many_short_stops_end_a_wait_at_last(time_of):
    """A process that never runs for long, but looks, does time out."""
    running = clock.RunningClock()
    for _ in range(100):
        time_of(5.0)
        running.look()
    assert running.seconds == pytest.approx(100 * clock.LONGEST_LOOK)


def test_seconds_can_start_anew(time_of):
    running = clock.RunningClock()
    time_of(0.2)
    running.look()
    running.seconds = 0.0
    time_of(0.1)
    assert running.look() == pytest.approx(0.1)
