"""Nothing is lost, and nothing is done twice but what a crash repeats."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import json_objects

from world import PATIENT, by_message, count, crashes, open_broker, places, retries, run_with, simulated, worlds


class Job(NamedTuple):
    fails: int
    takes_ms: int
    delay: int | None
    priority: int


jobs = st.builds(
    Job,
    fails=st.sampled_from([0, 0, 1, 2]),
    takes_ms=st.sampled_from([0, 0, 5, 40]),
    delay=st.sampled_from([None, None, 0, 30]),
    priority=st.sampled_from([0, 0, -1, 5]),
)
plans = st.lists(jobs, min_size=1, max_size=5)


def declare(broker, plan, starts):
    """An actor that does a job of the plan, by its number, and one that is told of its success."""

    @dramalite.actor(broker=broker, on_success="note", **PATIENT)
    def work(number):
        starts.append(number)
        dramalite.simulated_work(plan[number].takes_ms)
        if retries() < plan[number].fails:
            raise ValueError("not yet")
        return number

    @dramalite.actor(broker=broker, actor_name="note", **PATIENT)
    def note(_data, number):
        return number

    return work


def send(work, plan):
    for number, job in enumerate(plan):
        work.send_with_options(args=(number,), delay=job.delay, priority=job.priority)


def run(place, world, plan, faults=()):
    """The numbers of the jobs as they started, and the events of the simulation."""
    starts = []
    with open_broker(place) as broker:
        work = declare(broker, plan, starts)
        with dramalite.simulate(broker, **world) as sim:
            send(work, plan)
            run_with(sim, world, faults)
            left = broker.pending() + broker.dead_letters

    assert left == []
    return starts, sim.events


def successes(events, actor="work"):
    return count([e for e in events if e.actor == actor], "done", lambda event: event.result)


@simulated
@given(places, worlds, plans)
def test_each_job_runs_exactly_once_while_nothing_crashes(place, world, plan):
    starts, _events = run(place, world, plan)

    assert Counter(starts) == {number: job.fails + 1 for number, job in enumerate(plan)}


@simulated
@given(places, worlds, plans, crashes)
def test_each_job_and_what_it_sends_succeed_exactly_once_whatever_crashes(place, world, plan, faults):
    _starts, events = run(place, world, plan, faults)

    assert successes(events) == dict.fromkeys(range(len(plan)), 1)
    assert successes(events, "note") == dict.fromkeys(range(len(plan)), 1)


@simulated
@given(places, worlds, st.lists(st.tuples(jobs, st.integers(0, 2)), min_size=1, max_size=5), st.just([]) | crashes)
def test_each_success_and_each_failed_attempt_is_told_of_exactly_once(place, world, plan, faults):
    """Also by workers that die: an attempt that a crash ended has neither succeeded nor failed."""
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, on_success="succeeded", on_failure="failed", **PATIENT)
        def work(number):
            job = plan[number][0]
            dramalite.simulated_work(job.takes_ms)
            if retries() < job.fails:
                raise ValueError("not yet")
            return number

        for name in ("succeeded", "failed"):
            dramalite.actor(lambda data, _what: data.args[0], actor_name=name, broker=broker, **PATIENT)
        with dramalite.simulate(broker, **world) as sim:
            for number, (job, max_retries) in enumerate(plan):
                options = {"delay": job.delay, "priority": job.priority, "max_retries": max_retries}
                work.send_with_options(args=(number,), **options)
            run_with(sim, world, faults)
    good = {number for number, (job, max_retries) in enumerate(plan) if job.fails <= max_retries}
    failures = {number: min(job.fails, max_retries + 1) for number, (job, max_retries) in enumerate(plan)}

    assert successes(sim.events, "succeeded") == dict.fromkeys(good, 1)
    assert successes(sim.events, "failed") == {number: times for number, times in failures.items() if times}


@simulated
@given(places, worlds, plans, crashes)
def test_a_job_starts_again_only_after_a_failure_or_a_crash_and_counts_them(place, world, plan, faults):
    starts, events = run(place, world, plan, faults)

    assert Counter(starts) == Counter(event.message.args[0] for event in events if event.actor == "work")
    for attempts in by_message(events).values():
        assert [event.attempt for event in attempts] == list(range(1, len(attempts) + 1))


@simulated
@given(places, json_objects, st.lists(st.sampled_from(["fail", "crash"]), max_size=4))
def test_a_job_gets_what_was_sent_also_after_failures_and_crashes(place, kwargs, script):
    received = []
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, **PATIENT)
        def work(**kwargs):
            message = dramalite.CurrentMessage.get_current_message()
            received.append((kwargs, message.message_id, message.message_timestamp, message.queue_name))
            what = script[len(received) - 1] if len(received) <= len(script) else "end"
            if what == "crash":
                sim.crash()
            if what == "fail":
                raise ValueError("not yet")

        with dramalite.simulate(broker) as sim:
            sent = work.send(**kwargs)
            sim.run_until_idle()

    expected = (kwargs, sent.message_id, sent.message_timestamp, sent.queue_name)
    assert received == [expected] * (len(script) + 1)


@simulated
@given(places, worlds, plans, st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_graceful_stops_lose_nothing_and_count_as_nothing(place, world, plan, stops):
    events = []
    start = None
    with open_broker(place) as broker:
        work = declare(broker, plan, [])
        for steps in stops:
            with dramalite.simulate(broker, start=start, **world) as sim:
                if start is None:
                    send(work, plan)
                for _ in range(steps):
                    sim.step()
            start = sim.now
            events += sim.events
            world = {**world, "seed": world["seed"] + 1000}  # Other message ids.
            if place == "file":
                broker.close()  # The next use opens it again.
        with dramalite.simulate(broker, start=start, **world) as sim:
            sim.run_until_idle()
        events += sim.events

    assert successes(events) == dict.fromkeys(range(len(plan)), 1)
    assert successes(events, "note") == dict.fromkeys(range(len(plan)), 1)
    for attempts in by_message(events).values():
        assert [event.attempt for event in attempts] == list(range(1, len(attempts) + 1))


@simulated
@given(places, st.integers(0, 999), st.integers(2, 3), plans, crashes)
def test_what_was_running_in_a_crash_runs_alone_in_its_worker(place, seed, threads, plan, faults):
    world = {"workers": 1, "threads": threads, "seed": seed}
    _starts, events = run(place, world, plan, faults)
    crashed = set(count(events, "crashed"))
    suspect = [e for e in events if e.attempt > 1 and e.message_id in crashed and is_after_crash(e, events)]
    spans = sorted((event.started_ms, event.ended_ms) for event in suspect)

    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))


def is_after_crash(event, events):
    """Whether the message of an event was running in a crash before."""
    before = events[: events.index(event)]
    return any(e.message_id == event.message_id and (e.outcome, e.error) == ("crashed", "") for e in before)
