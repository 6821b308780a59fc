"""simulate(): virtual time on the real engine, its schedule, its faults, and what it tells."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import socket
import sqlite3
import sys
import threading
import time
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dramalite

from helpers import DEADLINE

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def flaky(broker):
    """An actor that fails as often as its argument says, then returns."""

    @dramalite.actor(store_results=True)
    def flaky(times):
        retries = dramalite.CurrentMessage.get_current_message().options.get("retries", 0)
        if retries < times:
            raise ValueError(f"failure {retries + 1}")
        return times

    return flaky


@pytest.fixture
def work(broker):
    """An actor that takes as many milliseconds as its argument says."""

    @dramalite.actor(max_retries=0)
    def work(ms):
        dramalite.simulated_work(ms)

    return work


def outcomes(sim):
    return [event.outcome for event in sim.events]


# Time


def test_backoff_passes_without_waiting(broker, flaky):
    with dramalite.simulate(broker, seed=7) as sim:
        flaky.send(2)
        sim.run_until_idle()

    assert outcomes(sim) == ["retry", "retry", "done"]
    first, second, third = sim.events
    assert timedelta(seconds=15) <= second.started - first.ended <= timedelta(seconds=30)
    assert timedelta(seconds=30) <= third.started - second.ended <= timedelta(seconds=60)
    assert (first.next_eta, second.next_eta, third.next_eta) == (second.started, third.started, None)
    assert sim.now == third.ended


def test_an_event_tells_all_about_an_attempt(broker, flaky):
    with dramalite.simulate(broker) as sim:
        message = flaky.send(1)
        sim.run_until_idle()

    first, second = sim.events
    assert first.message == message.copy(options={})
    assert (first.message_id, first.actor, first.attempt) == (message.message_id, "flaky", 1)
    assert (first.error, first.result) == ("ValueError: failure 1", None)
    assert (second.attempt, second.error, second.result) == (2, "", 1)
    assert (second.worker, second.thread) == (0, 0)
    assert second.message.options["retries"] == 1
    assert "flaky" in str(first) and "failure 1" in str(first) and "retry" in str(first)


def test_time_starts_where_it_is_told_and_stands_still(broker):
    start = datetime(2031, 5, 5, 12, tzinfo=timezone.utc)
    with dramalite.simulate(broker, start=start) as sim:
        assert sim.now == start
        assert broker.clock.time_ms() == start.timestamp() * 1000

    assert dramalite.simulate(broker).now == START


@pytest.mark.parametrize(
    ("duration", "units", "expected"),
    [
        (1500, {}, timedelta(milliseconds=1500)),
        (timedelta(days=3), {}, timedelta(days=3)),
        (0, {"minutes": 5}, timedelta(minutes=5)),
        (250, {"hours": 1, "seconds": 2}, timedelta(hours=1, seconds=2.25)),
    ],
)
def test_advance_moves_time_by_a_duration(broker, duration, units, expected):
    with dramalite.simulate(broker) as sim:
        sim.advance(duration, **units)

        assert sim.now == START + expected


def test_advance_runs_what_is_due_meanwhile_and_no_more(broker, work):
    with dramalite.simulate(broker) as sim:
        for seconds in (10, 20, 30):
            work.send_with_options(args=(0,), delay=seconds * 1000)
        sim.advance(seconds=20)

        assert [event.started for event in sim.events] == [START + timedelta(seconds=s) for s in (10, 20)]
        assert len(sim.pending()) == 1


def test_run_until_stops_at_a_time(broker, work):
    with dramalite.simulate(broker) as sim:
        work.send_with_options(args=(0,), delay=5000)
        sim.run_until(START + timedelta(milliseconds=4999))
        assert sim.events == []
        sim.run_until(START + timedelta(seconds=5))

        assert outcomes(sim) == ["done"]


def test_sleeping_on_the_clock_outside_of_jobs_lets_the_world_go_on(broker, work):
    with dramalite.simulate(broker) as sim:
        work.send_with_options(args=(0,), delay=1000)
        broker.clock.sleep(2)

        assert outcomes(sim) == ["done"]
        assert sim.now == START + timedelta(seconds=2)


def test_jobs_take_the_time_they_say(broker, work):
    with dramalite.simulate(broker) as sim:
        work.send(1500)
        work.send(500)
        sim.run_until_idle()

    first, second = sim.events
    assert first.ended - first.started == timedelta(milliseconds=1500)
    assert second.started == first.ended
    assert sim.now == START + timedelta(seconds=2)


def test_threads_work_at_the_same_virtual_time(broker, work):
    with dramalite.simulate(broker, threads=3) as sim:
        for _ in range(3):
            work.send(1000)
        sim.run_until_idle()

    assert {event.started for event in sim.events} == {START}
    assert sim.now == START + timedelta(seconds=1)
    assert {event.thread for event in sim.events} == {0, 1, 2}


def test_simulated_work_takes_no_time_outside_of_simulations(clock):
    dramalite.simulated_work(10**9)

    assert clock.slept == []


def test_coroutines_sleep_in_virtual_time(broker):
    @dramalite.actor(time_limit=10**9, store_results=True)
    async def sleeper(seconds):
        await asyncio.sleep(seconds)
        return seconds

    with dramalite.simulate(broker, workers=2) as sim:
        message = sleeper.send(86_400)
        sleeper.send(3600)
        sim.run_until_idle()

        assert sim.now - START == timedelta(days=1)
        assert sorted(event.result for event in sim.events) == [3600, 86_400]
    assert message.message_id in {event.message_id for event in sim.events}


def test_a_simulation_runs_inside_a_running_event_loop(broker):
    @dramalite.actor
    async def sleeper():
        await asyncio.sleep(1)

    async def main():
        with dramalite.simulate(broker) as sim:
            sleeper.send()
            sim.run_until_idle()
            return sim

    assert outcomes(asyncio.run(main())) == ["done"]


# What depends on time


def test_a_time_limit_ends_a_job_in_virtual_time(broker):
    cleaned = []

    @dramalite.actor(time_limit=1000, max_retries=0)
    def slow():
        try:
            dramalite.simulated_work(5000)
        except dramalite.TimeLimitExceeded:
            cleaned.append(sim.now)
            raise

    with dramalite.simulate(broker) as sim:
        slow.send()
        sim.run_until_idle()

    assert cleaned == [START + timedelta(seconds=1)]
    assert sim.events[0].error.startswith("TimeLimitExceeded")
    assert outcomes(sim) == ["dead"]


def test_a_time_limit_cancels_a_coroutine(broker):
    cleaned = []

    @dramalite.actor(time_limit=1000, max_retries=0)
    async def slow():
        try:
            await asyncio.sleep(50)
        finally:
            cleaned.append(sim.now)

    with dramalite.simulate(broker) as sim:
        slow.send()
        sim.run_until_idle()

    assert cleaned == [START + timedelta(seconds=1)]
    assert sim.events[0].error.startswith("TimeLimitExceeded")


def test_an_age_limit_is_reached_behind_a_long_job(broker, work):
    @dramalite.actor(max_age=1000)
    def fresh():
        pass

    with dramalite.simulate(broker) as sim:
        work.send(999)
        fresh.send()
        work.send(2)
        fresh.send()
        sim.run_until_idle()

    assert [(e.actor, e.outcome) for e in sim.events] == [
        ("work", "done"), ("fresh", "done"), ("work", "done"), ("fresh", "dead"),
    ]  # fmt: skip


def test_results_expire_in_virtual_time(broker):
    @dramalite.actor(store_results=True, result_ttl=60_000)
    def answer():
        return 42

    with dramalite.simulate(broker) as sim:
        message = answer.send()
        sim.run_until_idle()
        sim.advance(59_999)
        assert message.get_result() == 42
        sim.advance(1)
        with pytest.raises(dramalite.ResultMissing):
            message.get_result()


def test_waiting_for_a_result_runs_the_simulation(broker, flaky):
    with dramalite.simulate(broker) as sim:
        message = flaky.send(2)

        assert message.get_result(block=True, timeout=3_600_000) == 2
        assert sim.now - START < timedelta(minutes=2)


def test_waiting_for_a_result_ends_with_its_virtual_timeout(broker, flaky):
    with dramalite.simulate(broker) as sim:
        message = flaky.send(2)
        with pytest.raises(dramalite.ResultTimeout):
            message.get_result(block=True, timeout=10_000)

        assert sim.now == START + timedelta(seconds=10)


def test_a_result_is_seen_at_the_moment_it_comes(broker, flaky):
    """Not when the next message is due, to which a simulation may go on by itself."""
    with dramalite.simulate(broker) as sim:
        later = flaky.send_with_options(args=(0,), delay=60_000)
        message = flaky.send(0)

        assert message.get_result(block=True, timeout=3_600_000) == 0
        assert sim.now == START
        assert later.get_result(block=True, timeout=3_600_000) == 0
        assert sim.now == START + timedelta(minutes=1)


def test_a_job_waits_for_a_result_until_its_virtual_timeout(broker, flaky):
    seen = []

    @dramalite.actor(max_retries=0)
    def waiting():
        with pytest.raises(dramalite.ResultTimeout):
            later.get_result(block=True, timeout=5000)
        seen.append(sim.now)

    with dramalite.simulate(broker) as sim:
        later = flaky.send_with_options(args=(0,), delay=1000)
        waiting.send()
        sim.run_until_idle()

    assert seen == [START + timedelta(seconds=5)]
    assert outcomes(sim) == ["done", "done"]


def test_join_runs_the_simulation(broker, flaky):
    with dramalite.simulate(broker) as sim:
        flaky.send(3)
        broker.join("default")

        assert outcomes(sim) == ["retry", "retry", "retry", "done"]


def test_a_concurrency_limit_holds_while_jobs_take_time(broker):
    limiter = dramalite.ConcurrentRateLimiter(dramalite.SQLiteRateLimiterBackend(broker), "one", limit=1)
    spans = []

    @dramalite.actor(min_backoff=100, max_backoff=100)
    def limited():
        with limiter.acquire():
            started = sim.now
            dramalite.simulated_work(500)
            spans.append((started, sim.now))

    with dramalite.simulate(broker, workers=2, threads=2) as sim:
        for _ in range(4):
            limited.send()
        sim.run_until_idle()

    assert len(spans) == 4
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    assert "retry" in outcomes(sim)


def test_urgent_messages_overtake_those_that_wait(broker, work):
    with dramalite.simulate(broker) as sim:
        work.send(100)
        sim.step()
        sim.step()
        for priority in (5, 0, -5, 0):
            work.send_with_options(args=(priority,), priority=priority)
        sim.run_until_idle()

    assert [event.message.args[0] for event in sim.events] == [100, -5, 0, 0, 5]


# The schedule


def run_mix(broker, work, flaky, **options):
    """A few messages of all kinds; their events."""
    with dramalite.simulate(broker, **options) as sim:
        for n in range(4):
            work.send(100 * n)
            flaky.send(n)
            work.send_with_options(args=(50,), delay=70 * n, priority=n % 2)
        sim.run_until_idle()
    broker.flush_all()
    return sim.events


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (2, 2)])
def test_the_same_seed_gives_the_same_events(broker, work, flaky, sizes):
    options = {"workers": sizes[0], "threads": sizes[1]}
    first = run_mix(broker, work, flaky, seed=3, **options)
    again = run_mix(broker, work, flaky, seed=3, **options)
    other = run_mix(broker, work, flaky, seed=4, **options)

    assert first == again
    assert first != other


def test_the_same_seed_gives_the_same_events_on_all_versions(broker, work, flaky):
    events = run_mix(broker, work, flaky, seed=3, workers=2)

    start = 1000 * int(START.timestamp())
    shown = [(e.actor, e.attempt, e.outcome, e.worker, e.started_ms - start) for e in events]
    assert shown == EXPECTED


EXPECTED = [
    ("work", 1, "done", 0, 0),
    ("flaky", 1, "done", 1, 0),
    ("flaky", 1, "retry", 1, 0),
    ("work", 1, "done", 0, 0),
    ("flaky", 1, "retry", 0, 100),
    ("work", 1, "done", 1, 0),
    ("flaky", 1, "retry", 1, 200),
    ("work", 1, "done", 1, 200),
    ("work", 1, "done", 1, 250),
    ("work", 1, "done", 1, 300),
    ("work", 1, "done", 0, 100),
    ("work", 1, "done", 1, 350),
    ("flaky", 2, "done", 1, 19169),
    ("flaky", 2, "retry", 0, 24720),
    ("flaky", 2, "retry", 0, 25293),
    ("flaky", 3, "retry", 0, 58800),
    ("flaky", 3, "done", 1, 70286),
    ("flaky", 4, "done", 0, 161789),
]


@given(data=st.data())
def test_a_caller_chooses_the_schedule(data):
    broker = dramalite.MemoryBroker()
    ran = []

    @dramalite.actor(broker=broker)
    def note(n):
        ran.append(n)

    chosen = []

    def choose(steps):
        assert len(steps) > 1
        step = data.draw(st.sampled_from(steps))
        chosen.append(step)
        return step

    with dramalite.simulate(broker, workers=3, choose=choose) as sim:
        for n in range(6):
            note.send(n)
        sim.run_until_idle()

    assert ran == list(range(6))
    assert chosen
    assert {step.action for step in chosen} <= {"recover", "exchange", "resume"}
    broker.close()


def test_a_choice_that_is_none_of_the_steps_is_an_error(broker, work):
    with dramalite.simulate(broker, workers=2, choose=lambda steps: "the first") as sim:
        with pytest.raises(ValueError, match="the first"):
            sim.step()


def test_step_says_whether_there_was_anything_to_do(broker, work):
    with dramalite.simulate(broker) as sim:
        while sim.step():
            pass
        work.send(0)
        assert sim.step()
        while sim.step():
            pass

        assert outcomes(sim) == ["done"]


def test_a_job_cannot_take_steps(broker):
    @dramalite.actor(max_retries=0)
    def recursive():
        sim.step()

    with dramalite.simulate(broker) as sim:
        recursive.send()
        sim.run_until_idle()

    assert "steps of a simulation" in sim.events[0].error


# Ends


def test_an_endless_retry_fails_with_the_last_events(broker):
    @dramalite.actor(max_retries=None)
    def never():
        raise ValueError("never")

    with dramalite.simulate(broker) as sim:
        never.send()
        with pytest.raises(dramalite.SimulationError) as caught:
            sim.run_until_idle()

    text = str(caught.value)
    assert text.count("ValueError: never") == 10
    assert "1 messages are not finished" in text


def test_endless_steps_at_one_time_fail(broker):
    @dramalite.actor(max_retries=None, min_backoff=0, max_backoff=0)
    def never():
        raise ValueError("never")

    with dramalite.simulate(broker) as sim:
        never.send()
        with pytest.raises(dramalite.SimulationError, match="after 50 steps"):
            sim.run_until_idle(max_steps=50)


def test_endless_steps_fail_with_the_last_events_though_a_message_that_is_left_cannot_be_read(make_file_broker):
    broker = make_file_broker()

    @dramalite.actor
    def endless():
        endless.send()

    endless.send()
    endless.send_with_options(delay=3_600_000)
    with contextlib.closing(sqlite3.connect(broker.path)) as connection, connection:
        connection.execute("UPDATE dramalite_messages SET body = x'00' WHERE eta > 0")

    with dramalite.simulate(broker) as sim:
        with pytest.raises(dramalite.SimulationError, match="after 5 steps") as caught:
            sim.run_until_idle(max_steps=5)

    assert "messages are not finished" in str(caught.value)
    assert "worker 0: endless" in str(caught.value)


def test_max_time_bounds_the_virtual_time(broker, work):
    with dramalite.simulate(broker) as sim:
        work.send_with_options(args=(0,), delay=3_600_000)
        with pytest.raises(dramalite.SimulationError, match="1000 ms"):
            sim.run_until_idle(max_time=timedelta(seconds=1))
        sim.run_until_idle()

        assert outcomes(sim) == ["done"]


def test_a_simulation_that_ends_in_time_is_no_error(broker, work):
    with dramalite.simulate(broker) as sim:
        work.send(0)
        sim.run_until_idle(max_steps=10, max_time=0)

    assert outcomes(sim) == ["done"]


@pytest.mark.parametrize("place", ["hook", "job"])
def test_a_subclass_of_skip_message_skips_as_well(broker, place):
    class Cancelled(dramalite.SkipMessage):
        pass

    def cancel(*_args):
        raise Cancelled("not today")

    if place == "hook":
        broker.add_middleware(type("Cancel", (dramalite.Middleware,), {"before_process_message": cancel})())
    work = dramalite.actor(cancel if place == "job" else print, actor_name="work")
    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert [(event.outcome, event.error) for event in sim.events] == [("skipped", "Cancelled: not today")]


# Crashes


def test_a_crash_repeats_what_ran(broker, work):
    with dramalite.simulate(broker, threads=2) as sim:
        message = work.send(1000)
        sim.advance(500)
        sim.crash()
        sim.run_until_idle()

    assert [(e.outcome, e.attempt) for e in sim.events] == [("crashed", 1), ("done", 2)]
    assert {event.message_id for event in sim.events} == {message.message_id}
    assert sim.events[0].ended == START + timedelta(milliseconds=500)
    assert sim.events[1].started == START + timedelta(milliseconds=500)


def test_a_crash_leaves_the_other_workers_alone(broker, work):
    with dramalite.simulate(broker, workers=2) as sim:
        work.send(1000)
        work.send(1000)
        sim.advance(500)
        sim.crash(1)
        sim.run_until_idle()

    assert sorted((e.outcome, e.attempt) for e in sim.events) == [("crashed", 1), ("done", 1), ("done", 2)]


def test_more_workers_may_die_than_there_are_slots_for(broker, work):
    with dramalite.simulate(broker, workers=2, threads=2, choose=lambda steps: steps[0]) as sim:
        work.send(1000)
        for _ in range(130):
            sim.crash(1)
            sim.advance(1)
        sim.crash(0)
        sim.crash(1)
        sim.run_until_idle()

    assert outcomes(sim) == ["crashed", "done"]


def test_a_job_that_kills_its_worker_becomes_a_dead_letter(broker):
    @dramalite.actor(max_crashes=3)
    def poison():
        sim.crash(0)

    with dramalite.simulate(broker) as sim:
        poison.send()
        sim.run_until_idle()

        assert outcomes(sim) == ["crashed", "crashed", "crashed", "dead"]
        assert [letter.actor_name for letter in broker.dead_letters] == ["poison"]
        assert sim.pending() == []


def test_crashes_are_no_retries(broker):
    @dramalite.actor(max_retries=1)
    def unlucky():
        attempts.append(sim.now)
        if len(attempts) == 1:
            sim.crash(0)
        if len(attempts) == 2:
            raise ValueError("a real failure")

    attempts = []
    with dramalite.simulate(broker) as sim:
        unlucky.send()
        sim.run_until_idle()

    assert outcomes(sim) == ["crashed", "retry", "done"]


def test_what_an_unwound_job_does_reaches_nobody(broker, work):
    @dramalite.actor(max_retries=0)
    def careful():
        try:
            dramalite.simulated_work(1000)
        finally:
            work.send(1)

    with dramalite.simulate(broker, threads=2) as sim:
        careful.send()
        sim.advance(500)
        sim.crash()

        assert [message.actor_name for message in sim.pending()] == ["careful"]
        sim.run_until_idle()
    assert [event.actor for event in sim.events] == ["careful", "careful", "work"]


def test_an_outcome_that_was_not_written_is_lost_with_its_worker(broker, work):
    with dramalite.simulate(broker) as sim:
        work.send(0)
        sim.step()  # recover
        sim.step()  # take the message and run it
        sim.crash()
        sim.run_until_idle()

    assert outcomes(sim) == ["crashed", "done"]


def test_a_paused_worker_takes_nothing(broker, work):
    with dramalite.simulate(broker) as sim:
        sim.pause()
        work.send(0)
        work.send_with_options(args=(0,), delay=1000)
        sim.run_until_idle()
        assert sim.events == []
        sim.advance(seconds=2)
        assert sim.events == []
        sim.resume()
        sim.run_until_idle()

        assert outcomes(sim) == ["done", "done"]


# Brokers


def test_without_a_broker_the_default_ones_actors_run_in_memory(make_file_broker, tmp_path):
    broker = make_file_broker()
    ran = []

    @dramalite.actor
    def note(n):
        ran.append(n)

    note.send(1)
    with dramalite.simulate() as sim:
        note.send(2)
        sim.run_until_idle()

    assert ran == [2]
    assert [message.args for message in broker.pending()] == [(1,)]


def test_a_file_that_is_given_is_worked_on(make_file_broker):
    first = make_file_broker()

    @dramalite.actor(broker=first)
    def note():
        raise ValueError("not yet")

    with dramalite.simulate(first) as sim:
        note.send()
        sim.advance(1000)
    first.close()
    second = make_file_broker()

    @dramalite.actor(broker=second, actor_name="note")
    def note_again():
        pass

    with dramalite.simulate(second, start=sim.now) as again:
        again.run_until_idle()

    assert outcomes(sim) == ["retry"]
    assert [(event.outcome, event.attempt) for event in again.events] == [("done", 2)]


def test_a_simulation_puts_the_brokers_clock_and_randomness_back(broker, work):
    clock, random = broker.clock, broker.random
    with dramalite.simulate(broker):
        assert broker.clock is not clock
    assert (broker.clock, broker.random) == (clock, random)
    assert abs(work.message(0).message_timestamp - clock.time_ms()) < 60_000


def test_a_simulation_that_cannot_open_the_database_leaves_the_broker_as_it_was(make_file_broker):
    broker = make_file_broker("missing/queue.db")
    clock, random = broker.clock, broker.random
    with pytest.raises(dramalite.BrokerError, match="missing"), dramalite.simulate(broker):
        pass

    assert (broker.clock, broker.random) == (clock, random)


def test_a_broker_can_be_simulated_once_its_database_can_be_opened(make_file_broker, tmp_path):
    broker = make_file_broker("missing/queue.db")
    work = dramalite.actor(lambda: None, actor_name="work")
    with pytest.raises(dramalite.BrokerError, match="missing"), dramalite.simulate(broker):
        pass
    (tmp_path / "missing").mkdir()
    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert outcomes(sim) == ["done"]


def test_a_simulation_whose_file_goes_away_puts_the_brokers_clock_and_randomness_back(make_file_broker, tmp_path):
    broker = make_file_broker()
    clock, random = broker.clock, broker.random
    work = dramalite.actor(lambda: None, actor_name="work")
    with pytest.raises(dramalite.BrokerError), dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()
        (tmp_path / "queue.db").unlink()

    assert (broker.clock, broker.random) == (clock, random)


def test_jobs_under_way_go_back_when_the_simulation_ends(broker, work):
    with dramalite.simulate(broker, threads=2) as sim:
        work.send(1000)
        sim.advance(500)
    assert [message.actor_name for message in broker.pending()] == ["work"]

    with dramalite.simulate(broker, start=sim.now) as again:
        again.run_until_idle()
    assert [(event.outcome, event.attempt) for event in again.events] == [("done", 1)]


def test_a_broker_is_simulated_once_at_a_time(broker, worker):
    with dramalite.simulate(broker), pytest.raises(RuntimeError, match="already"):
        dramalite.simulate(broker).__enter__()
    worker(broker)
    with pytest.raises(RuntimeError, match="already"):
        dramalite.simulate(broker).__enter__()


@pytest.mark.parametrize("options", [{"workers": 0}, {"threads": 0}, {"workers": 65}])
def test_a_simulation_has_one_worker_or_more(broker, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dramalite.simulate(broker, **options)


def test_only_brokers_of_the_engine_can_be_simulated():
    with pytest.raises(TypeError, match="simulated"):
        dramalite.simulate(dramalite.Broker(middleware=[]))


def test_failures_of_simulated_jobs_are_in_the_events_and_not_in_the_log(broker, flaky, caplog):
    caplog.set_level(logging.INFO, "dramalite")
    with dramalite.simulate(broker) as sim:
        flaky.send(1)
        sim.run_until_idle()

    assert "Failed to process" not in caplog.text
    assert sim.events[0].error == "ValueError: failure 1"


def test_pending_messages_come_in_their_order(broker, work):
    with dramalite.simulate(broker) as sim:
        work.send_with_options(args=(1,), delay=5000)
        work.send_with_options(args=(2,), delay=1000)
        work.send(3)
        work.send_with_options(args=(4,), priority=-1)

        assert [message.args[0] for message in sim.pending()] == [4, 3, 2, 1]


def test_groups_and_pipelines_complete(broker):
    done = []

    @dramalite.actor(store_results=True)
    def add(*numbers):
        dramalite.simulated_work(10)
        return sum(numbers)

    @dramalite.actor
    def finish():
        done.append(sim.now)

    with dramalite.simulate(broker, workers=2, threads=2) as sim:
        group = dramalite.group([add.message(n) | add.message(1) for n in range(5)])
        group.add_completion_callback(finish.message())
        group.run()
        sim.run_until_idle()

        assert list(group.get_results()) == [1, 2, 3, 4, 5]
    assert len(done) == 1


@pytest.mark.parametrize(
    ("max_crashes", "expected"), [(2, ["crashed", "crashed", "done"]), (1, ["crashed", "dead"])]
)
def test_a_crash_under_a_finished_job_repeats_it_and_counts_only_where_it_may_not(
    broker, max_crashes, expected
):
    @dramalite.actor(max_crashes=max_crashes)
    def work():
        pass

    with dramalite.simulate(broker) as sim:
        work.send()
        for _ in expected[:-1]:
            sim.step()  # Takes back what dead workers had.
            sim.step()  # Runs the job; another step would write its outcome.
            sim.crash()
        sim.run_until_idle()

    assert outcomes(sim) == expected
    assert "not written" in sim.events[0].error


def test_the_death_of_a_message_counts_its_retries_and_crashes(broker):
    @dramalite.actor(max_retries=5, max_crashes=2)
    def unlucky():
        if len(sim.events) < 2:
            raise ValueError
        sim.crash(0)

    with dramalite.simulate(broker) as sim:
        unlucky.send()
        sim.run_until_idle()

    assert [(e.outcome, e.attempt) for e in sim.events] == [
        ("retry", 1), ("retry", 2), ("crashed", 3), ("crashed", 4), ("dead", 4),
    ]  # fmt: skip


def test_a_paused_worker_that_crashes_is_replaced_by_one_that_works(broker, work):
    with dramalite.simulate(broker) as sim:
        sim.pause()
        work.send(1)
        sim.crash()
        sim.run_until_idle()

    assert outcomes(sim) == ["done"]


def test_delayed_messages_from_before_the_simulation_are_due_after_their_delay(make_broker, clock):
    broker = make_broker(clock=clock)
    clock.advance(timedelta(days=3 * 366).total_seconds() * 1000)  # Longer than a simulation may take.
    sent_at = clock.time_ms()
    work = dramalite.actor(lambda: None, actor_name="work", max_age=120_000)
    work.send_with_options(delay=60_000)
    with dramalite.simulate(broker) as sim:
        began = sim.now.timestamp() * 1000
        sim.run_until_idle()

    assert sent_at <= began <= sent_at + 1
    assert [(event.outcome, event.started_ms) for event in sim.events] == [("done", sent_at + 60_000)]


def test_a_start_that_is_given_holds_for_messages_from_before_too(make_broker, clock):
    broker = make_broker(clock=clock)
    dramalite.actor(lambda: None, actor_name="work").send()
    with dramalite.simulate(broker, start=START) as sim:
        assert sim.now == START


def test_of_two_threads_that_simulate_a_broker_at_once_one_is_refused(make_broker):
    for _ in range(10):
        broker, entered, raised = make_broker(), [], []
        both = threading.Barrier(2, timeout=DEADLINE)

        def simulate():
            both.wait()
            try:
                with dramalite.simulate(broker):
                    entered.append(1)
                    both.wait()
            except RuntimeError as error:
                raised.append(str(error))
                both.wait()

        threads = [threading.Thread(target=simulate) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)

        assert (len(entered), len(raised)) == (1, 1)
        assert not broker.clock.is_virtual


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_is_told_that_the_simulation_is_its_parents(broker, work, threads):
    with dramalite.simulate(broker, threads=threads) as sim:
        work.send(1)
        sim.step()
        work.send(1)
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(RuntimeError, match="forked"):
                    sim.run_until_idle()
                sim.__exit__()
                os._exit(1 if broker.clock.is_virtual else 0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        sim.run_until_idle()

    assert os.waitstatus_to_exitcode(status) == 0
    assert outcomes(sim) == ["done", "done"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_simulation_may_be_made_before_a_fork_and_begin_after_it(broker, work):
    sim = dramalite.simulate(broker)
    child = os.fork()
    if child == 0:
        try:
            with sim:
                work.send(1)
                sim.run_until_idle()
            os._exit(0 if outcomes(sim) == ["done"] else 2)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("end", ["crash", "leave"])
def test_nothing_is_watched_for_a_job_that_its_simulation_left(broker, end):
    runners = []

    @dramalite.actor
    def work():
        runners.append(threading.get_ident())
        dramalite.simulated_work(1000)

    (limit,) = [item for item in broker.middleware if isinstance(item, dramalite.TimeLimit)]
    with dramalite.simulate(broker, threads=3) as sim:
        for _ in range(3):
            work.send()
        while len(runners) < 3:
            sim.step()
        watched = [limit.deadline(runner) for runner in runners]
        if end == "crash":
            sim.crash()

            assert [limit.deadline(runner) for runner in runners] == [None] * 3

    assert None not in watched
    assert [limit.deadline(runner) for runner in runners] == [None] * 3


def test_a_hook_that_has_the_worker_crash_over_a_dead_letter_makes_one_of_it(broker, work):
    class CrashOnce(dramalite.Middleware):
        has_crashed = False

        def after_nack(self, broker, message):
            if not self.has_crashed:
                self.has_crashed = True
                sim.crash()

    broker.add_middleware(CrashOnce())
    with dramalite.simulate(broker, threads=2) as sim:
        work.send_with_options(args=(1000,), max_crashes=1)
        sim.run_until(START + timedelta(milliseconds=500))
        sim.crash()
        sim.run_until_idle()

    assert outcomes(sim) == ["crashed", "dead"]
    assert len(broker.dead_letters) == 1


# What has no end


@pytest.mark.parametrize("bounds", [{"max_time": 60_000}, {"max_time": 60_000, "max_steps": 10}])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_job_that_lets_time_pass_without_end_fails_the_run(make_broker, bounds, threads):
    broker = make_broker(middleware=[])

    @dramalite.actor
    def endless():
        while True:
            dramalite.simulated_work(1000)

    with dramalite.simulate(broker, threads=threads) as sim:
        endless.send()
        with pytest.raises(dramalite.SimulationError, match="is not idle after"):
            sim.run_until_idle(**bounds)

        assert sim.events == []
        assert [message.actor_name for message in sim.pending()] == ["endless"]


def test_a_job_may_wait_in_vain_for_a_result(broker):
    @dramalite.actor(max_retries=0)
    def patient():
        waited_for[0].get_result(block=True, timeout=60_000)

    late = dramalite.actor(print, actor_name="late", store_results=True)
    with dramalite.simulate(broker) as sim:
        waited_for = [late.send_with_options(delay=timedelta(days=1))]
        patient.send()
        sim.run_until(START + timedelta(hours=1))

    assert outcomes(sim) == ["dead"]
    assert sim.events[0].ended - sim.events[0].started == timedelta(minutes=1)


def test_a_choice_may_have_a_worker_crash(broker, work):
    def choose(steps):
        chosen.append(steps[0])
        if len(chosen) in (1, 4, 6):
            sim.crash(steps[0].worker)
        return steps[0]

    chosen = []
    with dramalite.simulate(broker, workers=2, choose=choose) as sim:
        work.send(10)
        work.send(10)
        sim.run_until_idle()

    assert outcomes(sim)[-2:] == ["done", "done"]


def test_a_job_that_waits_without_end_fails_the_step():
    broker = dramalite.MemoryBroker(middleware=[])  # A file has no part in a million waits.

    @dramalite.actor(broker=broker)
    def endless():
        while True:
            dramalite.simulated_work(0)

    with dramalite.simulate(broker) as sim:
        endless.send()
        with pytest.raises(dramalite.SimulationError, match="lets time pass without end"):
            sim.advance(minutes=1)


def test_a_job_that_ignores_its_time_limit_is_given_up(broker):
    @dramalite.actor(time_limit=1000, max_retries=0)
    def stubborn():
        while sim.now < START + timedelta(seconds=60):
            try:
                dramalite.simulated_work(100)
            except dramalite.TimeLimitExceeded:
                pass

    with dramalite.simulate(broker) as sim:
        stubborn.send()
        sim.run_until_idle()

    assert outcomes(sim) == ["dead"]
    assert sim.events[0].ended == START + timedelta(seconds=6)
    assert sim.events[0].error.startswith("TimeLimitExceeded")


def test_a_job_that_cannot_be_ended_is_told_of(broker):
    @dramalite.actor
    def immortal():
        while True:
            try:
                dramalite.simulated_work(1000)
            except BaseException:
                caught.append(None)

    caught = []
    with pytest.raises(RuntimeError, match="immortal can't be ended"):
        with dramalite.simulate(broker, threads=2) as sim:
            immortal.send()
            sim.advance(500)

    assert caught
    assert type(broker.clock) is dramalite.Clock  # The broker is in order again.


class InterruptedWhenTold(Exception):
    """Ctrl+C comes while its text is made."""

    def __str__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptedWhenTold])
def test_ctrl_c_ends_the_simulation_and_the_message_waits(broker, error):
    @dramalite.actor
    def interrupted():
        raise error

    with pytest.raises(KeyboardInterrupt), dramalite.simulate(broker) as sim:
        interrupted.send()
        sim.run_until_idle()

    assert sim.events == []
    assert [message.actor_name for message in broker.pending()] == ["interrupted"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first", [1, 2])
def test_ctrl_c_at_any_moment_of_a_step_loses_nothing_and_leaves_the_next_simulation_alone(threads, first):
    module = dramalite.simulate.__code__.co_filename

    def interrupt_at(call):
        """What sys.settrace() is to be given: Ctrl+C where the so manieth call of the module begins."""
        left = [call]

        def trace(frame, _event, _arg):
            in_module = frame.f_code.co_filename == module
            left[0] -= in_module and frame.f_code.co_name != "<genexpr>"  # Which may be closed then, and raise nothing.
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt

        return trace

    def run(call):
        """Whether a run came to its end before Ctrl+C did."""
        broker = dramalite.MemoryBroker()
        ran = []

        @dramalite.actor(broker=broker, max_retries=1, min_backoff=1, max_backoff=1)
        def work(number):
            ran.append(number)
            dramalite.simulated_work(number)
            if ran.count(number) == 1 and number == 2:
                raise ValueError("no")

        for number in range(3):
            work.send(number)
        is_over = False
        try:
            with dramalite.simulate(broker, threads=threads) as sim:
                try:
                    sys.settrace(interrupt_at(call))
                    sim.run_until_idle()
                    is_over = True
                finally:
                    sys.settrace(None)
        except KeyboardInterrupt:
            pass
        with dramalite.simulate(broker, threads=threads, start=sim.now + timedelta(minutes=1)) as sim:
            sim.run_until_idle()
        assert (broker.pending(), broker.dead_letters, set(ran)) == ([], [], {0, 1, 2}), call
        broker.close()
        return is_over

    before = sys.gettrace()
    gc.disable()  # What a finalizer raises goes nowhere.
    try:
        call = first
        while not run(call):
            call += 11
    finally:
        gc.enable()
        sys.settrace(before)

    assert call > 100


def test_ctrl_c_in_a_hook_ends_the_simulation_and_the_message_waits(broker):
    class Interrupted(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            raise KeyboardInterrupt

    broker.add_middleware(Interrupted())
    work = dramalite.actor(lambda: None, actor_name="work")
    with pytest.raises(KeyboardInterrupt), dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert [message.actor_name for message in broker.pending()] == ["work"]
    assert broker.dead_letters == []


def test_a_crash_in_a_hook_after_the_job_is_a_crash(broker):
    crashes = []

    class Crashes(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            if not crashes:
                crashes.append(1)
                sim.crash()

    broker.add_middleware(Crashes())
    work = dramalite.actor(lambda: None, actor_name="work")
    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert outcomes(sim) == ["crashed", "done"]
    assert broker.pending() == broker.dead_letters == []


def test_a_crash_while_a_hook_after_the_job_takes_time_is_counted(broker):
    class TakesTime(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            dramalite.simulated_work(100)

    broker.add_middleware(TakesTime())
    work = dramalite.actor(lambda: None, actor_name="work", max_crashes=2)
    with dramalite.simulate(broker, threads=2) as sim:
        work.send()
        for _ in range(3):
            sim.advance(50)
            sim.crash()
        sim.run_until_idle()

    assert outcomes(sim) == ["crashed", "crashed", "dead"]


def test_time_limits_do_not_strike_in_hooks(broker):
    class TakesTime(dramalite.Middleware):
        def before_process_message(self, broker, message):
            broker.clock.sleep(10)

        def after_process_message(self, broker, message, *, result=None, exception=None):
            broker.clock.sleep(10)

    broker.add_middleware(TakesTime())
    work = dramalite.actor(lambda: None, actor_name="work", time_limit=300)
    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert outcomes(sim) == ["done"]
    assert sim.now == START + timedelta(seconds=20)


def test_what_may_not_run_twice_is_a_dead_letter_where_the_simulation_leaves_it(broker):
    begun = []

    @dramalite.actor(on_crash="fail")
    def work():
        begun.append(1)
        dramalite.simulated_work(1000)

    with dramalite.simulate(broker, threads=2) as sim:
        work.send()
        sim.advance(500)
    with dramalite.simulate(broker) as later:
        later.run_until_idle()

    assert begun == [1]
    assert [(event.outcome, event.error) for event in sim.events] == [("dead", "WorkerCrashed: its run was cut off")]
    assert [message.actor_name for message in broker.dead_letters] == ["work"]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_that_cannot_be_told_is_one_like_others(broker, threads):
    class Hostile(Exception):
        def __str__(self):
            raise SystemExit

    @dramalite.actor(max_retries=0)
    def work():
        raise Hostile

    with dramalite.simulate(broker, threads=threads) as sim:
        work.send()
        sim.run_until_idle()

    assert outcomes(sim) == ["dead"]


def test_all_jobs_are_ended_though_one_can_not(broker):
    ended = []

    @dramalite.actor
    def immortal():
        while True:
            with contextlib.suppress(BaseException):
                dramalite.simulated_work(1000)

    @dramalite.actor
    def mortal(number):
        try:
            dramalite.simulated_work(1000)
        finally:
            ended.append(number)

    with pytest.raises(RuntimeError, match="immortal can't be ended"):
        with dramalite.simulate(broker, workers=2, threads=2) as sim:
            immortal.send()
            for number in range(3):
                mortal.send(number)
            sim.advance(500)

    assert sorted(ended) == [0, 1, 2]
    assert sorted(message.actor_name for message in broker.pending()) == ["immortal"] + ["mortal"] * 3


def test_context_variables_of_jobs_stay_with_them(broker):
    variable = contextvars.ContextVar("variable", default="outside")
    work = dramalite.actor(lambda: variable.set("inside") and None, actor_name="work")
    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert variable.get() == "outside"


def test_a_wait_ends_once_a_job_has_taken_longer(broker, work):
    with dramalite.simulate(broker) as sim:
        for _ in range(3):
            work.send(3_600_000)
        with pytest.raises(dramalite.QueueJoinTimeout):
            broker.join("default", timeout=5000)

    assert len(sim.events) == 1


def test_a_result_that_comes_at_the_last_moment_is_waited_for(broker):
    work = dramalite.actor(lambda: 1, actor_name="work", store_results=True)
    with dramalite.simulate(broker):
        message = work.send_with_options(delay=2000)

        assert message.get_result(block=True, timeout=2000) == 1


def test_a_time_that_no_datetime_can_hold_is_told_as_the_last_one(broker):
    @dramalite.actor(max_retries=1, backoff=[1 << 53])
    def fail():
        raise ValueError("no")

    with dramalite.simulate(broker) as sim:
        fail.send()
        with pytest.raises(dramalite.SimulationError, match="9999-12-31"):
            sim.run_until_idle()


# Coroutines and what they leave behind


@pytest.mark.parametrize("threads", [1, 2])
def test_a_coroutine_that_waits_for_what_never_comes_ends_at_its_time_limit(broker, threads):
    @dramalite.actor(max_retries=0, time_limit=1000)
    async def wait():
        await asyncio.Event().wait()

    with dramalite.simulate(broker, threads=threads) as sim:
        wait.send()
        sim.run_until_idle()

    assert [(event.outcome, event.error.partition(":")[0]) for event in sim.events] == [("dead", "TimeLimitExceeded")]
    assert sim.now == START + timedelta(seconds=1)


def test_a_coroutine_that_waits_without_end_fails_the_run():
    broker = dramalite.MemoryBroker(middleware=[])

    @dramalite.actor(broker=broker)
    async def wait():
        await asyncio.Event().wait()

    with dramalite.simulate(broker) as sim:
        wait.send()
        with pytest.raises(dramalite.SimulationError, match="waits or lets time pass without end"):
            sim.run_until_idle()

    assert [message.actor_name for message in broker.pending()] == ["wait"]


def test_coroutines_that_share_a_lock_get_it_one_after_the_other(broker):
    lock = asyncio.Lock()

    @dramalite.actor(max_retries=0)
    async def work():
        async with lock:
            await asyncio.sleep(1)

    with dramalite.simulate(broker, threads=2) as sim:
        work.send()
        work.send()
        sim.run_until_idle()

    assert outcomes(sim) == ["done", "done"]


def test_a_coroutine_that_ends_well_though_its_time_limit_cancelled_it_is_done(broker):
    @dramalite.actor(time_limit=200, max_retries=0, store_results=True)
    async def work():
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            return "a part"

    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert [(event.outcome, event.result) for event in sim.events] == [("done", "a part")]


def test_tasks_that_a_coroutine_leaves_behind_end_in_the_order_they_were_made_in(broker):
    ended = []

    @dramalite.actor
    async def work():
        async def wait(number):
            try:
                await asyncio.sleep(100)
            finally:
                ended.append(number)

        kept = [asyncio.create_task(wait(number)) for number in range(10)]
        await asyncio.sleep(1)
        return kept and None

    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert ended == list(range(10))


def test_the_traceback_of_a_coroutine_tells_of_it_alone(broker):
    @dramalite.actor(max_retries=1)
    async def fail():
        raise ValueError("no")

    with dramalite.simulate(broker) as sim:
        fail.send()
        sim.run_until_idle()

    (text,) = [event.message.options["traceback"] for event in sim.events if event.attempt == 2]
    assert "in fail" in text
    assert "no running event loop" not in text
    assert "asyncio" not in text


def test_a_loop_that_a_coroutine_stops_goes_on(broker):
    @dramalite.actor(max_retries=0, store_results=True)
    async def work():
        asyncio.get_running_loop().stop()
        await asyncio.sleep(1)
        return "done"

    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert [event.result for event in sim.events] == ["done"]


@pytest.fixture
def patient(monkeypatch):
    """Virtual time is kept from passing for as long as a real thread needs, on a slow machine too."""
    monkeypatch.setattr("dramalite._REAL_WAIT_S", DEADLINE)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_coroutine_waits_for_a_thread_of_its_own_in_real_time(broker, patient, threads):
    @dramalite.actor(max_retries=0, store_results=True)
    async def work():
        loop = asyncio.get_running_loop()
        found = loop.create_future()

        def find():
            time.sleep(0.05)  # As a query would take it.
            loop.call_soon_threadsafe(found.set_result, 7)

        threading.Thread(target=find).start()
        return await found

    with dramalite.simulate(broker, threads=threads) as sim:
        work.send()
        sim.run_until_idle()

    assert [(event.outcome, event.result) for event in sim.events] == [("done", 7)]
    assert sim.now == START


def test_a_task_that_was_made_without_the_loop_is_cancelled_too(broker):
    ended = []

    @dramalite.actor
    async def work():
        async def wait():
            try:
                await asyncio.sleep(100)
            finally:
                ended.append(1)

        kept.append(asyncio.Task(wait()))
        await asyncio.sleep(1)

    kept = []
    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert ended == [1]


def test_a_real_thread_may_take_real_time(broker, patient):
    @dramalite.actor(max_retries=0)
    async def work():
        await asyncio.wait_for(asyncio.to_thread(time.sleep, 0.2), 60)

    with dramalite.simulate(broker) as sim:
        work.send()
        sim.run_until_idle()

    assert (outcomes(sim), sim.now) == (["done"], START)


def test_no_time_passes_while_a_real_thread_works(broker, patient):
    @dramalite.actor(store_results=True)
    async def threaded():
        beside = asyncio.create_task(asyncio.sleep(0.01))
        found = await asyncio.wait_for(asyncio.to_thread(sum, range(100_000)), 5)
        elapsed = sim.now - START
        await beside
        return found, elapsed.total_seconds(), (sim.now - START).total_seconds()

    with dramalite.simulate(broker) as sim:
        threaded.send()
        sim.run_until_idle()

    assert [event.result for event in sim.events] == [(sum(range(100_000)), 0.0, 0.01)]


def test_a_real_thread_that_waits_for_virtual_time_gets_it(broker):
    @dramalite.actor(store_results=True)
    async def waits():
        event = threading.Event()
        waiting = asyncio.create_task(asyncio.to_thread(event.wait))
        await asyncio.sleep(1)
        event.set()
        return await waiting

    with dramalite.simulate(broker) as sim:
        waits.send()
        sim.run_until_idle()

    assert [(event.outcome, event.result) for event in sim.events] == [("done", True)]


def test_a_coroutine_that_cannot_be_cancelled_leaves_the_result_of_the_one_that_left_it(broker):
    async def stubborn():
        while True:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                pass

    @dramalite.actor(store_results=True)
    async def careless():
        kept.append(asyncio.create_task(stubborn()))
        await asyncio.sleep(1)
        return 1

    kept = []
    with dramalite.simulate(broker) as sim:
        careless.send()
        sim.run_until_idle()

    assert [(event.outcome, event.result) for event in sim.events] == [("done", 1)]


def test_actors_that_call_coroutines_inside_a_running_loop_stay_in_virtual_time(broker):
    @dramalite.actor
    async def inner():
        await asyncio.sleep(300)

    @dramalite.actor
    async def outer():
        inner()

    async def main():
        with dramalite.simulate(broker) as sim:
            outer.send()
            sim.run_until_idle()
        return sim

    sim = asyncio.run(main())

    assert [event.ended - event.started for event in sim.events] == [timedelta(minutes=5)]


def test_what_a_coroutine_leaves_behind_is_cancelled(broker):
    async def later():
        try:
            await asyncio.sleep(1)
        finally:
            ended.append("task")

    async def numbers():
        try:
            yield 1
        finally:
            ended.append("generator")

    @dramalite.actor
    async def careless():
        kept.append(asyncio.create_task(later()))
        kept.append(numbers())
        await anext(kept[-1])
        await asyncio.sleep(0.1)

    ended, kept = [], []
    with dramalite.simulate(broker) as sim:
        careless.send()
        sim.run_until_idle()

    assert (outcomes(sim), sorted(ended)) == (["done"], ["generator", "task"])


def answer_late(listener):
    """Answer one connection, after a moment of real time."""
    connection, _address = listener.accept()

    def answer():
        with connection:
            connection.sendall(b"hi\n")

    threading.Timer(0.1, answer).start()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_timeout_leaves_a_connection_the_real_time_that_it_takes(broker, patient, threads):
    @dramalite.actor(max_retries=0)
    async def fetch(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            return (await asyncio.wait_for(reader.readline(), 30)).decode()
        finally:
            writer.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answer_late, args=(listener,), daemon=True)
        server.start()
        fetch.send(listener.getsockname()[1])
        with dramalite.simulate(broker, threads=threads) as sim:
            sim.run_until_idle()
        server.join(DEADLINE)

    assert [(event.outcome, event.result) for event in sim.events] == [("done", "hi\n")]


def answer_each(listener):
    """Answer whatever comes over one connection, until it ends."""
    connection, _address = listener.accept()
    with connection:
        while connection.recv(100):
            connection.sendall(b"hi\n")


def test_a_connection_that_is_merely_open_does_not_hold_up_sleeps(broker):
    @dramalite.actor(max_retries=0, time_limit=float("inf"))
    async def poll(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(50):
            writer.write(b"x")
            await reader.readline()
            await asyncio.sleep(60)
        writer.close()

    def simulate():
        with dramalite.simulate(broker) as sim:
            poll.send(listener.getsockname()[1])
            sim.run_until_idle()
        seen.extend(sim.events)

    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_each, args=(listener,), daemon=True).start()
        simulating = threading.Thread(target=simulate, daemon=True)
        simulating.start()
        simulating.join(DEADLINE)  # At two seconds of real time for each sleep it would take 100.

    assert [(event.outcome, event.ended_ms - event.started_ms) for event in seen] == [("done", 3_000_000)]


async def ask(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"x")
        return await reader.readline()
    finally:
        writer.close()


async def ask_beside_a_sleep_that_ends_with_the_timeout(port):
    await asyncio.gather(asyncio.sleep(5), asyncio.wait_for(ask(port), 5))


async def ask_beside_a_sleep_that_ends_just_before(port):
    await asyncio.gather(asyncio.sleep(4.999999), asyncio.wait_for(ask(port), 5))


async def ask_with_a_sleep_for_a_timeout(port):
    asking, sleeping = asyncio.create_task(ask(port)), asyncio.create_task(asyncio.sleep(30))
    done, _pending = await asyncio.wait({asking, sleeping}, return_when=asyncio.FIRST_COMPLETED)
    sleeping.cancel()
    assert asking in done


async def ask_in_another_task_and_look_for_the_answer(port):
    asking = asyncio.create_task(ask(port))
    for _ in range(50):
        if asking.done():
            return
        await asyncio.sleep(0.1)
    raise TimeoutError


@pytest.mark.parametrize(
    "program",
    [
        ask_beside_a_sleep_that_ends_with_the_timeout,
        ask_beside_a_sleep_that_ends_just_before,
        ask_with_a_sleep_for_a_timeout,
        ask_in_another_task_and_look_for_the_answer,
    ],
)
def test_an_answer_has_its_real_time_beside_tasks_that_sleep(make_stub_broker, patient, program):
    broker = make_stub_broker()
    dramalite.actor(program, actor_name="work", max_retries=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_late, args=(listener,), daemon=True).start()
        broker.get_actor("work").send(listener.getsockname()[1])
        with dramalite.simulate(broker) as sim:
            sim.run_until_idle()

    assert outcomes(sim) == ["done"]


# Before, after and beside


def test_a_second_simulation_of_a_seed_makes_no_message_that_there_is_already(broker, flaky):
    for number in range(3):
        with dramalite.simulate(broker, seed=1):
            there = {message.message_id for message in broker.pending()}
            flaky.send_with_options(args=(0,), delay=1000)

            assert len(there) == number
            assert len({message.message_id for message in broker.pending()}) == number + 1


def test_a_simulation_that_is_over_says_so_and_makes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dramalite.set_broker(dramalite.SQLiteBroker("queue.db"))
    with dramalite.simulate() as sim:
        sim.run_until_idle()
    for call in (sim.pending, sim.step, sim.crash, sim.pause, sim.resume, sim.run_until_idle):
        with pytest.raises(RuntimeError, match="is over"):
            call()
    with pytest.raises(RuntimeError, match="make another"):
        sim.__enter__()

    assert list(tmp_path.iterdir()) == []


def test_a_worker_cannot_start_on_a_simulated_broker(broker):
    with dramalite.simulate(broker), pytest.raises(RuntimeError, match="simulated"):
        dramalite.Worker(broker).start()


@pytest.mark.parametrize(
    ("options", "error"),
    [({"workers": 1.5}, ValueError), ({"threads": "2"}, ValueError), ({"choose": 5}, TypeError)],
)
def test_bad_arguments_of_a_simulation_are_refused(broker, options, error):
    with pytest.raises(error, match=next(iter(options))):
        dramalite.simulate(broker, **options)


def test_a_simulation_starts_after_1970(broker):
    with pytest.raises(ValueError, match="1970"):
        dramalite.simulate(broker, start=datetime(1969, 12, 31))


def test_the_event_of_a_message_for_an_unknown_actor_names_it():
    broker = dramalite.MemoryBroker()
    work = dramalite.actor(print, actor_name="work", broker=broker)
    broker.enqueue(work.message().copy(actor_name="nobody"))
    with dramalite.simulate(broker) as sim:
        sim.run_until_idle()

    assert [(event.actor, event.outcome) for event in sim.events] == [("nobody", "dead")]
