"""Time limits end jobs when they say, and age limits keep old messages from starting."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone

from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import dramalite

from helpers import FakeClock
from world import PATIENT, open_broker, places, simulated, worlds

OPTIONS = {name: value for name, value in PATIENT.items() if name != "time_limit"}

limits = st.integers(1, 200)
tens = st.integers(0, 9).map(lambda n: 10 * n)  # So that times meet.
naps = st.lists(st.integers(0, 120), max_size=4)  # What a job takes, in pieces.


def is_ended(event):
    return event.error.startswith("TimeLimitExceeded")


def check_ended(event, nap, limit):
    """Whether a job was ended exactly at its limit, if it would have reached it."""
    assert is_ended(event) == (sum(nap) >= limit)
    assert event.ended_ms - event.started_ms == min(sum(nap), limit)


# Time limits


@simulated
@given(places, worlds, st.lists(st.tuples(naps, limits), min_size=1, max_size=6))
def test_a_job_ends_at_its_time_limit_or_before(place, world, plan):
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, max_retries=0)
        def work(number):
            for nap in plan[number][0]:
                dramalite.simulated_work(nap)

        with dramalite.simulate(broker, **world) as sim:
            for number, (_naps, limit) in enumerate(plan):
                work.send_with_options(args=(number,), time_limit=limit)
            sim.run_until_idle()

    for event in sim.events:
        check_ended(event, *plan[event.message.args[0]])


@simulated
@given(places, worlds, st.lists(st.tuples(naps, limits), min_size=1, max_size=4))
def test_a_coroutine_ends_at_its_time_limit_or_before(place, world, plan):
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, max_retries=0)
        async def work(number):
            for nap in plan[number][0]:
                await asyncio.sleep(10 * nap / 1000)

        with dramalite.simulate(broker, **world) as sim:
            for number, (_naps, limit) in enumerate(plan):
                work.send_with_options(args=(number,), time_limit=10 * limit + 5)
            sim.run_until_idle()

    for event in sim.events:
        nap, limit = plan[event.message.args[0]]
        assert is_ended(event) == (sum(nap) > limit)


@settings(simulated, phases=[Phase.explicit, Phase.generate])  # No better example is needed.
@given(st.integers(0, 10_000), st.lists(st.integers(0, 5000), max_size=4))
@example(11, [1])
def test_a_coroutine_sleeps_as_long_as_it_says(passed, naps):
    with open_broker("memory") as broker:

        @dramalite.actor(broker=broker, max_retries=0)
        async def work():
            for nap in naps:
                await asyncio.sleep(nap / 1000)

        with dramalite.simulate(broker) as sim:
            sim.advance(passed)
            work.send()
            sim.run_until_idle()

    assert sim.events[0].ended_ms - sim.events[0].started_ms == sum(naps)


@settings(simulated, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 100_000))
@example(2007)
def test_the_clock_sleeps_as_long_as_it_is_told(ms):
    with open_broker("memory") as broker, dramalite.simulate(broker) as sim:
        start = sim.now
        broker.clock.sleep(ms / 1000)

        assert sim.now - start == timedelta(milliseconds=ms)


@simulated
@given(st.none() | limits, st.none() | limits, limits)
def test_the_limit_is_the_messages_or_else_the_actors_or_else_the_middlewares(own, actors, default):
    middleware = [dramalite.TimeLimit(time_limit=default), dramalite.Retries()]
    with open_broker("memory", middleware=middleware) as broker:
        options = {} if actors is None else {"time_limit": actors}

        @dramalite.actor(broker=broker, max_retries=0, **options)
        def work():
            dramalite.simulated_work(1000)

        with dramalite.simulate(broker) as sim:
            work.send_with_options(**({} if own is None else {"time_limit": own}))
            sim.run_until_idle()
    limit = next(limit for limit in (own, actors, default) if limit is not None)

    assert sim.events[0].ended_ms - sim.events[0].started_ms == limit


@simulated
@given(places, limits, st.integers(0, 3))
def test_each_attempt_has_the_whole_time_limit(place, limit, retries):
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, max_retries=retries, time_limit=limit, **OPTIONS)
        def work():
            dramalite.simulated_work(1000)

        with dramalite.simulate(broker) as sim:
            work.send()
            sim.run_until_idle()

    assert [event.ended_ms - event.started_ms for event in sim.events] == [limit] * (retries + 1)


# Age limits


@simulated
@given(places, worlds, st.lists(st.tuples(tens, st.none() | tens.filter(bool)), max_size=8))
def test_a_message_starts_if_and_only_if_it_is_younger_than_its_age_limit(place, world, plan):
    ran = set()
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, **PATIENT)
        def work(number):
            ran.add(number)
            dramalite.simulated_work(plan[number][0])

        with dramalite.simulate(broker, **world) as sim:
            for number, (_takes, max_age) in enumerate(plan):
                work.send_with_options(args=(number,), **({} if max_age is None else {"max_age": max_age}))
            sim.run_until_idle()

    for event in sim.events:
        number = event.message.args[0]
        age = event.started_ms - event.message.message_timestamp
        is_too_old = plan[number][1] is not None and age >= plan[number][1]
        assert event.outcome == ("dead" if is_too_old else "done")
        assert (number in ran) == (not is_too_old)


@simulated
@given(places, st.integers(1, 300))
def test_no_retry_starts_at_the_age_limit_or_later(place, max_age):
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, max_retries=None, max_age=max_age, **PATIENT)
        def work():
            raise ValueError("no")

        with dramalite.simulate(broker) as sim:
            message = work.send()
            sim.run_until_idle(max_time=timedelta(hours=1))
    ages = [event.started_ms - message.message_timestamp for event in sim.events]

    assert [event.outcome for event in sim.events] == ["retry"] * (len(ages) - 1) + ["dead"]
    assert all(age < max_age for age in ages[:-1])
    assert ages[-1] >= max_age


# Times are what they are given as


@given(st.integers(0, 10**12))
@example(1001)
def test_a_delay_in_whole_milliseconds_is_exactly_that_as_a_timedelta_too(milliseconds):
    with open_broker("memory", clock=FakeClock()) as broker:
        work = dramalite.actor(print, actor_name="work", broker=broker)
        sent = [work.send_with_options(delay=delay) for delay in (milliseconds, timedelta(milliseconds=milliseconds))]

        assert [message.options["eta"] - broker.clock.now_ms for message in sent] == [milliseconds] * 2


moments = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)).map(
    lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=timezone.utc)
)


@simulated
@given(moments, st.lists(st.integers(0, 10**7), max_size=10))
@example(datetime(2038, 6, 1, tzinfo=timezone.utc), [1] * 20)
@example(datetime(2026, 1, 1, tzinfo=timezone.utc), [1] * 20)
def test_a_simulation_advances_by_exactly_what_it_is_told(start, steps):
    with open_broker("memory") as broker, dramalite.simulate(broker, start=start) as sim:
        times = []
        for step in steps:
            sim.advance(step)
            times.append(sim.now)

        assert times == [start + timedelta(milliseconds=sum(steps[: n + 1])) for n in range(len(steps))]


@simulated
@given(st.lists(moments, min_size=2, max_size=10).map(sorted))
@example([datetime(2026, 1, 1, microsecond=ms * 1000, tzinfo=timezone.utc) for ms in range(20)])
def test_a_simulation_runs_until_exactly_the_time_it_is_told(times):
    with open_broker("memory") as broker, dramalite.simulate(broker, start=times[0]) as sim:
        reached = []
        for time in times:
            sim.run_until(time)
            reached.append(sim.now)

        assert reached == times
