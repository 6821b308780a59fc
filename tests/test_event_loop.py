"""`async def` actors: many at once without threads of their own, their limits and ends, and sending from coroutines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import itertools
import os
import sqlite3
import textwrap
import threading
import time
import traceback
import weakref

import pytest

import dramalite
from dramalite import Message, Retries, Shutdown, TimeLimit, TimeLimitExceeded, async_to_sync

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000


@pytest.fixture
def broker(clean_state):
    """A broker in memory, where what this module is about is the same as in a file; the global one."""
    broker = dramalite.MemoryBroker()
    clean_state.callback(broker.close)
    dramalite.set_broker(broker)
    return broker


@pytest.fixture
def log():
    """What the coroutines write down."""
    return []


class Gate:
    """A place where coroutines wait; it knows how many do, and can be opened from any thread."""

    def __init__(self):
        self.inside = self.most = 0
        self.is_open = False

    async def __call__(self):
        self.inside += 1
        self.most = max(self.most, self.inside)
        while not self.is_open:
            await asyncio.sleep(0.002)
        self.inside -= 1


@pytest.fixture
def patient(monkeypatch):
    """Who cancels a coroutine gives it all the time it needs to clean up, on a slow machine too."""
    monkeypatch.setattr("dramalite._CANCEL_GRACE_S", DEADLINE)


@pytest.fixture
def gate():
    """A Gate that is opened at the end of the test, whatever happens."""
    gate = Gate()
    yield gate
    gate.is_open = True


class Outcomes(dramalite.Middleware):
    """Keeps the result and the exception with which each attempt ended."""

    def __init__(self):
        self.ends = []

    def after_process_message(self, broker, message, *, result=None, exception=None):
        self.ends.append((result, type(exception)))


@pytest.fixture
def outcomes(broker):
    """The ends of all attempts on `broker`, as a list of (result, type of exception)."""
    outcomes = Outcomes()
    broker.add_middleware(outcomes)
    return outcomes.ends


def work_off(broker, worker, **options):
    started = worker(broker, **options)
    broker.join("default", timeout=PATIENCE)
    return started


# Many at once


def test_many_coroutines_run_at_once_though_there_is_one_thread(broker, worker, gate):
    dramalite.actor(gate.__call__, actor_name="wait")
    for _ in range(80):
        broker.get_actor("wait").send()
    worker(broker, worker_threads=1)
    wait_until(lambda: gate.inside == 80)
    gate.is_open = True
    broker.join("default", timeout=PATIENCE)

    assert gate.most == 80


def test_a_hundred_run_at_once_unless_the_worker_is_told_otherwise(broker, worker, gate):
    wait = dramalite.actor(gate.__call__, actor_name="wait")
    for _ in range(105):
        wait.send()
    started = worker(broker, worker_threads=1)
    wait_until(lambda: gate.inside == 100)
    gate.is_open = True
    broker.join("default", timeout=PATIENCE)

    assert started.async_concurrency == 100
    assert gate.most == 100


def test_no_more_run_at_once_than_the_worker_is_told(broker, worker, gate):
    wait = dramalite.actor(gate.__call__, actor_name="wait")
    for _ in range(12):
        wait.send()
    worker(broker, worker_threads=2, async_concurrency=3)
    wait_until(lambda: gate.inside == 3)
    gate.is_open = True
    broker.join("default", timeout=PATIENCE)

    assert gate.most == 3


def test_a_worker_runs_one_coroutine_or_more(broker):
    with pytest.raises(ValueError, match="async_concurrency"):
        dramalite.Worker(broker, async_concurrency=0)


def test_a_worker_that_would_run_more_at_once_than_it_can_keep_track_of_is_refused_with_both_numbers(broker):
    with pytest.raises(ValueError, match=r"\b8\b.*\b2000\b"):
        dramalite.Worker(broker, worker_threads=8, async_concurrency=2000)


def test_a_worker_may_run_five_hundred_coroutines(broker, worker):
    assert worker(broker, async_concurrency=500).async_concurrency == 500


def test_threads_stay_free_for_other_work_while_coroutines_wait(broker, worker, gate, log):
    wait = dramalite.actor(gate.__call__, actor_name="wait")
    note = dramalite.actor(log.append, actor_name="note")
    for _ in range(5):
        wait.send()
    worker(broker, worker_threads=1)
    wait_until(lambda: gate.inside == 5)
    note.send("done meanwhile")
    wait_until(lambda: log)

    assert gate.inside == 5


def test_threads_stay_free_for_other_work_while_all_places_for_coroutines_are_taken(broker, worker, gate, log):
    wait = dramalite.actor(gate.__call__, actor_name="wait")
    note = dramalite.actor(log.append, actor_name="note")
    for _ in range(3):
        wait.send()
    worker(broker, worker_threads=1, async_concurrency=2)
    wait_until(lambda: gate.inside == 2)
    note.send("done meanwhile")
    wait_until(lambda: log)

    assert gate.inside == 2


def test_no_more_run_at_once_than_the_worker_is_told_after_many_short_ones(broker, worker, gate, log):
    async def note(number):
        log.append(number)

    note = dramalite.actor(note)
    wait = dramalite.actor(gate.__call__, actor_name="wait")
    after = dramalite.actor(lambda: log.append("after"), actor_name="after")
    worker(broker, worker_threads=4, async_concurrency=2)
    broker.enqueue_many([note.message(number) for number in range(1000)])  # So that much is claimed at a time.
    wait_until(lambda: len(log) == 1000)
    broker.enqueue_many([wait.message() for _ in range(12)])
    wait_until(lambda: gate.inside >= 2)
    after.send()
    wait_until(lambda: log[-1] == "after")
    gate.is_open = True
    broker.join("default", timeout=PATIENCE)

    assert gate.most == 2


def test_no_more_of_many_short_ones_run_at_once_than_the_worker_is_told(broker, worker, log):
    inside = 0

    async def work():
        nonlocal inside
        inside += 1
        log.append(inside)
        await asyncio.sleep(0)
        inside -= 1

    work = dramalite.actor(work)
    worker(broker, worker_threads=4, async_concurrency=2)
    broker.enqueue_many([work.message() for _ in range(1000)])
    broker.join("default", timeout=PATIENCE)

    assert set(log) == {1, 2}


def test_actors_that_a_running_worker_comes_to_know_keep_to_the_number_too(make_file_broker, worker, gate):
    broker = make_file_broker()
    dramalite.actor(lambda: None, actor_name="other")
    broker.enqueue_many([Message("default", "wait", (), {}, {}) for _ in range(40)])
    worker(broker, worker_threads=8, async_concurrency=2)
    wait_until(lambda: threading.active_count() >= 8)
    dramalite.actor(gate.__call__, actor_name="wait")
    wait_until(lambda: gate.inside >= 2)
    gate.is_open = True
    broker.join("default", timeout=PATIENCE)

    assert gate.most == 2


def test_a_coroutine_begins_as_soon_as_another_makes_room(broker, worker, log):
    may_end = set()

    async def wait(number):
        log.append(number)
        while number not in may_end:
            await asyncio.sleep(0.002)

    wait = dramalite.actor(wait)
    for number in range(3):
        wait.send(number)
    worker(broker, worker_threads=1, async_concurrency=2)
    wait_until(lambda: len(log) == 2)
    may_end.add(0)
    wait_until(lambda: len(log) == 3)
    may_end.update((1, 2))

    assert log == [0, 1, 2]


def test_what_a_coroutine_does_not_await_waits_for_its_turn_in_priority(broker, worker, log):
    async def note(name):
        log.append(name)

    note = dramalite.actor(note)
    for priority in (3, 1, 2):
        note.send_with_options(args=(priority,), priority=priority)
    work_off(broker, worker, async_concurrency=1)

    assert log == [1, 2, 3]


def test_all_coroutines_of_a_process_run_on_one_thread_which_is_none_of_the_workers(
    make_file_broker, worker, log
):
    class Threads(dramalite.Middleware):
        def after_worker_thread_boot(self, broker, thread):
            threads.append(thread.ident)

    threads = []
    brokers = [make_file_broker(name) for name in ("one.db", "two.db")]
    for broker in brokers:
        broker.add_middleware(Threads())

        @dramalite.actor(broker=broker)
        async def where():
            log.append(threading.get_ident())

        where.send()
        where.send()
        worker(broker, worker_threads=2)
    for broker in brokers:
        broker.join("default", timeout=PATIENCE)

    assert len(log) == 4
    assert len(set(log)) == 1
    assert set(log) & {*threads, threading.get_ident()} == set()


def test_coroutines_of_several_workers_run_at_the_same_time(make_file_broker, worker, gate):
    brokers = [make_file_broker(name) for name in ("one.db", "two.db")]
    for broker in brokers:
        dramalite.actor(gate.__call__, actor_name="wait", broker=broker).send()
        worker(broker)

    wait_until(lambda: gate.inside == 2)
    gate.is_open = True
    for broker in brokers:
        broker.join("default", timeout=PATIENCE)


def test_the_loop_goes_on_when_a_worker_has_stopped(broker, worker, gate, log):
    async def note(number):
        log.append(number)

    note = dramalite.actor(note)
    note.send(1)
    work_off(broker, worker).stop()
    note.send(2)
    work_off(broker, worker)

    assert log == [1, 2]


def test_no_coroutine_needs_a_middleware(make_stub_broker, worker, log):
    broker = make_stub_broker([])

    async def note():
        log.append("ran")

    dramalite.actor(note).send()
    work_off(broker, worker)

    assert log == ["ran"]


def test_dramatiqs_middleware_for_coroutines_is_accepted(broker, worker, log):
    broker.add_middleware(dramalite.AsyncIO())

    async def note():
        log.append("ran")

    dramalite.actor(note).send()
    work_off(broker, worker)

    assert log == ["ran"]


# Kinds of async actors


def test_a_partial_of_a_coroutine_function_is_an_async_actor(broker, worker, gate):
    async def wait(_number):
        await gate()

    waiting = dramalite.actor(functools.partial(wait, 1), actor_name="wait")
    for _ in range(3):
        waiting.send()
    worker(broker, worker_threads=1)

    wait_until(lambda: gate.inside == 3)


def test_a_class_based_actor_may_be_async(broker, worker, log):
    class Noting(dramalite.GenericActor):
        async def perform(self, number):
            await asyncio.sleep(0)
            log.append((number, dramalite.CurrentMessage.get_current_message().message_id))
            return number

    sent = Noting.send(1)
    work_off(broker, worker)

    assert log == [(1, sent.message_id)]


def test_a_class_based_async_actor_can_be_called_directly(broker):
    class Doubling(dramalite.GenericActor):
        async def perform(self, number):
            await asyncio.sleep(0)
            return number * 2

    assert Doubling(21) == 42


def test_class_based_async_actors_hold_no_threads(broker, worker, gate):
    class Waiting(dramalite.GenericActor):
        async def perform(self):
            await gate()

    for _ in range(3):
        Waiting.send()
    worker(broker, worker_threads=1)

    wait_until(lambda: gate.inside == 3)


def test_an_actor_class_that_calls_in_its_own_way_is_called(broker, worker, log):
    class Announced(dramalite.Actor):
        def __call__(self, *args, **kwargs):
            log.append("called")
            return super().__call__(*args, **kwargs)

    async def note():
        log.append("ran")

    dramalite.actor(note, actor_class=Announced).send()
    work_off(broker, worker)

    assert log == ["called", "ran"]


def test_a_coroutine_gets_what_was_sent(broker, worker, log):
    async def note(*args, **kwargs):
        log.append((args, kwargs))

    dramalite.actor(note).send(1, "two", three=[3])
    work_off(broker, worker)

    assert log == [((1, "two"), {"three": [3]})]


# Context


def test_each_coroutine_has_its_own_message(broker, worker, gate, log):
    async def note(number):
        before = dramalite.CurrentMessage.get_current_message()
        await gate()
        after = dramalite.CurrentMessage.get_current_message()
        log.append((number, before.args, after.args, before.message_id == after.message_id))

    note = dramalite.actor(note)
    for number in range(10):
        note.send(number)
    worker(broker)
    wait_until(lambda: gate.inside == 10)
    gate.is_open = True
    broker.join("default", timeout=PATIENCE)

    assert sorted(log) == [(number, (number,), (number,), True) for number in range(10)]


def test_tasks_that_a_coroutine_starts_see_its_message(broker, worker, log):
    async def look():
        return dramalite.CurrentMessage.get_current_message().message_id

    async def work():
        log.extend(await asyncio.gather(look(), asyncio.create_task(look()), asyncio.to_thread(asyncio.run, look())))

    sent = dramalite.actor(work).send()
    work_off(broker, worker)

    assert log == [sent.message_id] * 3


def test_what_a_hook_sets_is_seen_by_the_coroutine_and_by_the_hooks_after_it(broker, worker, log):
    number = contextvars.ContextVar("number", default=0)

    class Sets(dramalite.Middleware):
        def before_process_message(self, broker, message):
            number.set(message.args[0])

        def after_process_message(self, broker, message, *, result=None, exception=None):
            log.append((number.get(), result))

    async def work(given):
        await asyncio.sleep(0)
        return (given, number.get())

    broker.add_middleware(Sets())
    work = dramalite.actor(work, store_results=True)
    for given in (7, 8):
        work.send(given)
    work_off(broker, worker)

    assert sorted(log) == [(7, (7, 7)), (8, (8, 8))]


def test_what_a_coroutine_sets_is_gone_in_the_next_one(broker, worker, log):
    number = contextvars.ContextVar("number", default=0)

    async def work():
        log.append(number.get())
        number.set(1)

    work = dramalite.actor(work)
    for _ in range(3):
        work.send()
    work_off(broker, worker)

    assert log == [0, 0, 0]


def test_there_is_no_message_after_a_coroutine(broker, worker, log):
    class After(dramalite.Middleware):
        def before_ack(self, broker, message):
            log.append(dramalite.CurrentMessage.get_current_message())

    async def work():
        await asyncio.sleep(0)

    broker.add_middleware(After())
    dramalite.actor(work).send()
    work_off(broker, worker)

    assert log == [None]


# What comes of a coroutine


def test_the_result_of_a_coroutine_is_stored(make_broker, worker):
    broker = make_broker()

    async def add(x, y):
        await asyncio.sleep(0)
        return x + y

    sent = dramalite.actor(add, store_results=True).send(1, 2)
    worker(broker)

    assert sent.get_result(block=True, timeout=PATIENCE) == 3


def test_a_coroutine_that_fails_is_retried(broker, worker, outcomes):
    attempts = []

    async def work():
        attempts.append(1)
        await asyncio.sleep(0)
        if len(attempts) < 3:
            raise ValueError("not yet")

    dramalite.actor(work, min_backoff=0).send()
    work_off(broker, worker)

    assert [kind for _, kind in outcomes] == [ValueError, ValueError, type(None)]


def test_the_final_failure_of_a_coroutine_is_a_dead_letter_with_its_traceback(broker, worker):
    async def culprit():
        raise ValueError("no")

    async def work():
        await culprit()

    dramalite.actor(work, max_retries=0).send()
    work_off(broker, worker)
    (letter,) = broker.dead_letters

    assert "in culprit" in letter.options["traceback"]
    assert letter.options["traceback"].endswith("ValueError: no\n")


def test_a_coroutine_may_skip_its_message(broker, worker):
    async def work():
        raise dramalite.SkipMessage("not today")

    sent = dramalite.actor(work, store_results=True).send()
    worker(broker)

    assert sent.get_result(block=True, timeout=PATIENCE) is None


def test_a_coroutine_may_ask_for_a_retry(broker, worker):
    attempts = []

    async def work():
        attempts.append(1)
        if len(attempts) == 1:
            raise dramalite.Retry(delay=1)

    dramalite.actor(work).send()
    work_off(broker, worker)

    assert len(attempts) == 2


def test_pipelines_and_callbacks_and_groups_go_on_after_coroutines(make_broker, worker, log):
    broker = make_broker()

    async def double(number):
        await asyncio.sleep(0)
        return number * 2

    async def note(*args):
        log.append(args)

    double = dramalite.actor(double, store_results=True)
    note = dramalite.actor(note)
    (double.message(1) | double.message() | note.message("piped")).run()
    members = dramalite.group([double.message(5), double.message(6)])
    members.add_completion_callback(note.message("group"))
    members.run()
    told = double.send_with_options(args=(3,), on_success=note)
    work_off(broker, worker)

    assert ("piped", 4) in log
    assert ("group",) in log
    assert [(data["message_id"], result) for data, result in (args for args in log if type(args[0]) is not str)] == [
        (told.message_id, 6)
    ]


def test_a_coroutine_that_was_cancelled_by_itself_has_failed(broker, worker, outcomes):
    async def work():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    dramalite.actor(work, max_retries=0).send()
    work_off(broker, worker)

    assert [kind for _, kind in outcomes] == [RuntimeError]
    assert "cancelled" in broker.dead_letters[0].reason


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("late"), dramalite.Interrupt(), GeneratorExit()])
def test_the_loop_survives_a_coroutine_that_fails(broker, worker, gate, outcomes, error):
    async def fail():
        raise error

    dramalite.actor(gate.__call__, actor_name="wait").send()
    worker(broker)
    wait_until(lambda: gate.inside)
    dramalite.actor(fail, max_retries=0).send()
    wait_until(lambda: outcomes)
    gate.is_open = True
    broker.join("default", timeout=PATIENCE)

    assert [kind for _, kind in outcomes] == [type(error), type(None)]


def test_the_loop_survives_coroutines_that_want_to_end_the_program(run_python):
    result = run_python(
        """if True:
        import asyncio, dramalite, threading
        broker = dramalite.MemoryBroker()
        dramalite.set_broker(broker)
        inside, leave, ended = threading.Event(), threading.Event(), threading.Event()

        @dramalite.actor
        async def wait():
            inside.set()
            while not leave.is_set():
                await asyncio.sleep(0.002)
            ended.set()

        @dramalite.actor(max_retries=0)
        async def leaving(kind):
            raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt()}[kind]

        wait.send()
        worker = dramalite.Worker(broker, worker_threads=1)
        worker.start()
        inside.wait(100)
        leaving.send("exit")
        leaving.send("interrupt")
        pause = threading.Event()
        for _ in range(20_000):
            pause.wait(0.005)
            if len(broker.dead_letters) == 2:
                break
        leave.set()
        print(len(broker.dead_letters), ended.wait(100))
        worker.stop(timeout=20)
        """
    )

    assert result.stdout == "2 True\n", result.stderr


@pytest.mark.parametrize("call", ["asyncio.create_task(leave())", "asyncio.get_running_loop().stop()"])
def test_what_a_coroutine_does_to_the_loop_ends_no_other_coroutine(run_python, call):
    result = run_python(
        f"""if True:
        import asyncio, dramalite, sys, threading
        broker = dramalite.MemoryBroker()
        dramalite.set_broker(broker)
        inside, leave_now, ended = threading.Event(), threading.Event(), threading.Event()

        @dramalite.actor
        async def wait():
            inside.set()
            while not leave_now.is_set():
                await asyncio.sleep(0.002)
            ended.set()

        async def leave():
            sys.exit(3)

        @dramalite.actor(max_retries=0)
        async def culprit():
            {call}
            await asyncio.sleep(0.01)

        worker = dramalite.Worker(broker, worker_threads=2)
        worker.start()
        wait.send()
        inside.wait(100)
        culprit.send()
        pause = threading.Event()
        for _ in range(20_000):
            pause.wait(0.005)
            if len(broker.pending()) == 1:
                break
        leave_now.set()
        print(ended.wait(100))
        """
    )

    assert result.stdout == "True\n", result.stderr


def test_an_exception_that_is_false_ends_a_coroutine_too(broker, worker, outcomes):
    class Falsy(Exception):
        def __len__(self):
            return 0

    async def fail():
        raise Falsy("no")

    dramalite.actor(fail, max_retries=0).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert outcomes == [(None, Falsy)]


# Time limits


@pytest.fixture
def limited(make_stub_broker, unhurried):
    """A broker whose time limits are checked often, with the ends of all attempts as `ends`."""
    broker = make_stub_broker(
        [TimeLimit(interval=10), Retries(max_retries=0, min_backoff=1), Outcomes()], fail_fast_default=False
    )
    broker.ends = broker.middleware[-1].ends
    return broker


def until_begun(log):
    """Options of an actor that is interrupted once it has begun; before, on a busy machine, is tried again."""
    return {"time_limit": 30, "retry_when": lambda retries, exception: not log}


async def forever():
    await asyncio.sleep(DEADLINE)


def test_a_coroutine_that_takes_too_long_has_time_to_clean_up(limited, worker, log):
    async def work():
        log.append("begun")
        try:
            await forever()
        finally:
            await asyncio.sleep(0.02)
            log.append("cleaned up")

    dramalite.actor(work, **until_begun(log)).send()
    work_off(limited, worker)

    assert log == ["begun", "cleaned up"]
    assert limited.ends[-1] == (None, TimeLimitExceeded)


def test_a_coroutine_may_end_well_in_spite_of_its_time_limit(limited, worker, log):
    async def work():
        log.append("begun")
        try:
            await forever()
        except asyncio.CancelledError:
            log.append("saved what there was")

    dramalite.actor(work, **until_begun(log)).send()
    work_off(limited, worker)

    assert log == ["begun", "saved what there was"]
    assert limited.ends[-1] == (None, type(None))


def test_a_coroutine_that_took_too_long_is_retried(limited, worker, log):
    async def work():
        log.append(1)
        if len(log) == 1:
            await forever()

    dramalite.actor(work, time_limit=30, max_retries=None, min_backoff=1, max_backoff=1).send()
    work_off(limited, worker)

    assert len(log) == 2
    assert (limited.ends[0], limited.ends[-1]) == ((None, TimeLimitExceeded), (None, type(None)))


def test_a_time_limit_ends_no_other_coroutine(limited, worker, gate):
    dramalite.actor(gate.__call__, actor_name="wait", time_limit=PATIENCE).send()
    dramalite.actor(forever, time_limit=30).send()
    worker(limited)
    wait_until(lambda: limited.ends)
    gate.is_open = True
    limited.join("default", timeout=PATIENCE)

    assert limited.ends == [(None, TimeLimitExceeded), (None, type(None))]


def test_a_time_limit_ends_no_coroutine_of_another_database(make_file_broker, clock, worker, gate):
    brokers = []
    for name, limit in (("one.db", PATIENCE), ("two.db", 100 * PATIENCE)):
        broker = make_file_broker(name, clock=clock, middleware=[TimeLimit(interval=10), Outcomes()])
        dramalite.actor(gate.__call__, actor_name="wait", time_limit=limit).send()  # Both at the same time.
        brokers.append(broker)
        worker(broker)
    wait_until(lambda: gate.inside == 2)
    clock.advance(PATIENCE)
    wait_until(lambda: any(broker.middleware[-1].ends for broker in brokers))
    gate.is_open = True
    for broker in brokers:
        broker.join("default", timeout=PATIENCE)

    assert [broker.middleware[-1].ends for broker in brokers] == [[(None, TimeLimitExceeded)], [(None, type(None))]]


def test_a_coroutine_within_its_time_limit_is_left_alone(limited, worker, log):
    async def work():
        await asyncio.sleep(0.02)
        log.append("done")

    dramalite.actor(work, time_limit=PATIENCE).send()
    work_off(limited, worker)

    assert log == ["done"]


@pytest.fixture
def stuck(make_stub_broker, worker, clock, gate, log):
    """The worker of a coroutine that goes on, until the gate is opened, when its time has long been over."""
    broker = make_stub_broker([TimeLimit(interval=10), Retries(max_retries=0)], clock=clock, fail_fast_default=False)

    async def work():
        while not gate.is_open:
            try:
                await gate()
            except asyncio.CancelledError:
                log.append("cancelled")

    dramalite.actor(work, time_limit=60_000).send()
    started = worker(broker)
    started.on_stuck = lambda: log.append("told that it is stuck")
    wait_until(lambda: gate.inside)
    clock.advance(60_000)
    wait_until(lambda: log)
    clock.advance(60_000)
    return started


def test_a_coroutine_that_does_not_end_at_its_time_limit_is_failed(stuck):
    stuck.broker.join("default", timeout=PATIENCE)

    assert [letter.reason.partition(":")[0] for letter in stuck.broker.dead_letters] == ["TimeLimitExceeded"]


def test_the_worker_tells_of_a_coroutine_that_does_not_end_at_its_time_limit(stuck, log):
    wait_until(lambda: len(log) > 1)

    assert sorted(log) == ["cancelled", "told that it is stuck"]


def test_what_becomes_of_a_coroutine_after_it_was_failed_counts_no_more(stuck, gate, log):
    wait_until(lambda: stuck.broker.dead_letters)
    gate.is_open = True
    dramalite.actor(log.append, actor_name="note").send("after")
    stuck.broker.join("default", timeout=PATIENCE)

    assert "after" in log  # Who tells that it was stuck may be later.
    assert len(stuck.broker.dead_letters) == 1


def test_a_time_limit_reaches_what_a_thread_runs_on_the_loop(limited, worker, patient, log):
    async def inner():
        log.append("begun")
        try:
            await forever()
        finally:
            await asyncio.sleep(0.02)
            log.append("cleaned up")

    dramalite.actor(lambda: async_to_sync(inner)(), actor_name="work", **until_begun(log)).send()
    work_off(limited, worker)

    assert log == ["begun", "cleaned up"]
    assert limited.ends[-1] == (None, TimeLimitExceeded)


# Stopping


def test_stopping_waits_for_coroutines_in_hand(broker, worker, gate, log):
    async def work():
        await gate()
        log.append("done")

    dramalite.actor(work).send()
    started = worker(broker)
    wait_until(lambda: gate.inside)
    stopping = threading.Thread(target=started.stop, daemon=True)
    stopping.start()
    gate.is_open = True
    stopping.join(DEADLINE)

    assert log == ["done"]
    assert not broker.pending()


def test_a_coroutine_that_wants_to_know_of_the_stop_has_time_to_clean_up(broker, worker, outcomes, log):
    async def work():
        log.append("begun")
        try:
            await forever()
        finally:
            await asyncio.sleep(0.02)
            log.append("cleaned up")

    dramalite.actor(work, notify_shutdown=True).send()
    started = worker(broker)
    wait_until(lambda: log)
    started.stop(timeout=PATIENCE)

    assert log == ["begun", "cleaned up"]
    assert [kind for _, kind in outcomes] == [Shutdown]
    assert len(broker.pending()) == 1


def test_a_coroutine_that_outlasts_the_stop_is_cancelled_and_runs_again(broker, worker, log):
    async def work():
        log.append("begun")
        if len(log) > 1:
            return
        try:
            await forever()
        finally:
            await asyncio.sleep(0)
            log.append("cancelled")

    dramalite.actor(work).send()
    started = worker(broker)
    wait_until(lambda: log)
    started.stop(timeout=20)
    wait_until(lambda: len(log) == 2)
    work_off(broker, worker)

    assert log == ["begun", "cancelled", "begun"]


def test_a_coroutine_that_outlasts_the_stop_has_time_to_clean_up(broker, worker, patient, log):
    async def work():
        log.append("begun")
        try:
            await forever()
        finally:
            await asyncio.sleep(0.1)
            log.append("cleaned up")

    dramalite.actor(work).send()
    started = worker(broker)
    wait_until(lambda: log)
    started.stop(timeout=20)

    assert log == ["begun", "cleaned up"]


def test_the_outcome_of_a_coroutine_that_was_handed_back_does_not_count(make_file_broker, worker, log):
    broker = make_file_broker()

    async def work():
        log.append("begun")
        if len(log) > 1:
            return "second"
        try:
            await forever()
        except asyncio.CancelledError:
            log.append("cancelled")
            return "first"

    sent = dramalite.actor(work, store_results=True).send()
    started = worker(broker)
    wait_until(lambda: log)
    started.stop(timeout=20)
    wait_until(lambda: len(log) == 2)
    worker(broker)

    assert sent.get_result(block=True, timeout=PATIENCE) == "second"


def test_pausing_waits_for_coroutines_in_hand(broker, worker, gate, log):
    async def work(number):
        await gate()
        log.append(number)

    work = dramalite.actor(work)
    work.send(1)
    started = worker(broker)
    wait_until(lambda: gate.inside)
    pausing = threading.Thread(target=started.pause, daemon=True)
    pausing.start()
    gate.is_open = True
    pausing.join(DEADLINE)
    paused = list(log)
    work.send(2)
    started.resume()
    broker.join("default", timeout=PATIENCE)

    assert paused == [1]
    assert log == [1, 2]


# From coroutines


def test_a_coroutine_sends_without_stopping_the_loop(broker):
    work = dramalite.actor(print, actor_name="work")
    sent = asyncio.run(work.send_async(1, sep=""))

    assert isinstance(sent, Message)
    assert (sent.args, sent.kwargs) == ((1,), {"sep": ""})
    assert broker.pending() == [sent]


def test_a_coroutine_sends_with_options(broker):
    work = dramalite.actor(print, actor_name="work")
    sent = asyncio.run(work.send_with_options_async(args=(1,), kwargs={"sep": ""}, delay=60_000, colour="red"))

    assert (sent.args, sent.kwargs, sent.options["colour"]) == ((1,), {"sep": ""}, "red")
    assert broker.assert_sent(work, args=(1,), delay=60_000) == broker.pending() == [sent]


def test_what_cannot_be_sent_is_refused_where_it_is_awaited(broker):
    work = dramalite.actor(print, actor_name="work")
    with pytest.raises(TypeError, match="set"):
        asyncio.run(work.send_async({1, 2}))

    assert broker.pending() == []


def test_a_class_based_actor_is_sent_to_from_coroutines_too(broker):
    class Work(dramalite.GenericActor):
        def perform(self, number):
            pass

    assert asyncio.run(Work.send_async(1)) == broker.pending()[0]


def test_an_async_actor_may_send_in_both_ways(broker, worker, log):
    note = dramalite.actor(log.append, actor_name="note")

    @dramalite.actor
    async def work():
        await note.send_async("awaited")
        note.send("plain")

    work.send()
    work_off(broker, worker)

    assert sorted(log) == ["awaited", "plain"]


def test_a_coroutine_awaits_a_result(broker, worker):
    double = dramalite.actor(lambda number: number * 2, actor_name="double", store_results=True)
    worker(broker)

    async def main():
        sent = await double.send_async(21)
        return await sent.get_result_async(timeout=PATIENCE)

    assert asyncio.run(main()) == 42


def test_coroutines_send_and_await_results_while_the_threads_of_asyncio_are_all_busy(broker, worker):
    double = dramalite.actor(lambda number: number * 2, actor_name="double", store_results=True)
    worker(broker)
    release = threading.Event()

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, release.wait, DEADLINE)
        try:
            sent = await double.send_async(21)
            return await sent.get_result_async(timeout=PATIENCE), busy.done()
        finally:
            release.set()
            await busy

    assert asyncio.run(main()) == (42, False)


def test_hooks_that_wait_for_coroutines_do_not_keep_those_from_being_sent(broker):
    meeting = threading.Barrier(8)

    class SendFirst(dramalite.Middleware):
        def before_enqueue(self, broker, message, delay):
            if message.actor_name == "outer":
                with contextlib.suppress(threading.BrokenBarrierError):
                    meeting.wait(DEADLINE)
                asyncio.run(inner.send_async())

    broker.add_middleware(SendFirst())
    inner = dramalite.actor(print, actor_name="inner")
    outer = dramalite.actor(print, actor_name="outer")

    async def main():
        await asyncio.gather(*[outer.send_async() for _ in range(8)])

    asyncio.run(main())

    assert sorted(message.actor_name for message in broker.pending()) == ["inner"] * 8 + ["outer"] * 8


def test_nobody_listens_any_more_for_coroutines_whose_loop_was_closed(make_file_broker):
    broker = make_file_broker()
    work = dramalite.actor(print, actor_name="work", store_results=True)
    loop = asyncio.new_event_loop()

    def is_listening():
        return any(thread.name == "dramalite-listener" for thread in threading.enumerate())

    async def begin():
        waiting = loop.create_task(work.send_with_options(delay=3_600_000).get_result_async(timeout=3_600_000))
        while not is_listening():
            await asyncio.sleep(0.002)
        return waiting

    waiting = loop.run_until_complete(begin())
    loop.close()
    broker.flush_all()

    wait_until(lambda: not is_listening())
    assert not waiting.done()
    waiting._log_destroy_pending = False


def test_coroutines_that_wait_for_results_do_not_look_at_the_end_of_each_other_message(broker, worker, monkeypatch):
    double = dramalite.actor(lambda number: number * 2, actor_name="double", store_results=True)
    worker(broker)
    looks = itertools.count()
    submit = concurrent.futures.ThreadPoolExecutor.submit

    def count_and_submit(*args, **kwargs):
        next(looks)
        return submit(*args, **kwargs)

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", count_and_submit)

    async def main():
        delayed = [double.send_with_options(args=(number,), delay=3_600_000) for number in range(50)]
        waiting = [asyncio.create_task(message.get_result_async(timeout=3_600_000)) for message in delayed]
        for number in range(40):
            assert await double.send(number).get_result_async(timeout=PATIENCE) == 2 * number
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

    asyncio.run(main())

    assert next(looks) < 1000  # 40 times 50 if each looked at each end.


def test_a_loop_goes_on_that_awaits_a_result_while_another_program_writes(make_file_broker, monkeypatch):
    connect, waiting, held = sqlite3.connect, threading.Event(), []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            try:
                return super().execute(statement, *values)
            except sqlite3.OperationalError:
                waiting.set()  # The file is locked.
                raise

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_file_broker()
    work = dramalite.actor(print, actor_name="work", store_results=True)
    sent = work.send(1)

    async def main():
        awaiting = asyncio.ensure_future(sent.get_result_async(timeout=100))
        for _ in range(10):
            await asyncio.sleep(0.002)
        held.append(other.in_transaction)
        other.rollback()
        with pytest.raises(dramalite.ResultTimeout):
            await awaiting

    with contextlib.closing(connect(broker.path, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        sending = threading.Thread(target=work.send, args=(2,), daemon=True)
        sending.start()  # It rightly waits.
        waiting.wait(DEADLINE)
        until = threading.Timer(DEADLINE / 2, other.rollback)  # At the latest.
        until.start()
        asyncio.run(main())
        until.cancel()
        until.join()
        sending.join(DEADLINE)

    assert held == [True]


def test_a_wait_that_is_cancelled_before_it_began_leaves_the_listening_to_others(make_file_broker):
    broker = make_file_broker()
    sent = dramalite.actor(print, actor_name="work", store_results=True).send(1)

    async def main():
        loop = asyncio.get_running_loop()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            loop.set_default_executor(pool)
            go_on = threading.Event()
            blocking = loop.run_in_executor(None, go_on.wait)
            awaiting = asyncio.ensure_future(sent.get_result_async(timeout=PATIENCE))
            await asyncio.sleep(0)
            awaiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await awaiting
            go_on.set()
            await blocking

    def listens():
        return any(thread.name == "dramalite-listener" for thread in threading.enumerate())

    asyncio.run(main())
    waiting = threading.Thread(target=sent.get_result, kwargs={"block": True, "timeout": PATIENCE}, daemon=True)
    waiting.start()
    wait_until(listens)
    broker.drain()
    waiting.join(DEADLINE)
    wait_until(lambda: not listens())


def test_many_results_are_awaited_at_once_without_threads(broker, worker, gate):
    async def work(number):
        await gate()
        return number

    work = dramalite.actor(work, store_results=True)
    worker(broker)

    async def main():
        sent = [work.send(number) for number in range(40)]
        waiting = [asyncio.ensure_future(message.get_result_async(timeout=PATIENCE)) for message in sent]
        await asyncio.sleep(0)
        threads = threading.active_count()
        while gate.inside < 40:
            await asyncio.sleep(0.002)
        threads = threading.active_count() - threads
        gate.is_open = True
        return threads, await asyncio.gather(*waiting)

    threads, results = asyncio.run(main())

    assert results == list(range(40))
    assert threads <= 2


def test_awaiting_a_result_ends_with_its_timeout(broker):
    sent = dramalite.actor(print, actor_name="work", store_results=True).send()
    before = time.monotonic()
    with pytest.raises(dramalite.ResultTimeout) as raised:
        asyncio.run(sent.get_result_async(timeout=50))

    assert raised.value.message == sent
    assert 0.045 <= time.monotonic() - before < DEADLINE


def test_awaiting_the_result_of_a_failure_raises_it(broker, worker):
    def fail():
        raise ValueError("no")

    sent = dramalite.actor(fail, store_results=True, max_retries=0).send()
    worker(broker)
    with pytest.raises(dramalite.ResultFailure, match="actor raised ValueError: no"):
        asyncio.run(sent.get_result_async(timeout=PATIENCE))


def test_awaiting_a_result_that_will_never_come_ends_at_once(broker):
    message = dramalite.actor(print, actor_name="work", store_results=True).message()
    before = time.monotonic()
    with pytest.raises(dramalite.ResultUnavailable):
        asyncio.run(message.get_result_async(timeout=60_000))

    assert time.monotonic() - before < DEADLINE  # Of a minute.


def test_a_result_is_awaited_from_a_backend_that_is_given(broker, worker):
    sent = dramalite.actor(lambda: 42, actor_name="work", store_results=True).send()
    worker(broker)
    backend = broker.get_results_backend()

    assert asyncio.run(sent.get_result_async(backend=backend, timeout=PATIENCE)) == 42
    assert asyncio.run(backend.get_result_async(sent, timeout=PATIENCE)) == 42


def test_an_async_actor_may_await_the_result_of_another(broker, worker):
    @dramalite.actor(store_results=True)
    async def inner(number):
        return number * 2

    @dramalite.actor(store_results=True)
    async def outer():
        return await (await inner.send_async(21)).get_result_async(timeout=PATIENCE)

    sent = outer.send()
    worker(broker)

    assert sent.get_result(block=True, timeout=PATIENCE) == 42


#: A program that awaited a result on a loop that is closed by now, while one message is due and one is not.
CLOSED_LOOP = """
    import asyncio, os, threading
    import dramalite

    ran = threading.Event()
    broker = dramalite.MemoryBroker()
    work = dramalite.actor(ran.set, actor_name="work", store_results=True, broker=broker)
    work.send()
    later = work.send_with_options(delay=3_600_000)
    loop = asyncio.new_event_loop()
    task = loop.create_task(later.get_result_async(timeout=600_000))
    loop.run_until_complete(asyncio.sleep(0.1))
    loop.close()
"""


def test_a_send_is_no_error_though_a_loop_was_closed_that_awaited_a_result(run_python):
    sends = """
    work.send()
    print(len(broker.pending()), flush=True)
    os._exit(0)
    """
    done = run_python(textwrap.dedent(CLOSED_LOOP + sends))

    assert done.stdout == "3\n", done.stderr


def test_a_worker_works_though_a_loop_was_closed_that_awaited_a_result(run_python):
    works = """
    dramalite.Worker(broker, worker_threads=1).start()
    print(ran.wait(100), flush=True)
    os._exit(0)
    """
    done = run_python(textwrap.dedent(CLOSED_LOOP + works))

    assert done.stdout == "True\n", done.stderr


# Coroutines from plain code


def test_a_coroutine_function_becomes_a_plain_one():
    async def double(number, *, by=2):
        """Multiply."""
        await asyncio.sleep(0)
        return number * by

    plain = async_to_sync(double)

    assert (plain.__name__, plain.__doc__) == ("double", "Multiply.")
    assert plain(21) == 42
    assert plain(7, by=3) == 21


def test_it_runs_on_another_thread():
    async def where():
        return threading.get_ident()

    assert async_to_sync(where)() != threading.get_ident()
    assert async_to_sync(where)() == async_to_sync(where)()


def test_its_error_has_its_own_traceback():
    async def culprit():
        raise ValueError("no")

    with pytest.raises(ValueError) as raised:
        async_to_sync(culprit)()

    assert "culprit" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]


def test_its_own_timeout_error_reaches_the_caller_once():
    calls = []

    async def late():
        calls.append(1)
        raise TimeoutError("late")

    with pytest.raises(TimeoutError, match="late"):
        async_to_sync(late)()

    assert calls == [1]


def test_its_error_is_forgotten_without_the_garbage_collector():
    errors = []

    class Once(Exception):
        def __init__(self):
            errors.append(weakref.ref(self))

    async def fail():
        raise Once()

    gc.disable()
    try:
        with contextlib.suppress(Once):
            async_to_sync(fail)()
        wait_until(lambda: errors[0]() is None)
    finally:
        gc.enable()


def test_it_sees_the_context_of_its_caller():
    number = contextvars.ContextVar("number", default=0)

    async def look():
        return number.get()

    number.set(7)

    assert async_to_sync(look)() == 7


def test_it_can_be_called_while_a_loop_runs_in_this_thread():
    async def double(number):
        await asyncio.sleep(0)
        return number * 2

    async def main():
        return async_to_sync(double)(21)

    assert asyncio.run(main()) == 42


def test_it_can_be_called_by_many_threads_at_once(gate):
    results = []
    async_gate = async_to_sync(gate.__call__)
    threads = [threading.Thread(target=lambda: results.append(async_gate()), daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: gate.inside == 5)
    gate.is_open = True
    for thread in threads:
        thread.join(DEADLINE)

    assert results == [None] * 5


def test_a_coroutine_called_on_the_loop_itself_is_an_error_and_no_deadlock(run_python):
    result = run_python(
        """if True:
        import dramalite, threading

        @dramalite.actor(broker=dramalite.MemoryBroker())
        async def inner():
            return 42

        async def outer():
            try:
                return inner()
            except RuntimeError as error:
                return "refused"

        told = []
        thread = threading.Thread(target=lambda: told.append(dramalite.async_to_sync(outer)()), daemon=True)
        thread.start()
        thread.join(100)
        print(told)
        """
    )

    assert result.stdout == "['refused']\n", result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_a_loop_of_its_own(run_python):
    result = run_python(
        """if True:
        import dramalite, os, sys, warnings
        warnings.simplefilter("ignore")

        async def double(number):
            return number * 2

        plain = dramalite.async_to_sync(double)
        plain(1)
        child = os.fork()
        if not child:
            os._exit(plain(21))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), plain(2))
        """
    )

    assert result.stdout == "42 4\n", result.stderr


@pytest.mark.parametrize("late", [False, True])
def test_a_first_coroutine_at_the_end_of_the_program_is_no_dead_letter(run_python, tmp_path, late):
    code = f"""if True:
        import threading, time
        import dramalite

        broker = dramalite.SQLiteBroker("queue.db")
        begun = threading.Event()

        @dramalite.actor(broker=broker)
        def note():
            begun.set()

        @dramalite.actor(broker=broker, max_retries=0)
        async def last():
            print("ran")

        def send():
            threading.main_thread().join()
            last.send()

        worker = dramalite.Worker(broker, worker_threads=1)
        worker.start()
        note.send()
        begun.wait({DEADLINE})
        threading.Thread(target=send).start() if {late} else last.send()
        """
    output = run_python(code).stdout
    broker = dramalite.SQLiteBroker(str(tmp_path / "queue.db"))
    try:
        assert broker.dead_letters == []
        assert output == "ran\n" or broker.pending()  # Or both, if the program was over before it was written.
        assert output in ("ran\n", "")
    finally:
        broker.close()
