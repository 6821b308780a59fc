"""The seed and what was sent decide what happens: not the place, and no restart."""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import timedelta
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

import dramalite

from world import PATIENT, crashes, open_broker, places, retries, run_with, simulated, worlds


class Job(NamedTuple):
    fails: int
    takes_ms: int
    delay: int | None
    priority: int
    queue: str


jobs = st.builds(
    Job,
    fails=st.sampled_from([0, 1, 4]),
    takes_ms=st.sampled_from([0, 15]),
    delay=st.sampled_from([None, 0, 30]),
    priority=st.sampled_from([0, 3]),
    queue=st.sampled_from(["a", "b"]),
)
plans = st.lists(jobs, min_size=1, max_size=4)
maybe_crashes = st.just([]) | crashes


def declare(broker):
    """One actor a queue, whose messages fail, take time, and lead to others."""
    broker.add_middleware(dramalite.Results(store_results=True))

    def work(fails, takes_ms):
        dramalite.simulated_work(takes_ms)
        if retries() < fails:
            raise ValueError("not yet")
        return [fails, takes_ms]

    options = {**PATIENT, "max_backoff": 10_000}
    actors = {
        queue: dramalite.actor(
            work, broker=broker, actor_name=queue, queue_name=queue, max_retries=3, on_success="note", **options
        )
        for queue in ("a", "b")
    }
    dramalite.actor(lambda _data, _result: None, broker=broker, actor_name="note", **options)
    return actors


def send(actors, plan):
    for job in plan:
        actors[job.queue].send_with_options(
            args=(job.fails, job.takes_ms), delay=job.delay, priority=job.priority
        )


def run(place, world, plan, faults=()):
    with open_broker(place) as broker, dramalite.simulate(broker, **world) as sim:
        send(declare(broker), plan)
        run_with(sim, world, faults)
    return sim.events


@simulated
@given(worlds, plans, maybe_crashes)
def test_the_same_seed_gives_the_same_events_in_memory_and_in_a_file(world, plan, faults):
    assert run("memory", world, plan, faults) == run("file", world, plan, faults)


@simulated
@given(st.integers(0, 999))
def test_another_seed_gives_other_waits(seed):
    plan = [Job(3, 0, None, 0, "a")] * 3
    one, other = (run("memory", {"seed": number}, plan) for number in (seed, seed + 1))

    assert [event.started_ms for event in one] != [event.started_ms for event in other]


# One virtual thread goes on to the next message by itself


def take_steps(sim):
    while sim.step():
        pass


def stop_after(gaps):
    """How to run a simulation with stops, which only a job that takes its time can pass."""

    def run(sim):
        for gap in gaps:
            end = sim.now + timedelta(milliseconds=gap)
            sim.run_until(end)
            assert sim.now == end or any(event.started <= end < event.ended for event in sim.events)
        sim.run_until_idle()

    return run


def run_in_one_thread(place, seed, plan, how):
    with open_broker(place) as broker, dramalite.simulate(broker, seed=seed) as sim:
        send(declare(broker), plan)
        how(sim)
    return sim.events, sim.now


@simulated
@given(places, st.integers(0, 999), plans, st.lists(st.integers(1, 100), max_size=5))
def test_one_thread_does_the_same_at_a_stretch_and_step_by_step_and_with_stops(place, seed, plan, gaps):
    events, now = run_in_one_thread(place, seed, plan, lambda sim: sim.run_until_idle())
    far = now + timedelta(days=1)

    assert run_in_one_thread(place, seed, plan, take_steps) == (events, now)
    assert run_in_one_thread(place, seed, plan, lambda sim: sim.run_until(far)) == (events, far)
    assert run_in_one_thread(place, seed, plan, stop_after(gaps))[0] == events


# Reopening


def contents(broker):
    """All that a file tells of its messages."""
    letters = [(letter.asdict(), letter.reason) for letter in broker.dead_letters]
    return broker.pending(), letters


def run_in_two(place, world, plan, steps, faults):
    """The events of a simulation and of the one that goes on after it; a file is opened again between."""
    with open_broker(place) as broker:
        with dramalite.simulate(broker, **world) as first:
            send(declare(broker), plan)
            for _ in range(steps):
                first.step()
            if faults:
                first.crash(faults[0][1] % world["workers"])
        before = contents(broker)
        if place == "file":
            broker.close()
            broker = dramalite.SQLiteBroker(broker.path, durability="normal")
            declare(broker)
            assert contents(broker) == before
        world = {**world, "seed": world["seed"] + 1000}
        with dramalite.simulate(broker, start=first.now, **world) as second:
            second.run_until_idle()
        after = contents(broker)
        if place == "file":
            broker.close()
            with contextlib.closing(sqlite3.connect(broker.path)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return first.events, before, second.events, after


@simulated
@given(worlds, plans, st.integers(0, 20), maybe_crashes)
def test_a_file_that_is_opened_again_holds_the_same_and_goes_on_the_same(world, plan, steps, faults):
    assert run_in_two("file", world, plan, steps, faults) == run_in_two("memory", world, plan, steps, faults)
