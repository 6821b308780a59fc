"""The clock: the engine's only source of time, which a broker can be given; durations as users give them."""

from __future__ import annotations

import asyncio
import datetime
import functools
import threading
import time

import pytest

import dramalite

from helpers import DEADLINE


def test_the_systems_clock_tells_unix_time_in_milliseconds():
    before = time.time() * 1000
    now = dramalite.Clock().time_ms()

    assert isinstance(now, int)
    assert before - 1 <= now <= time.time() * 1000 + 1


def test_the_systems_stopwatch_never_goes_back():
    clock = dramalite.Clock()
    readings = [clock.monotonic() for _ in range(100)]

    assert readings == sorted(readings)


def test_sleeping_lets_time_pass():
    clock = dramalite.Clock()
    before = time.monotonic()
    clock.sleep(0.01)

    assert time.monotonic() - before >= 0.009


def test_a_broker_has_the_systems_clock_unless_it_is_given_another(make_broker, clock):
    assert type(make_broker().clock) is dramalite.Clock
    assert make_broker(clock=clock).clock is clock


def test_messages_are_stamped_by_the_brokers_clock(make_broker, clock):
    make_broker(clock=clock)
    message = dramalite.actor(print, actor_name="work").message()
    delayed = dramalite.actor(print, actor_name="other").send_with_options(delay=5000)

    assert message.message_timestamp == clock.now_ms
    assert delayed.options["eta"] == clock.now_ms + 5000


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1500, 1500),
        (0, 0),
        (1500.9, 1500),
        (datetime.timedelta(seconds=1, microseconds=500_900), 1500),
        (datetime.timedelta(0), 0),
    ],
)
def test_a_duration_is_milliseconds_or_a_timedelta_cut_to_whole_ones(broker, given, expected):
    work = dramalite.actor(print, actor_name="work", max_age=given)

    assert work.options["max_age"] == expected
    assert type(work.options["max_age"]) is int


@pytest.mark.parametrize("given", ["10", True, [1], object()])
def test_what_is_no_duration_is_refused_with_the_options_name(broker, given):
    with pytest.raises(TypeError, match="max_age"):
        dramalite.actor(print, actor_name="work", max_age=given)


@pytest.mark.parametrize(
    "given", [-1, -0.5, float("nan"), float("inf"), 2**53 + 1, datetime.timedelta(seconds=-1)]
)
def test_a_duration_out_of_bounds_is_refused_with_the_options_name(broker, given):
    with pytest.raises(ValueError, match="max_age"):
        dramalite.actor(print, actor_name="work", max_age=given)


# Timeouts


SECOND = datetime.timedelta(seconds=1)


def times_out(wait):
    """The error of a wait that is to last 1 s, of virtual time where it can."""
    with pytest.raises((dramalite.ResultTimeout, dramalite.QueueJoinTimeout)):
        wait(timeout=SECOND)
    with pytest.raises((dramalite.ResultTimeout, dramalite.QueueJoinTimeout)):
        wait(timeout=datetime.timedelta(days=-1))  # Over already.
    with pytest.raises(TypeError, match="timeout is '5'; give milliseconds"):
        wait(timeout="5")


def test_every_wait_takes_a_timedelta_and_refuses_what_is_no_time(make_broker):
    broker = make_broker()
    work = dramalite.actor(lambda *args: 1, actor_name="work", store_results=True, broker=broker)
    with dramalite.simulate(broker) as sim:
        sent = work.send_with_options(delay=60_000)
        members = dramalite.group([work.message(), work.message()]).run(delay=60_000)
        steps = (work.message() | work.message()).run(delay=60_000)
        before = sim.now
        for wait in (
            functools.partial(sent.get_result, block=True),
            functools.partial(steps.get_result, block=True),
            members.wait,
            lambda timeout: list(members.get_results(block=True, timeout=timeout)),
            lambda timeout: list(steps.get_results(block=True, timeout=timeout)),
            lambda timeout: broker.join("default", timeout=timeout),
            lambda timeout: asyncio.run(sent.get_result_async(timeout=timeout)),
        ):
            times_out(wait)
        waited = sim.now - before

    assert waited == 7 * SECOND


def test_a_barrier_and_the_stop_of_a_worker_take_a_timedelta(broker):
    backend = dramalite.SQLiteRateLimiterBackend(broker)
    barrier = dramalite.Barrier(backend, "barrier", ttl=60_000)
    worker = dramalite.Worker(broker, worker_threads=1)
    worker.start()
    worker.stop(timeout=datetime.timedelta(minutes=1))

    assert barrier.create(parties=2)
    assert barrier.wait(timeout=datetime.timedelta(milliseconds=1)) is False


def test_waits_end_where_a_test_has_frozen_the_time_module(make_stub_broker, monkeypatch):
    broker = make_stub_broker()
    dramalite.actor(print, actor_name="work").send(1)
    now, raised = time.monotonic(), []

    def join():
        try:
            broker.join("default", timeout=50)
        except dramalite.QueueJoinTimeout as error:
            raised.append(error)

    with monkeypatch.context() as frozen:
        frozen.setattr(time, "monotonic", lambda: now)
        joining = threading.Thread(target=join, daemon=True)
        joining.start()
        joining.join(DEADLINE)

    assert len(raised) == 1
