"""Rate limits hold at any moment, whoever works, and refuse nobody while there is room."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

import dramalite

from world import PATIENT, crashes, open_broker, places, run_with, simulated, worlds


class Job(NamedTuple):
    delay: int
    takes_ms: int


class Try(NamedTuple):
    """An attempt to take a place: when, and when it was given back."""

    start: int
    end: int | None  # None where there was no place.


jobs = st.builds(Job, delay=st.integers(0, 2000), takes_ms=st.sampled_from([0, 1, 30, 400]))
plans = st.lists(jobs, min_size=1, max_size=7)
limits = st.integers(1, 3)
spans = st.integers(1, 1500)  # Of buckets, in milliseconds.
faults = st.just([]) | crashes


def run(place, world, plan, make_limiter, faults=()):
    """Jobs that try for a place of a limiter until they get one; what they got."""
    tries = []
    with open_broker(place) as broker:
        limiter = make_limiter(dramalite.SQLiteRateLimiterBackend(broker))

        @dramalite.actor(broker=broker, max_retries=None, **{**PATIENT, "max_backoff": 1000})
        def work(takes_ms):
            start = broker.clock.time_ms()
            with limiter.acquire(raise_on_failure=False) as is_acquired:
                index = len(tries)
                tries.append(Try(start, None))
                if not is_acquired:
                    raise dramalite.RateLimitExceeded("full")
                tries[index] = Try(start, start + takes_ms)  # A crash may end it earlier.
                dramalite.simulated_work(takes_ms)

        with dramalite.simulate(broker, **world) as sim:
            for job in plan:
                work.send_with_options(args=(job.takes_ms,), delay=job.delay or None)
            run_with(sim, world, faults)
            ended = [event for event in sim.events if event.outcome == "done"]

    assert len(ended) == len(plan)
    return tries


def taken(tries):
    """When places were taken, in order."""
    return sorted(attempt.start for attempt in tries if attempt.end is not None)


def most_in_any(window, times):
    """How many of the times are in one window of so many ms, wherever it begins."""
    return max(sum(start <= time < start + window for time in times) for start in times)


def concurrent(limit, ttl=900_000):
    return lambda backend: dramalite.ConcurrentRateLimiter(backend, "key", limit=limit, ttl=ttl)


def bucket(limit, span):
    return lambda backend: dramalite.BucketRateLimiter(backend, "key", limit=limit, bucket=span)


def window(limit, span):
    return lambda backend: dramalite.WindowRateLimiter(backend, "key", limit=limit, window=span / 1000)


# At most so many at a time


def most_at_once(tries):
    """How many places were taken at once; a place that is given back may be taken at that moment."""
    held = [attempt for attempt in tries if attempt.end is not None and attempt.end > attempt.start]
    return max((sum(a.start <= b.start < a.end for a in held) for b in held), default=0)


@simulated
@given(places, worlds, plans, limits)
def test_as_many_as_the_limit_run_at_once_and_no_more(place, world, plan, limit):
    tries = run(place, world, plan, concurrent(limit))
    held = [attempt for attempt in tries if attempt.end is not None]

    assert most_at_once(tries) <= limit
    for attempt in tries:
        if attempt.end is None:
            assert sum(other.start <= attempt.start <= other.end for other in held) >= limit


@simulated
@given(places, worlds, plans, limits, crashes)
def test_places_that_were_lost_in_crashes_are_free_again_after_their_time(place, world, plan, limit, faults):
    """No earlier: a crash gives no place to another."""
    tries = run(place, world, plan, concurrent(limit, ttl=1500), faults)

    assert most_at_once(tries) <= limit
    assert len(taken(tries)) >= len(plan)


@simulated
@given(limits, st.lists(st.booleans(), max_size=30))
def test_places_given_back_are_places_to_take(limit, moves):
    with open_broker("memory") as broker:
        limiter = concurrent(limit)(dramalite.SQLiteRateLimiterBackend(broker))
        held = []
        for take in moves:
            if take:
                place = limiter.acquire(raise_on_failure=False)
                is_acquired = place.__enter__()
                assert is_acquired == (len(held) < limit)
                if is_acquired:
                    held.append(place)
            elif held:
                held.pop().__exit__(None, None, None)


# At most so many in each bucket of time


@simulated
@given(places, worlds, plans, limits, spans, faults)
def test_a_bucket_holds_its_limit_and_no_more_whatever_crashes(place, world, plan, limit, span, faults):
    tries = run(place, world, plan, bucket(limit, span), faults)
    numbers = [time // span for time in taken(tries)]

    assert max(map(numbers.count, numbers)) <= limit
    for attempt in tries:
        if attempt.end is None:
            assert numbers.count(attempt.start // span) == limit


# At most so many in any window of time


@simulated
@given(places, worlds, plans, limits, st.integers(1000, 1500), faults)
def test_a_window_holds_its_limit_and_no_more_wherever_it_begins(place, world, plan, limit, span, faults):
    """Whatever crashes meanwhile."""
    tries = run(place, world, plan, window(limit, span), faults)
    times = taken(tries)
    part = span // 20  # To so much it is exact.

    assert most_in_any(span, times) <= limit
    for attempt in tries:
        if attempt.end is None:
            assert sum(attempt.start - span - 2 * part <= time <= attempt.start for time in times) >= limit


#: 20,000ths of a window; many a moment before one is over.
gaps_in_window = st.integers(0, 20_000) | st.integers(19_000, 19_999)

#: Windows are told in parts, 20 of them where that comes out even.
spans = st.integers(1000, 100_000) | st.integers(50, 5000).map(lambda part: 20 * part)


@simulated
@given(spans, limits, st.lists(gaps_in_window, min_size=1, max_size=40))
def test_a_window_holds_for_any_gaps_between_attempts(span, limit, gaps):
    times = []
    with open_broker("memory") as broker, dramalite.simulate(broker) as sim:
        limiter = window(limit, span)(dramalite.SQLiteRateLimiterBackend(broker))
        for gap in gaps:
            sim.advance(timedelta(milliseconds=gap * span // 20_000))
            with limiter.acquire(raise_on_failure=False) as is_acquired:
                if is_acquired:
                    times.append(broker.clock.time_ms())

    assert most_in_any(span, times) <= limit
