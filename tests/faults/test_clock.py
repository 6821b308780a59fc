"""A wall clock that jumps by days: only delayed work goes by it, and nothing runs twice or never."""

from __future__ import annotations

import os
import threading
from collections import Counter

import dramalite
import pytest
from helpers import DEADLINE, FakeClock, wait_until

DAY = 24 * 3600 * 1000

JUMPS = pytest.mark.parametrize("jump", [3 * DAY, -3 * DAY], ids=["forwards", "backwards"])


class SteppedClock(FakeClock):
    """A wall clock that can be set; the stopwatch doesn't notice."""

    def step(self, milliseconds):
        self.now_ms += milliseconds


@pytest.fixture
def clock():
    return SteppedClock()


@pytest.fixture
def broker(make_file_broker, clock):
    return make_file_broker(clock=clock, durability="normal")


@pytest.fixture
def ran():
    return Counter()


@pytest.fixture
def job(broker, ran):
    @dramalite.actor(max_retries=0)
    def job(number):
        ran[number] += 1

    return job


@pytest.fixture
def held(broker, ran):
    """An actor that runs until its event `release` is set."""
    release = threading.Event()

    @dramalite.actor(max_retries=0, time_limit=60_000)
    def held():
        ran["held"] += 1
        assert release.wait(DEADLINE)
        ran["held to its end"] += 1

    held.release = release
    return held


@JUMPS
def test_what_is_sent_after_a_jump_runs_at_once_and_what_runs_is_not_disturbed(broker, worker, clock, ran, job, held, jump):
    worker(broker, worker_threads=2)
    worker(broker, worker_threads=1)
    held.send()
    job.send(1)
    wait_until(lambda: ran["held"] and ran[1])
    clock.step(jump)
    for number in range(2, 12):
        job.send(number)
    wait_until(lambda: ran[11])
    held.release.set()
    broker.join("default", timeout=DEADLINE * 1000)

    assert ran == {"held": 1, "held to its end": 1, **{number: 1 for number in range(1, 12)}}
    assert broker.dead_letters == []


@JUMPS
def test_the_order_of_sending_holds_through_a_jump(broker, clock, ran, job, jump):
    for number in range(10):
        job.send(number)
        if number == 4:
            clock.step(jump)
    broker.drain()

    assert list(ran) == list(range(10))


def test_a_delayed_message_is_due_by_the_clock_as_it_is_set(broker, worker, clock, ran, job):
    worker(broker)
    job.send_with_options(args=(1,), delay=2 * DAY)
    job.send(2)
    wait_until(lambda: ran[2])
    clock.step(-DAY)
    job.send(3)
    wait_until(lambda: ran[3])
    clock.step(2 * DAY)
    job.send(4)
    wait_until(lambda: ran[4])
    assert ran[1] == 0
    clock.step(DAY)

    wait_until(lambda: ran[1])


@JUMPS
def test_a_retry_at_once_comes_at_once_though_the_clock_jumps(broker, worker, clock, ran, jump):
    @dramalite.actor(max_retries=3, min_backoff=0, max_backoff=0)
    def second_time_lucky():
        ran["tries"] += 1
        if ran["tries"] == 1:
            clock.step(jump)
            raise RuntimeError("The first time fails.")

    worker(broker)
    second_time_lucky.send()
    broker.join("default", timeout=DEADLINE * 1000)

    assert ran["tries"] == 2


@JUMPS
def test_a_result_is_waited_for_while_its_message_waits_though_the_clock_jumps(broker, clock, jump):
    tries = Counter()

    @dramalite.actor(max_retries=3, min_backoff=0, max_backoff=0, store_results=True)
    def second_time_lucky():
        tries["in all"] += 1
        if tries["in all"] == 1:
            clock.step(jump)
            raise RuntimeError("The first time fails.")
        return "well done"

    message = second_time_lucky.send()
    with pytest.raises(RuntimeError, match="Still not drained"):
        broker.drain(max_messages=1)

    with pytest.raises(dramalite.ResultMissing) as caught:
        message.get_result()
    assert not isinstance(caught.value, dramalite.ResultUnavailable)
    broker.drain()
    assert message.get_result() == "well done"


@JUMPS
def test_what_a_dead_worker_held_comes_back_though_the_clock_jumps(place, broker, worker, clock, ran, job, held, jump):
    place.jobs(
        """
        @dramalite.actor(max_retries=0)
        def held():
            note("held")
            os.kill(os.getpid(), signal.SIGKILL)

        @dramalite.actor(max_retries=0)
        def job(number):
            pass
        """
    )
    held.release.set()
    place.start_script(
        """
        import dramalite, jobs

        jobs.held.send()
        dramalite.Worker(jobs.broker, worker_threads=1).start()
        jobs.until(lambda: False)
        """
    ).wait()
    clock.step(jump)
    worker(broker)

    wait_until(lambda: ran["held to its end"])


# The clock of a real process


@pytest.mark.torture
def test_the_clock_of_a_worker_process_may_jump_by_days(place, compiled):
    place.jobs(
        """
        from pathlib import Path

        HERE = Path(JOURNAL).parent

        @dramalite.actor(max_retries=0)
        def job(number):
            note("ran", number, int(time.time()))

        @dramalite.actor(max_retries=0)
        def held(number):
            note("start", number)
            until(lambda: (HERE / "release").exists(), 60)
            note("end", number)
        """
    )
    setting = place.folder / "clock"

    def set_clock(days):
        (place.folder / "clock.new").write_text(str(days * 24 * 3600))
        os.replace(place.folder / "clock.new", setting)

    set_clock(0)
    tree = place.worker(threads=2, LD_PRELOAD=compiled("stepped_clock.c"), STEPPED_CLOCK=str(setting))
    place.send("held", 1)
    place.send("job", "delayed", delay=DAY)
    place.wait_until(lambda: place.notes("start", 1), "the worker is up")
    for number, days in enumerate([3, -3, 0, -400, 400, 0]):
        set_clock(days)
        place.send("job", number)
        place.wait_until(lambda: place.notes("ran", number), f"a job runs at once, {days} days off")
        if days == 3:
            place.wait_until(lambda: place.notes("ran", "delayed"), "what is due by the new clock runs")
    place.worker(threads=1)  # With the right clock.
    place.send("job", "late", delay=2200)  # When this one runs, that worker had time to take over.
    place.wait_until(lambda: place.notes("ran", "late"), "the delayed message runs")
    (place.folder / "release").touch()
    place.drained()

    clocks = [int(note[2]) for note in sorted(place.notes("ran")) if note[1].isdigit()]
    assert clocks[0] - clocks[1] > 5 * 24 * 3600  # So the clock did jump.
    assert place.runs("ran") == {key: 1 for key in ("0", "1", "2", "3", "4", "5", "delayed", "late")}
    assert place.runs("start") == place.runs("end") == {"1": 1}
    assert place.dead() == 0
    assert "Traceback" not in tree.output()
