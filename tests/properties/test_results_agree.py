"""The stored result of a message and what became of it are the same at every moment."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import json_values
from world import PATIENT, count, open_broker, places, retries, simulated, worlds

OPTIONS = {name: value for name, value in PATIENT.items() if name != "result_ttl"}


class Job(NamedTuple):
    value: Any
    end: str
    fails: int
    takes_ms: int


jobs = st.builds(
    Job,
    value=st.integers() | json_values,
    end=st.sampled_from(["ok", "ok", "dead", "skip"]),
    fails=st.sampled_from([0, 0, 1, 2]),
    takes_ms=st.sampled_from([0, 0, 20]),
)
plans = st.lists(jobs, min_size=1, max_size=5)
#: Text without control characters, which are escaped in errors.
plain_texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
faults = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), max_size=2)


def declare(broker, plan):
    @dramalite.actor(broker=broker, max_retries=2, throws=ArithmeticError, **PATIENT)
    def work(number):
        job = plan[number]
        dramalite.simulated_work(job.takes_ms)
        if retries() < job.fails:
            raise ValueError("not yet")
        if job.end != "ok":
            raise ArithmeticError(f"number {number}") if job.end == "dead" else dramalite.SkipMessage
        return job.value

    return work


def found(message):
    """What the result of a message is, in a word or two."""
    try:
        return "value", message.get_result()
    except dramalite.ResultMissing:
        return "missing", None
    except dramalite.ResultFailure as failure:
        return "failure", (failure.orig_exc_type, failure.orig_exc_msg)


def expected(sim, message, job):
    """What it must be, by the events so far."""
    if count(sim.events, "done")[message.message_id]:
        return "value", job.value
    if count(sim.events, "skipped")[message.message_id]:
        return "value", None
    if count(sim.events, "dead")[message.message_id]:
        return "failure", ("ArithmeticError", f"number {message.args[0]}")
    return "missing", None


@simulated
@given(places, worlds, plans, faults)
def test_results_agree_with_outcomes_after_each_step(place, world, plan, faults):
    with open_broker(place) as broker:
        dramalite.set_broker(broker)
        work = declare(broker, plan)
        with dramalite.simulate(broker, **world) as sim:
            sent = [work.send(number) for number in range(len(plan))]
            crashes = {steps: worker for steps, worker in faults}
            steps = 0
            is_going_on = True
            while is_going_on:
                is_going_on = sim.step()
                steps += 1
                if steps in crashes:
                    sim.crash(crashes[steps] % world["workers"])
                for message, job in zip(sent, plan):
                    assert found(message) == expected(sim, message, job)


@simulated
@given(places, st.integers(1, 10**9), st.sampled_from(["actor", "message", "middleware"]))
def test_a_result_is_kept_for_its_time_and_no_longer(place, ttl, given_to):
    options = {"result_ttl": ttl}
    with open_broker(place) as broker:
        dramalite.set_broker(broker)
        broker.add_middleware(dramalite.Results(**(options if given_to == "middleware" else {})))

        @dramalite.actor(broker=broker, **OPTIONS, **(options if given_to == "actor" else {}))
        def work():
            return 42

        with dramalite.simulate(broker) as sim:
            message = work.send_with_options(**(options if given_to == "message" else {}))
            sim.run_until_idle()
            sim.advance(ttl - 1)
            assert found(message) == ("value", 42)
            sim.advance(1)

            assert found(message) == ("missing", None)


@simulated
@given(places, plain_texts, st.integers(0, 2))
def test_a_failure_keeps_the_type_and_the_text_of_the_last_error(place, text, max_retries):
    with open_broker(place) as broker:
        dramalite.set_broker(broker)

        @dramalite.actor(broker=broker, max_retries=max_retries, **PATIENT)
        def work():
            raise LookupError(text) if retries() == max_retries else ValueError("an earlier one")

        with dramalite.simulate(broker) as sim:
            message = work.send()
            sim.run_until_idle()
            found_there = found(message)

    assert found_there == ("failure", ("LookupError", text))


@simulated
@given(places, st.integers(1, 4), st.integers(0, 2))
def test_the_result_of_a_message_that_killed_its_workers_says_so(place, max_crashes, fails):
    with open_broker(place) as broker:
        dramalite.set_broker(broker)

        @dramalite.actor(broker=broker, **{**PATIENT, "max_crashes": max_crashes})
        def work():
            if retries() < fails:
                raise ValueError("not yet")
            sim.crash()

        with dramalite.simulate(broker) as sim:
            message = work.send()
            sim.run_until_idle()
            kind, (error, _text) = found(message)

    assert (kind, error) == ("failure", "WorkerCrashed")


@simulated
@given(places, st.integers(0, 3), st.integers(1, 200))
def test_waiting_for_a_result_ends_when_it_is_there_or_with_its_time(place, fails, seconds):
    with open_broker(place) as broker:
        dramalite.set_broker(broker)

        @dramalite.actor(broker=broker, store_results=True)
        def work():
            if retries() < fails:
                raise ValueError("not yet")
            return 42

        with dramalite.simulate(broker) as sim:
            start = sim.now
            message = work.send()
            try:
                value = message.get_result(block=True, timeout=1000 * seconds)
            except dramalite.ResultTimeout:
                value = None
            waited = sim.now - start
            sim.run_until_idle()
            took = sim.events[-1].ended - start

    assert value == (42 if took <= timedelta(seconds=seconds) else None)
    assert waited == min(took, timedelta(seconds=seconds))
