"""A message dies after its last retry or its last crash, neither before nor later, and is kept."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import json_objects
from world import PATIENT, count, open_broker, places, retries, simulated, worlds

CRASH, FAIL, RETRY, SKIP, ABORT, OK = "crash", "fail", "retry", "skip", "abort", "ok"
OPTIONS = {name: value for name, value in PATIENT.items() if name != "max_crashes"}

scripts = st.lists(st.sampled_from([CRASH, CRASH, FAIL, FAIL, RETRY, SKIP, ABORT, OK]), max_size=8)
limits = st.integers(1, 4)


def run(place, script, *, max_retries=20, options=None, **actor_options):
    """The events of a message whose attempts go by a script and in the end well, and the dead letters."""
    attempts = iter(script)
    told = []
    with open_broker(place, max_crashes=actor_options.pop("brokers_limit", 3)) as broker:

        @dramalite.actor(
            broker=broker, max_retries=max_retries, throws=ArithmeticError, **{**OPTIONS, **actor_options}
        )
        def work(**_kwargs):
            what = next(attempts, OK)
            if what == CRASH:
                sim.crash()
            if what != OK:
                raise {
                    FAIL: ValueError("a failure"),
                    RETRY: dramalite.Retry(delay=5),
                    SKIP: dramalite.SkipMessage("skipped"),
                    ABORT: ArithmeticError("aborted"),
                }[what]

        @dramalite.actor(broker=broker)
        def exhausted(data, counts):
            told.append((data["message_id"], counts["retries"]))

        for name in ("succeeded", "failed"):
            dramalite.actor(lambda _data, _what, name=name: told.append(name), actor_name=name, broker=broker)
        with dramalite.simulate(broker) as sim:
            message = work.send_with_options(**(options or {}))
            sim.run_until_idle()
            assert broker.pending() == []
            letters = broker.dead_letters
    return [event for event in sim.events if event.actor == "work"], letters, told, message


def expected(script, max_retries, max_crashes):
    """The outcomes that a script leads to."""
    outcomes = []
    for what in [*script, OK]:
        if what == CRASH:
            outcomes.append("crashed")
            if outcomes.count("crashed") == max_crashes:
                return [*outcomes, "dead"]
        elif what in (FAIL, RETRY) and outcomes.count("retry") < max_retries:
            outcomes.append("retry")
        else:
            return [*outcomes, {OK: "done", SKIP: "skipped"}.get(what, "dead")]
    return outcomes


@simulated
@given(places, scripts, st.integers(0, 4), limits)
def test_a_message_ends_after_its_last_retry_or_its_last_crash(place, script, max_retries, max_crashes):
    events, letters, _told, message = run(place, script, max_retries=max_retries, max_crashes=max_crashes)
    outcomes = [event.outcome for event in events]

    assert outcomes == expected(script, max_retries, max_crashes)
    assert [letter.message_id for letter in letters] == [message.message_id] * outcomes.count("dead")


@simulated
@given(places, scripts, st.integers(0, 4), limits)
def test_callbacks_are_told_of_each_success_and_failure(place, script, max_retries, max_crashes):
    """Not of what was skipped, nor of a crash unless it is the last."""
    options = {"max_crashes": max_crashes, "on_success": "succeeded", "on_failure": "failed"}
    events, _letters, told, _message = run(place, script, max_retries=max_retries, **options)
    outcomes = [event.outcome for event in events]

    assert told.count("succeeded") == outcomes.count("done")
    assert told.count("failed") == outcomes.count("retry") + outcomes.count("dead")


@simulated
@given(scripts, st.integers(0, 4), st.none() | st.integers(0, 4))
def test_the_messages_own_number_of_retries_goes_first(script, of_actor, of_message):
    options = {} if of_message is None else {"max_retries": of_message}
    events, *_ = run("memory", script, max_retries=of_actor, options=options)

    most = of_actor if of_message is None else of_message
    assert [event.outcome for event in events] == expected(script, most, 3)


@simulated
@given(st.none() | limits, st.none() | limits, limits)
def test_the_messages_own_number_of_crashes_goes_first(own, actors, brokers):
    events, *_ = run(
        "memory",
        [CRASH] * 9,
        options={} if own is None else {"max_crashes": own},
        brokers_limit=brokers,
        **({} if actors is None else {"max_crashes": actors}),
    )
    limit = next(limit for limit in (own, actors, brokers) if limit is not None)

    assert [event.outcome for event in events] == ["crashed"] * limit + ["dead"]


@simulated
@given(places, st.lists(st.sampled_from([CRASH, FAIL]), max_size=4))
def test_a_message_that_must_not_run_again_dies_with_its_first_crash(place, script):
    events, *_ = run(place, script, on_crash="fail")

    assert [event.outcome for event in events] == expected(script, 20, 1)


@simulated
@given(places, st.lists(st.sampled_from([FAIL, RETRY, CRASH]), max_size=6), st.integers(0, 6))
def test_retry_when_decides_alone_and_knows_the_count(place, script, most):
    asked = []

    def retry_when(count, error):
        asked.append((count, type(error)))
        return count < most

    events, *_ = run(place, script, max_retries=0, max_crashes=1000, retry_when=retry_when)
    outcomes = expected(script, most, 1000)
    failures = [ValueError if what == FAIL else dramalite.Retry for what in script if what != CRASH]

    assert [event.outcome for event in events] == outcomes
    assert asked == list(enumerate(failures[: outcomes.count("retry") + (outcomes[-1] == "dead")]))


@simulated
@given(places, scripts, st.integers(0, 3))
def test_whoever_wants_to_know_is_told_once_when_the_retries_are_used_up(place, script, max_retries):
    events, _letters, told, message = run(
        place, script, max_retries=max_retries, max_crashes=1000, on_retry_exhausted="exhausted"
    )
    is_exhausted = events[-1].outcome == "dead" and not events[-1].error.startswith("ArithmeticError")

    assert told == [(message.message_id, max_retries)] * is_exhausted


@simulated
@given(places, scripts, json_objects, st.integers(0, 3))
def test_a_dead_letter_is_the_message_as_it_ended(place, script, kwargs, max_retries):
    events, letters, _told, message = run(
        place, script, max_retries=max_retries, max_crashes=3, options={"kwargs": kwargs}
    )
    failures = [event for event in events if event.error and event.outcome != "skipped"]

    for letter in letters:
        assert (letter.args, letter.kwargs) == (message.args, kwargs)
        assert letter.message_timestamp == message.message_timestamp
        assert letter.queue_name == "default"
        if not events[-1].error.startswith("WorkerCrashed"):
            assert letter.reason == failures[-1].error


@simulated
@given(places, worlds, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_each_message_has_its_own_count(place, world, plan):
    with open_broker(place) as broker:

        @dramalite.actor(broker=broker, **PATIENT)
        def work(fails):
            dramalite.simulated_work(1)
            if retries() < fails:
                raise ValueError("not yet")

        with dramalite.simulate(broker, **world) as sim:
            sent = [
                work.send_with_options(args=(fails,), max_retries=most).message_id for fails, most in plan
            ]
            sim.run_until_idle()
            dead = {letter.message_id for letter in broker.dead_letters}

    assert dead == {id_ for id_, (fails, most) in zip(sent, plan) if fails > most}
    assert count(sim.events, "retry") == {id_: min(both) for id_, both in zip(sent, plan) if min(both)}


@simulated
@given(st.integers(-(10**8), 10**8) | st.integers(-3, 3))
def test_a_dead_letter_is_kept_for_seven_days(more_ms):
    with open_broker("file") as broker:

        @dramalite.actor(broker=broker, max_retries=0)
        def work():
            raise ValueError("no")

        with dramalite.simulate(broker) as sim:
            work.send()
            sim.run_until_idle()
        with dramalite.simulate(broker, start=sim.now + timedelta(days=7, milliseconds=more_ms)) as sim:
            sim.run_until_idle()
            letters = broker.dead_letters

    assert len(letters) == (more_ms <= 0)
