"""The worker: starting, pausing and stopping it, what a job may do to it, and what it gives back."""

import asyncio
import gc
import logging
import re
import signal
import sqlite3
import sys
import threading
import time
import weakref

import pytest

import dramalite
from dramalite import Message, QueueJoinTimeout

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000
HOUR = 3_600_000


class Job:
    """A job that reports that it runs and then waits until it is let go."""

    def __init__(self):
        self.running, self.go_on = threading.Event(), threading.Event()
        self.finished = []

    def __call__(self, value=None):
        self.running.set()
        self.go_on.wait(DEADLINE)
        self.finished.append(value)


@pytest.fixture
def job():
    """A Job that is let go at the latest when the test ends."""
    job = Job()
    yield job
    job.go_on.set()


def in_thread(function, *args, **keywords):
    """Start `function` in a thread of its own and return the thread."""
    thread = threading.Thread(target=function, args=args, kwargs=keywords, daemon=True)
    thread.start()
    return thread


def get_stuck(job, clock, caplog):
    """Have a job of the default time limit outlast it for so long that the worker's next look gives its thread up."""
    job.running.wait(DEADLINE)
    clock.advance(HOUR)
    wait_until(lambda: "Time limit exceeded" in caplog.text)
    clock.advance(HOUR)


# Starting and stopping


def test_a_worker_is_a_context_manager(broker):
    done = []
    dramalite.actor(done.append, actor_name="work").send(1)
    with dramalite.Worker(broker, worker_threads=2) as worker:
        broker.join("default", timeout=PATIENCE)

    assert isinstance(worker, dramalite.Worker)
    assert done == [1]


def test_a_worker_stops_at_the_end_of_its_block_also_after_an_error(broker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    with pytest.raises(ValueError):
        with dramalite.Worker(broker, worker_threads=1):
            raise ValueError("no")
    work.send(1)

    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=30)
    assert done == []


def test_a_worker_runs_in_any_thread(broker):
    done = []
    dramalite.actor(done.append, actor_name="work").send(1)

    def run():
        with dramalite.Worker(broker, worker_threads=1):
            broker.join("default", timeout=PATIENCE)

    thread = in_thread(run)
    thread.join(DEADLINE)

    assert not thread.is_alive()
    assert done == [1]


def test_starting_does_not_block_and_leaves_signals_alone(broker):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with dramalite.Worker(broker, worker_threads=1):
        inside = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    assert inside == handlers


def test_a_worker_has_eight_threads_unless_told_otherwise(make_broker):
    booted = []

    class Threads(dramalite.Middleware):
        def after_worker_thread_boot(self, broker, thread):
            booted.append(thread)

    with dramalite.Worker(make_broker(middleware=[Threads()])):
        wait_until(lambda: len(booted) == 8)

    assert len(booted) == 8


def test_its_threads_do_not_keep_a_program_alive(run_python):
    done = run_python(
        "import dramalite\n"
        "broker = dramalite.SQLiteBroker('queue.db')\n"
        "@dramalite.actor(broker=broker)\n"
        "def work(): print('worked')\n"
        "work.send()\n"
        "dramalite.Worker(broker, worker_threads=2).start()\n"
        "broker.join('default', timeout=100000)\n"
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "worked\n", "")


def test_a_worker_takes_messages_sent_after_it_started(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    worker(broker)
    work.send(1)
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_a_worker_serves_actors_declared_after_it_started(broker, worker):
    done = []
    worker(broker)
    dramalite.actor(done.append, actor_name="work", queue_name="late").send(1)
    broker.join("late", timeout=PATIENCE)

    assert done == [1]


def test_several_threads_work_at_the_same_time(broker, worker):
    meeting = threading.Barrier(4)
    done = []

    def work():
        meeting.wait(DEADLINE)
        done.append(1)

    actor = dramalite.actor(work, max_retries=0)
    for _ in range(4):
        actor.send()
    worker(broker, worker_threads=4)
    broker.join("default", timeout=PATIENCE)

    assert done == [1] * 4


def test_a_worker_serves_only_the_queues_it_is_told(broker, worker):
    done = []
    other = dramalite.actor(lambda: done.append("other"), actor_name="o", queue_name="other")
    mine = dramalite.actor(lambda: done.append("mine"), actor_name="m", queue_name="mine")
    other.send()
    mine.send()
    mine.send_with_options(delay=1)
    worker(broker, queues={"mine"})
    broker.join("mine", timeout=PATIENCE)

    with pytest.raises(QueueJoinTimeout):
        broker.join("other", timeout=30)
    assert done == ["mine", "mine"]


@pytest.mark.parametrize("queues", [None, [], set()])
def test_a_worker_told_no_queues_serves_all(broker, worker, queues):
    done = []
    dramalite.actor(lambda: done.append("a"), actor_name="a", queue_name="a").send()
    dramalite.actor(lambda: done.append("b"), actor_name="b", queue_name="b").send()
    worker(broker, queues=queues)
    broker.join("a", timeout=PATIENCE)
    broker.join("b", timeout=PATIENCE)

    assert sorted(done) == ["a", "b"]


def test_stopping_waits_for_the_job_in_hand(broker, job):
    dramalite.actor(job, actor_name="work").send("in hand")
    worker = dramalite.Worker(broker, worker_threads=1)
    worker.start()
    job.running.wait(DEADLINE)
    stopping = in_thread(worker.stop)
    stopping.join(0.03)
    still_stopping = stopping.is_alive()
    job.go_on.set()
    stopping.join(DEADLINE)

    assert still_stopping is True
    assert stopping.is_alive() is False
    assert job.finished == ["in hand"]


def test_a_stopped_worker_takes_no_more_work_and_the_next_one_gets_it_in_order(broker, job, worker):
    done, is_stopping = [], threading.Event()

    class Tells(dramalite.Middleware):
        def before_worker_shutdown(self, broker, worker):
            is_stopping.set()

    broker.add_middleware(Tells())
    block = dramalite.actor(job, actor_name="block")
    work = dramalite.actor(done.append, actor_name="work")
    block.send()
    for number in range(20):
        work.send(number)
    first = worker(broker)
    job.running.wait(DEADLINE)
    stopping = in_thread(first.stop)
    assert is_stopping.wait(DEADLINE)
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=30)
    job.go_on.set()
    stopping.join(DEADLINE)
    before = list(done)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert before == []
    assert done == list(range(20))
    assert job.finished == [None]


def test_a_job_that_finished_before_the_stop_is_not_run_again(broker, worker):
    done = []
    dramalite.actor(done.append, actor_name="work").send(1)
    first = worker(broker)
    wait_until(lambda: done)
    first.stop()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_a_stop_may_have_any_time(broker, job):
    dramalite.actor(job, actor_name="work").send("in hand")
    worker = dramalite.Worker(broker, worker_threads=1)
    worker.start()
    job.running.wait(DEADLINE)
    stopping = in_thread(worker.stop, timeout=10**13)
    job.go_on.set()
    stopping.join(DEADLINE)

    assert stopping.is_alive() is False
    assert job.finished == ["in hand"]
    assert broker.pending() == []


def test_stop_returns_when_its_timeout_is_over(broker, job):
    dramalite.actor(job, actor_name="work").send()
    worker = dramalite.Worker(broker, worker_threads=1)
    worker.start()
    job.running.wait(DEADLINE)
    stopping = in_thread(worker.stop, timeout=20)
    stopping.join(DEADLINE)

    assert stopping.is_alive() is False
    assert job.finished == []


def test_nothing_begins_once_the_stop_is_announced(broker, worker):
    begun = threading.Event()
    late = dramalite.actor(begun.set, actor_name="late")

    class SendsLate(dramalite.Middleware):
        def before_worker_shutdown(self, broker, worker):
            late.send()
            begun.wait(0.1)

    broker.add_middleware(SendsLate())
    worker(broker, worker_threads=2).stop()

    assert begun.is_set() is False
    assert len(broker.pending()) == 1


def test_stopping_before_starting_and_twice_is_harmless(broker):
    worker = dramalite.Worker(broker, worker_threads=1)
    worker.stop()
    worker.start()
    worker.stop()

    assert worker.stop() is None


class Held(dramalite.Middleware):
    """Holds each stop of the worker that came first, in the hook before it, until its event is set."""

    def __init__(self, stops):
        self.events = [threading.Event() for _ in range(stops)]
        self.worker, self.held = None, []

    def before_worker_boot(self, broker, worker):
        self.worker = self.worker or worker

    def before_worker_shutdown(self, broker, worker):
        if worker is self.worker:
            event = self.events[len(self.held)]
            self.held.append(event)
            event.wait(DEADLINE)


def stop_twice_at_once(worker, held):
    """Call stop() while another call is held in the hook; the threads of both."""
    stopping = [in_thread(worker.stop)]
    wait_until(lambda: held.held)
    stopping.append(in_thread(worker.stop))
    stopping[1].join(0.05)  # That it waits for the first one shows nowhere; late, it can only pass more easily.
    return stopping


def refuse_start(monkeypatch, number):
    """Have the start of that thread from now on fail, as if the system had none left."""
    started, start = [], threading.Thread.start

    def start_or_refuse(thread):
        started.append(thread)
        if len(started) == number:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr("threading.Thread.start", start_or_refuse)


@pytest.mark.parametrize("number", [2, 3])
def test_a_start_that_finds_no_threads_left_raises_and_leaves_none_behind(broker, monkeypatch, number):
    before = set(threading.enumerate())
    starting = dramalite.Worker(broker, worker_threads=2)
    refuse_start(monkeypatch, number)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        starting.start()

    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_worker_can_be_started_after_a_start_that_found_no_threads_left(broker, monkeypatch, number):
    done = []
    dramalite.actor(done.append, actor_name="work").send(1)
    starting = dramalite.Worker(broker, worker_threads=2)
    refuse_start(monkeypatch, number)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        starting.start()
    with starting:
        broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_a_stop_while_the_worker_starts_stops_it(broker):
    class Impatient(dramalite.Middleware):
        def before_worker_boot(self, broker, worker):
            stops.append(in_thread(worker.stop))

    stops = []
    broker.add_middleware(Impatient())
    starting = dramalite.Worker(broker)
    for _ in range(3):
        starting.start()
        stops[-1].join(DEADLINE)

        assert not stops[-1].is_alive()
        assert starting.runners == set()


def test_a_job_that_stops_its_worker_is_done_and_not_run_again(broker):
    @dramalite.actor
    def last(worker_number):
        ran.append(worker_number)
        workers[worker_number].stop()

    ran, workers = [], [dramalite.Worker(broker, worker_threads=1) for _ in range(2)]
    last.send(0)
    workers[0].start()
    wait_until(lambda: ran)
    workers[0].stop()
    with workers[1]:
        broker.join("default", timeout=PATIENCE)

    assert ran == [0]


@pytest.mark.parametrize("error", [dramalite.MiddlewareError, SystemExit, KeyboardInterrupt])
def test_a_hook_that_fails_as_the_worker_stops_does_not_keep_it(broker, error):
    class Failing(dramalite.Middleware):
        def before_worker_shutdown(self, broker, worker):
            raise error("no")

    broker.add_middleware(Failing())
    names = {thread.name for thread in threading.enumerate()}
    working = dramalite.Worker(broker, worker_threads=2)
    working.start()
    with pytest.raises(error):
        working.stop()

    assert working.runners == set()
    wait_until(lambda: {thread.name for thread in threading.enumerate()} <= names)


def test_two_stops_at_once_call_the_hooks_once(broker, worker):
    held = Held(stops=2)
    broker.add_middleware(held)
    stopping = stop_twice_at_once(worker(broker), held)
    for event in held.events:
        event.set()
    for thread in stopping:
        thread.join(DEADLINE)

    assert len(held.held) == 1


def test_a_second_stop_returns_when_the_first_one_is_over(broker, worker):
    held, returned = Held(stops=2), []
    broker.add_middleware(held)
    stopping = stop_twice_at_once(worker(broker), held)
    returned.append(not stopping[1].is_alive())
    for event in held.events:
        event.set()
    stopping[1].join(DEADLINE)
    returned.append(not stopping[1].is_alive())

    assert returned == [False, True]


def test_two_stops_at_once_do_not_give_another_workers_job_away(make_file_broker, worker, job):
    broker, other = make_file_broker(), make_file_broker()
    held, begun = Held(stops=2), []

    def work():
        begun.append(1)
        job()

    actor = dramalite.actor(work, broker=broker)
    dramalite.actor(work, broker=other)
    done = dramalite.actor(lambda: None, actor_name="done", broker=other, queue_name="done")
    broker.add_middleware(held)
    stopping = stop_twice_at_once(worker(broker), held)
    held.events[0].set()
    stopping[0].join(DEADLINE)
    worker(broker)  # In the place of the first.
    actor.send()
    job.running.wait(DEADLINE)
    held.events[1].set()
    stopping[1].join(DEADLINE)
    worker(other, worker_threads=2)
    done.send()
    other.join("done", timeout=PATIENCE)
    job.go_on.set()
    other.join("default", timeout=PATIENCE)

    assert begun == [1]


def test_a_thread_that_outlives_the_stop_ends_though_the_broker_was_closed(make_file_broker, worker, caplog):
    booted, go_on = [], threading.Event()

    class Slow(dramalite.Middleware):
        def after_worker_thread_boot(self, broker, thread):
            booted.append(thread)
            go_on.wait(DEADLINE)

    broker = make_file_broker()
    broker.add_middleware(Slow())
    started = worker(broker)
    wait_until(lambda: booted)
    started.stop(timeout=0)
    broker.close()
    go_on.set()
    booted[0].join(DEADLINE)

    assert booted[0].is_alive() is False
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_coroutine_that_outlives_the_stop_logs_no_errors_without_end_when_the_broker_was_closed(
    make_file_broker, worker, caplog
):
    ended, go_on = threading.Event(), threading.Event()

    class Slow(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            ended.set()
            go_on.wait(DEADLINE)

    async def work():
        pass

    broker = make_file_broker()
    broker.add_middleware(Slow())
    dramalite.actor(work, max_retries=0).send()
    started = worker(broker)
    ended.wait(DEADLINE)
    started.stop(timeout=20)
    broker.close()
    go_on.set()
    with pytest.raises(AssertionError):
        wait_until(lambda: len(caplog.records) > 10, timeout=0.2)

    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("hook", ["after_worker_thread_boot", "after_consumer_thread_boot"])
def test_a_hook_that_wants_to_end_the_thread_it_is_told_of_does_not_keep_the_worker_from_work(broker, worker, hook):
    def leave(self, broker, thread):
        raise SystemExit("no settings")

    done = []
    broker.add_middleware(type("Leaves", (dramalite.Middleware,), {hook: leave})())
    dramalite.actor(done.append, actor_name="work").send(1)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_a_worker_can_be_started_again(broker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    worker = dramalite.Worker(broker, worker_threads=1)
    for number in range(2):
        worker.start()
        work.send(number)
        broker.join("default", timeout=PATIENCE)
        worker.stop()

    assert done == [0, 1]


def test_a_second_worker_leaves_no_trace_of_the_first(broker, worker, caplog):
    before = list(broker.middleware)
    worker(broker).stop()
    worker(broker).stop()

    assert broker.middleware == before
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_two_workers_share_a_brokers_work(broker, worker):
    meeting = threading.Barrier(2)
    done = []

    def work():
        meeting.wait(DEADLINE)
        done.append(threading.get_ident())

    actor = dramalite.actor(work, max_retries=0)
    worker(broker)
    worker(broker)
    actor.send()
    actor.send()
    broker.join("default", timeout=PATIENCE)

    assert len(set(done)) == 2


def test_a_worker_with_a_long_job_keeps_nothing_that_another_could_do(broker, worker, job):
    done = []
    long = dramalite.actor(job, actor_name="long")
    short = dramalite.actor(done.append, actor_name="short")
    first = worker(broker)
    broker.enqueue_many(short.message("quick") for _ in range(200))  # So that it takes many ahead.
    broker.join("default", timeout=PATIENCE)
    first.pause()
    done.clear()
    long.send("in hand")
    broker.enqueue_many(short.message(number) for number in range(20))
    first.resume()
    job.running.wait(DEADLINE)
    short.send_with_options(args=("urgent",), priority=-1)
    worker(broker)
    wait_until(lambda: len(done) == 21)

    assert job.finished == []
    assert done[0] == "urgent"
    assert sorted(done[1:]) == list(range(20))


def test_an_urgent_message_waits_for_no_job_but_the_one_that_runs_where_jobs_take_their_time(broker, worker):
    done, never = [], threading.Event()
    urgent = dramalite.actor(done.append, actor_name="urgent", priority=-1)

    @dramalite.actor
    def work(number):
        never.wait(0.01)  # Longer than what a worker takes ahead.
        done.append(number)
        urgent.send(-number)

    broker.enqueue_many(work.message(number) for number in range(1, 21))
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [sign * number for number in range(1, 21) for sign in (1, -1)]


def test_workers_of_several_brokers_live_in_one_process(
    make_file_broker, make_stub_broker, worker
):
    brokers = [make_file_broker("one.db"), make_file_broker("two.db"), make_stub_broker()]
    done = []
    for number, broker in enumerate(brokers):
        actor = dramalite.actor(
            lambda number=number: done.append(number), actor_name="work", broker=broker
        )
        worker(broker)
        actor.send()
    for broker in brokers:
        broker.join("default", timeout=PATIENCE)

    assert sorted(done) == [0, 1, 2]


def test_each_message_is_run_once_by_many_workers_on_one_file(make_file_broker, worker):
    done = []
    brokers = [make_file_broker() for _ in range(3)]
    for broker in brokers:
        work = dramalite.actor(done.append, actor_name="work", broker=broker)
    brokers[0].enqueue_many(work.message(number) for number in range(300))
    for broker in brokers:
        worker(broker, worker_threads=2)
    brokers[0].join("default", timeout=PATIENCE)

    assert sorted(done) == list(range(300))


# Pause, resume, join


def test_a_paused_worker_runs_nothing_until_it_is_resumed(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    started = worker(broker, worker_threads=2)
    started.pause()
    work.send(1)
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=50)
    before = list(done)
    started.resume()
    broker.join("default", timeout=PATIENCE)

    assert before == []
    assert done == [1]


def test_pausing_an_idle_worker_takes_no_time(broker, worker):
    dramalite.actor(print, actor_name="work")
    started = worker(broker, worker_threads=2)
    taken_s = []
    for _ in range(5):  # The best of five counts, for the machine may be busy.
        before = time.monotonic()
        started.pause()
        taken_s.append(time.monotonic() - before)
        started.resume()

    assert min(taken_s) < 1


def test_pausing_waits_for_the_job_in_hand(broker, worker, job):
    dramalite.actor(job, actor_name="work").send("in hand")
    started = worker(broker)
    job.running.wait(DEADLINE)
    pausing = in_thread(started.pause)
    pausing.join(0.03)
    still_pausing = pausing.is_alive()
    job.go_on.set()
    pausing.join(DEADLINE)

    assert still_pausing is True
    assert pausing.is_alive() is False
    assert job.finished == ["in hand"]


def test_pausing_does_not_wait_for_a_job_that_was_given_up(make_broker, clock, worker, job, caplog):
    broker = make_broker(clock=clock, middleware=[dramalite.TimeLimit(interval=10)])
    dramalite.actor(job, actor_name="work").send()
    started = worker(broker)
    job.running.wait(DEADLINE)
    pausing = in_thread(started.pause)
    pausing.join(0.03)
    get_stuck(job, clock, caplog)
    pausing.join(DEADLINE)

    assert pausing.is_alive() is False


def test_a_paused_worker_can_be_stopped(broker, worker):
    started = worker(broker)
    started.pause()
    stopping = in_thread(started.stop)
    stopping.join(DEADLINE)

    assert stopping.is_alive() is False


def test_work_held_by_a_paused_worker_is_taken_by_another(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    worker(broker).pause()
    work.send(1)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [1]


def test_joining_a_worker_waits_for_its_job(broker, worker, job):
    dramalite.actor(job, actor_name="work").send("in hand")
    started = worker(broker)
    job.running.wait(DEADLINE)
    threading.Timer(0.02, job.go_on.set).start()
    broker.join("default", timeout=PATIENCE)
    started.join()

    assert job.finished == ["in hand"]


def test_joining_an_idle_worker_returns(broker, worker):
    started = worker(broker)
    joining = in_thread(started.join)
    joining.join(DEADLINE)

    assert joining.is_alive() is False


def first_of_two_that_sleep(broker, worker):
    """Start two workers that have worked and wait for more; the one that is woken first."""
    meeting = threading.Barrier(2)
    meet = dramalite.actor(lambda: meeting.wait(DEADLINE) and None, actor_name="meet", max_retries=0)
    first, _ = worker(broker), worker(broker)
    meet.send()
    meet.send()
    broker.join("default", timeout=PATIENCE)
    threading.Event().wait(0.05)  # That they sleep shows nowhere; awake, they can only pass more easily.
    return first


def test_what_is_sent_while_one_worker_is_paused_is_run_by_another(broker, worker):
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    first = first_of_two_that_sleep(broker, worker)
    first.pause()
    work.send(1)
    wait_until(lambda: done)

    assert done == [1]


def test_what_is_sent_while_one_worker_is_being_stopped_is_run_by_another(broker, worker):
    done = []
    ran = threading.Event()
    work = dramalite.actor(ran.set, actor_name="work")

    class SendsLate(dramalite.Middleware):
        def before_worker_shutdown(self, broker, stopping):
            if stopping is first:
                work.send()
                done.append(ran.wait(DEADLINE))

    broker.add_middleware(SendsLate())
    first = first_of_two_that_sleep(broker, worker)
    first.stop()

    assert done == [True]


def test_in_memory_a_message_that_is_sent_just_as_a_worker_stops_waiting_is_not_overlooked(
    clean_state, worker, monkeypatch
):
    threads, sent, done, make_lock = [], [], [], threading.Lock

    class Threads(dramalite.Middleware):
        def after_worker_thread_boot(self, broker, thread):
            threads.append(thread)

    class Lock:
        """A lock; the first wait for it in a worker's thread that times out ends with a message sent."""

        def __init__(self):
            self.real = make_lock()
            self.release, self.locked = self.real.release, self.real.locked

        def acquire(self, blocking=True, timeout=-1):
            is_acquired = self.real.acquire(blocking, timeout)
            if not is_acquired and timeout > 0 and not sent and threading.current_thread() in threads:
                sent.append(work.send(1))
            return is_acquired

        def __enter__(self):
            return self.real.acquire()

        def __exit__(self, *error):
            self.real.release()

    monkeypatch.setattr("threading.Lock", Lock)
    broker = dramalite.MemoryBroker(middleware=[Threads()])
    clean_state.callback(broker.close)
    work = dramalite.actor(done.append, actor_name="work", broker=broker)
    worker(broker, worker_timeout=20)
    wait_until(lambda: sent)
    wait_until(lambda: done)

    assert done == [1]


def test_an_outcome_survives_a_worker_that_had_no_memory_to_write_it(make_broker, worker, monkeypatch):
    connect, ran, failed = sqlite3.connect, [], []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if statement.startswith("BEGIN") and ran and not failed:
                failed.append(statement)
                raise MemoryError
            return super().execute(statement, *values)

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_broker()
    work = dramalite.actor(ran.append, actor_name="work", max_retries=0)
    broker.enqueue_many([work.message(number) for number in range(4)])
    first = worker(broker)
    wait_until(lambda: failed)
    first.stop()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert ran == [0, 1, 2, 3]


def test_a_thread_whose_outcome_another_one_has_written_goes_on_though_there_is_trouble_again(
    make_file_broker, worker, monkeypatch
):
    # The thread of the job can't write its outcome; another one can, and meets trouble where it looks for the dead.
    connect, done, written, refused, is_over = sqlite3.connect, [], [], [], threading.Event()

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if done and not is_over.is_set():
                if threading.current_thread() is done[0]:
                    raise sqlite3.OperationalError("database or disk is full")
                if statement.startswith("BEGIN"):
                    written.append(statement)
                elif written and not self.in_transaction and statement.lstrip().startswith("SELECT"):
                    refused.append(statement)
                    raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *values)

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_file_broker()
    work = dramalite.actor(lambda: done.append(threading.current_thread()), actor_name="work", on_crash="fail")
    worker(broker)
    work.send()
    wait_until(lambda: refused)
    is_over.set()
    work.send()

    wait_until(lambda: len(done) == 2)


@pytest.fixture
def takes_many(monkeypatch):
    """Workers take up as many messages at a time as they may, as they do where each takes little time."""
    monkeypatch.setattr("dramalite._BATCH_S", 5.0)


def test_after_a_moments_trouble_what_is_done_and_what_is_held_need_not_wait_for_a_long_job(
    make_broker, worker, job, takes_many, monkeypatch
):
    connect, failed = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if statement.startswith("BEGIN") and job.running.is_set() and not failed:
                failed.append(statement)
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *values)

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    monkeypatch.setattr("dramalite._IDLE_TICK_S", 0.05)  # After which the worker tries again.
    broker = make_broker()
    short = dramalite.actor(lambda number: number, actor_name="short", store_results=True)
    long = dramalite.actor(job, actor_name="long")
    first, _, *others = broker.enqueue_many([short.message(1), long.message(), short.message(2), short.message(3)])
    worker(broker)
    wait_until(lambda: failed)
    result = first.get_result(block=True, timeout=PATIENCE)
    worker(broker)

    assert result == 1
    assert [sent.get_result(block=True, timeout=PATIENCE) for sent in others] == [2, 3]
    assert job.finished == []


def test_what_a_worker_held_is_run_though_ctrl_c_kept_pause_from_handing_it_back(
    make_broker, worker, job, takes_many, monkeypatch
):
    connect, armed, done = sqlite3.connect, [], []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if armed and threading.current_thread() is threading.main_thread():
                raise armed.pop()
            return super().execute(statement, *values)

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    monkeypatch.setattr("dramalite._Dispatcher.look_after", lambda dispatcher: None)  # So that all is held until then.
    broker = make_broker()
    short = dramalite.actor(done.append, actor_name="short")
    long = dramalite.actor(job, actor_name="long")
    broker.enqueue_many([long.message(), *[short.message(number) for number in range(5)]])
    started = worker(broker)
    job.running.wait(DEADLINE)
    armed.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        started.pause()
    job.go_on.set()
    started.resume()
    broker.join("default", timeout=PATIENCE)

    assert done == list(range(5))


def test_joining_a_worker_ends_when_what_it_held_went_back_to_the_queue(broker, worker, takes_many, monkeypatch):
    done, held = [], threading.Event()

    def exchange_and_wait():
        result = exchange()
        if first._dispatcher.is_urgent() and not held.is_set():
            held.set()
            wait_until(lambda: len(done) == 20)  # As a thread does that gets no processor.
        return result

    work = dramalite.actor(done.append, actor_name="work")
    first = worker(broker)
    exchange = first._dispatcher.exchange
    monkeypatch.setattr(first._dispatcher, "exchange", exchange_and_wait)
    broker.enqueue_many([work.message(number) for number in range(20)])
    held.wait(DEADLINE)
    joining = in_thread(first.join)
    worker(broker)
    wait_until(lambda: len(done) == 20)
    joining.join(DEADLINE)

    assert joining.is_alive() is False


# One thread alone, or several


@pytest.mark.parametrize("place", [0, 1, 20, 39], ids=lambda place: f"at {place}")
def test_short_jobs_go_on_while_a_long_one_holds_its_thread(broker, worker, job, place):
    done = []
    short = dramalite.actor(done.append, actor_name="short")
    long = dramalite.actor(job, actor_name="long")
    worker(broker, worker_threads=2)
    broker.enqueue_many([short.message(number) for number in range(1000)])  # One thread does them alone.
    wait_until(lambda: len(done) == 1000)
    messages = [short.message(number) for number in range(40)]
    broker.enqueue_many([*messages[:place], long.message(), *messages[place:]])
    assert job.running.wait(DEADLINE)
    wait_until(lambda: len(done) == 1040)
    short.send("later")
    wait_until(lambda: done[-1] == "later")

    assert job.finished == []


def test_jobs_that_wait_for_each_other_meet_after_short_ones(broker, worker):
    threads = 4
    meeting = threading.Barrier(threads)
    done = []
    short = dramalite.actor(done.append, actor_name="short")
    meet = dramalite.actor(lambda: done.append(meeting.wait(DEADLINE)), actor_name="meet", max_retries=0)
    worker(broker, worker_threads=threads)
    broker.enqueue_many([short.message("short") for _ in range(1000)] + [meet.message() for _ in range(threads)])
    wait_until(lambda: len(done) == 1000 + threads)

    assert sorted(done[-threads:]) == list(range(threads))


def test_a_stuck_thread_is_replaced_once_another_one_can_be_started(
    make_broker, clock, worker, job, caplog, monkeypatch
):
    broker = make_broker(clock=clock, middleware=[dramalite.TimeLimit(interval=10)])
    done, refused, start = [], [], threading.Thread.start

    def start_or_refuse(thread):
        if not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    dramalite.actor(job, actor_name="stuck").send()
    dramalite.actor(done.append, actor_name="next").send("next")
    worker(broker)
    job.running.wait(DEADLINE)
    monkeypatch.setattr("threading.Thread.start", start_or_refuse)
    get_stuck(job, clock, caplog)
    wait_until(lambda: done)

    assert len(refused) == 1
    assert "can't start new thread" in caplog.text


# What a job may do


@pytest.mark.parametrize(
    "error",
    [
        ValueError("v"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        RecursionError("deep"),
        MemoryError(),
        dramalite.Interrupt("i"),
        BaseException("base"),
    ],
)
def test_a_thread_survives_whatever_a_job_raises(broker, worker, error):
    done = []

    def work():
        raise error

    dramalite.actor(work, max_retries=0).send()
    after = dramalite.actor(lambda: done.append("next"), actor_name="after")
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    after.send()
    broker.join("default", timeout=PATIENCE)

    assert done == ["next"]
    assert [letter.actor_name for letter in broker.dead_letters] == ["work"]


def test_an_exception_that_cannot_be_printed_does_no_harm(broker, worker):
    done = []

    class Unprintable(Exception):
        def __str__(self):
            raise RuntimeError("no text")

        __repr__ = __str__

    def work():
        raise Unprintable()

    dramalite.actor(work, max_retries=0).send()
    dramalite.actor(lambda: done.append("next"), actor_name="after").send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == ["next"]
    assert [letter.actor_name for letter in broker.dead_letters] == ["work"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), BaseException("b")])
def test_a_base_exception_in_a_job_is_retried_like_any_failure(broker, worker, error):
    attempts = []

    def work():
        attempts.append(1)
        if len(attempts) == 1:
            raise error

    dramalite.actor(work, min_backoff=0).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert len(attempts) == 2
    assert list(broker.dead_letters) == []


def test_without_retries_a_failing_message_is_done_with(make_broker, worker):
    attempts = []

    def work():
        attempts.append(1)
        raise ValueError("no")

    broker = make_broker(middleware=[])
    dramalite.actor(work).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert attempts == [1]
    assert list(broker.dead_letters) == []


def test_a_skipped_message_is_done_with_and_nothing_follows_it(broker, worker, caplog):
    attempts, followed = [], []

    def work():
        attempts.append(1)
        raise dramalite.SkipMessage("not today")

    follow = dramalite.actor(lambda *args: followed.append(args), actor_name="follow")
    actor = dramalite.actor(
        work, on_success=follow, on_failure=follow, on_retry_exhausted=follow, min_backoff=0
    )
    (actor.message() | follow.message()).run()
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]

    assert attempts == [1]
    assert followed == []
    assert list(broker.dead_letters) == []
    assert len(warnings) == 1


def test_a_job_may_send_messages(broker, worker):
    done = []
    second = dramalite.actor(done.append, actor_name="second")
    dramalite.actor(lambda: [second.send(number) for number in range(3)] and None, actor_name="first").send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert done == [0, 1, 2]


def test_a_wrong_number_of_arguments_fails_in_the_worker(broker, worker):
    actor = dramalite.actor(lambda x: None, actor_name="work", max_retries=0)
    actor.send(1, 2)
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    (letter,) = broker.dead_letters

    assert "TypeError" in letter.options["traceback"]


def test_jobs_get_what_was_sent(broker, worker):
    received = []
    work = dramalite.actor(lambda *args, **kwargs: received.append((args, kwargs)), actor_name="w")
    work.send(1, [2, {"a": None}], "é", x=1.5, y=True)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert received == [((1, [2, {"a": None}], "é"), {"x": 1.5, "y": True})]


@pytest.mark.parametrize("style", ["sync", "async"])
def test_an_exception_is_forgotten_without_the_garbage_collector(broker, worker, style):
    errors = []

    class Once(Exception):
        def __init__(self):
            errors.append(weakref.ref(self))

    def work():
        if not errors:
            raise Once()

    async def async_work():
        await asyncio.sleep(0)
        work()

    function = work if style == "sync" else async_work
    gc.collect()
    gc.disable()
    logging.disable(logging.CRITICAL)  # pytest keeps log records, and with them their exceptions.
    try:
        dramalite.actor(function, actor_name="work", min_backoff=0).send()
        worker(broker)
        broker.join("default", timeout=PATIENCE)
        wait_until(lambda: errors[0]() is None)
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()

    assert errors[0]() is None


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="POSIX signal masks")
def test_jobs_run_with_no_signal_blocked(broker, worker):
    blocked = []
    dramalite.actor(
        lambda: blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])), actor_name="work"
    ).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert blocked == [set()]


# How failures are logged


def logged(broker, worker, caplog, error, **options):
    """Run a job that raises `error`; return (level, text with traceback) of each record of the library."""
    caplog.set_level(logging.DEBUG)

    def work():
        raise error

    dramalite.actor(work, max_retries=0, **options).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    return [
        (record.levelname, caplog.handler.format(record))
        for record in caplog.records
        if record.name.startswith("dramalite")
    ]


def test_a_failure_is_logged_as_an_error_with_its_traceback(broker, worker, caplog):
    records = logged(broker, worker, caplog, ValueError("no"))
    (text,) = [text for level, text in records if level == "ERROR"]

    assert "Traceback (most recent call last)" in text
    assert text.rstrip().endswith("ValueError: no")


def said(broker, worker, caplog, error, **options):
    """Run a job that raises `error`; return (level, text) of what the worker's thread says of it, not of its start."""
    logged(broker, worker, caplog, error, **options)
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "dramalite.worker.WorkerThread" and not record.getMessage().startswith("Received message")
    ]


def test_a_logged_failure_has_its_exception_for_handlers_that_want_it(broker, worker, caplog):
    @dramalite.actor(max_retries=0)
    def fail():
        raise ValueError("no\nFAKE line of a log")

    fail.send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    text = logging.Formatter().format(record)

    assert record.exc_info[0] is ValueError
    assert text.count("Traceback") == 1
    assert all(line.startswith("    ") for line in text.splitlines()[1:])


@pytest.mark.parametrize("error", [ValueError("no"), dramalite.SkipMessage("no"), KeyError("no"), None])
def test_arguments_are_logged_nowhere_but_while_debugging(broker, worker, caplog, error):
    caplog.set_level(logging.INFO, "dramalite")

    @dramalite.actor(max_retries=1, min_backoff=0, throws=KeyError, max_age=0 if error else 1)
    def work(text):
        raise error

    work.send_with_options(args=("S3CRET",), delay=None if error else 10)
    worker(broker)
    broker.join("default", timeout=PATIENCE, fail_fast=False)

    assert caplog.records
    assert "S3CRET" not in caplog.text


def test_an_expected_exception_is_logged_as_information(broker, worker, caplog):
    lines = said(broker, worker, caplog, ValueError("no"), throws=ValueError)

    [(level, text)] = lines

    assert level == "INFO"
    assert re.fullmatch(r"Failed to process message \S+ of work with expected exception no\.", text)


def test_an_exceeded_rate_limit_is_logged_for_debugging_only(broker, worker, caplog):
    lines = said(broker, worker, caplog, dramalite.RateLimitExceeded("limit"))

    assert lines == [("DEBUG", "Rate limit exceeded in message work(): limit.")]


def test_a_wanted_retry_is_not_logged_as_an_error(broker, worker, caplog):
    lines = said(broker, worker, caplog, dramalite.Retry("later"))

    assert lines == []


def test_a_value_that_nobody_takes_is_warned_about(stub_broker, worker, caplog):
    dramalite.actor(lambda: 42, actor_name="work").send()
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE)

    assert ["Consider adding the Results middleware" in r.message for r in caplog.records] == [True]


def test_a_result_of_none_is_not_warned_about(stub_broker, worker, caplog):
    dramalite.actor(lambda: None, actor_name="work").send()
    worker(stub_broker)
    stub_broker.join("default", timeout=PATIENCE)

    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


# A message for an actor that nobody here knows


def test_on_a_broker_in_memory_a_message_for_an_unknown_actor_is_a_dead_letter(
    clean_state, worker, caplog
):
    broker = dramalite.MemoryBroker()
    clean_state.callback(broker.close)
    broker.declare_queue("default")
    message = Message("default", "nobody", (), {}, {})
    broker.enqueue(message)
    done = []
    dramalite.actor(lambda: done.append("rest"), actor_name="rest", broker=broker).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]

    assert [letter.message_id for letter in broker.dead_letters] == [message.message_id]
    assert done == ["rest"]
    assert "'nobody'" in error.getMessage()
    assert error.exc_info[0] is dramalite.ActorNotFound


def test_in_a_file_a_message_for_an_unknown_actor_waits_and_the_rest_goes_on(
    make_file_broker, worker, caplog
):
    broker = make_file_broker()
    broker.declare_queue("default")
    broker.enqueue(Message("default", "nobody", (), {}, {}))
    done = []
    work = dramalite.actor(done.append, actor_name="work")
    for number in range(5):
        work.send(number)
    worker(broker)
    wait_until(lambda: len(done) == 5)
    with pytest.raises(QueueJoinTimeout):
        broker.join("default", timeout=200)
    said = [record for record in caplog.records if "nobody" in record.getMessage()]

    assert done == [0, 1, 2, 3, 4]
    assert list(broker.dead_letters) == []
    assert len(said) == 1


def test_in_a_file_a_message_is_left_for_a_worker_that_knows_its_actor(make_file_broker, worker):
    ignorant, knowing = make_file_broker(), make_file_broker()
    ignorant.declare_queue("default")
    done = []
    work = dramalite.actor(done.append, actor_name="work", broker=knowing)
    other = dramalite.actor(lambda: done.append("other"), actor_name="other", broker=ignorant)
    work.send(1)
    other.send()
    worker(ignorant)
    wait_until(lambda: done)
    worker(knowing)
    knowing.join("default", timeout=PATIENCE)

    assert done == ["other", 1]


def test_what_waits_in_another_queue_for_an_actor_that_is_declared_later_is_run_without_further_sends(
    make_file_broker, worker, monkeypatch
):
    looks, ran = [], threading.Event()
    sender, broker = make_file_broker(), make_file_broker()
    prune = broker._engine.prune
    monkeypatch.setattr("dramalite._IDLE_TICK_S", 0.02)
    monkeypatch.setattr(broker._engine, "prune", lambda: looks.append(prune()))  # It follows each look for what is new.
    for each in (sender, broker):
        each.declare_queue("old")
    sender.enqueue(Message("old", "late", (), {}, {}))
    worker(broker)
    wait_until(lambda: len(looks) > 5)  # Nothing is new any more.
    dramalite.actor(ran.set, actor_name="late", queue_name="new")

    assert ran.wait(DEADLINE) is True


# Fencing: a worker that gave its message back has no more say in it


def hand_over(broker, worker, job):
    """Have a first worker give back the message whose `job` it runs; return once it did."""
    first = worker(broker)
    job.running.wait(DEADLINE)
    first.stop(timeout=20)


def test_a_job_that_outlasts_the_stop_is_given_back_to_another_worker(broker, worker, job):
    runs = []

    def work():
        runs.append(1)
        if len(runs) == 1:
            job()

    dramalite.actor(work).send()
    hand_over(broker, worker, job)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert len(runs) == 2


def test_a_job_that_may_not_run_twice_and_outlasts_the_stop_is_a_dead_letter(broker, worker, job):
    runs = []

    def work():
        runs.append(1)
        job()

    dramalite.actor(work, on_crash="fail").send()
    hand_over(broker, worker, job)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert runs == [1]
    assert ["still running" in letter.reason for letter in broker.dead_letters] == [True]


def test_a_late_failure_of_a_given_back_message_changes_nothing(broker, worker, job):
    runs = []
    ended = threading.Event()

    def work():
        runs.append(1)
        if len(runs) == 1:
            try:
                job()
                raise ValueError("late")
            finally:
                ended.set()

    dramalite.actor(work, min_backoff=0).send()
    hand_over(broker, worker, job)
    worker(broker)
    broker.join("default", timeout=PATIENCE)
    job.go_on.set()
    ended.wait(DEADLINE)
    broker.join("default", timeout=PATIENCE)
    with pytest.raises(AssertionError):
        wait_until(lambda: len(runs) > 2, timeout=0.1)

    assert len(runs) == 2
    assert list(broker.dead_letters) == []


def test_a_late_result_of_a_given_back_message_is_not_stored(broker, worker, job):
    runs = []
    processed = threading.Event()

    class Watch(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            if result == "late":
                processed.set()

    def work():
        runs.append(1)
        if len(runs) == 1:
            job()
            return "late"
        return "fresh"

    broker.add_middleware(Watch())
    sent = dramalite.actor(work, store_results=True).send()
    hand_over(broker, worker, job)
    worker(broker)
    fresh = sent.get_result(block=True, timeout=PATIENCE)
    job.go_on.set()
    wait_until(lambda: job.finished)
    processed.wait(0.1)
    broker.join("default", timeout=PATIENCE)

    assert fresh == "fresh"
    assert sent.get_result() == "fresh"


# Calls from where a worker can't be waited for


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="The signals come from an interval timer.")
@pytest.mark.parametrize("act", ["work.send()", "started.resume()", "started.pause(); started.resume()"])
def test_a_signal_handler_may_ring_while_it_interrupts_a_ring_in_memory(run_python, act):
    code = f"""if True:
        import signal, time
        import dramalite

        broker = dramalite.MemoryBroker()
        ran = []
        work = dramalite.actor(lambda: ran.append(1), actor_name="work", broker=broker)
        handled = []

        def handle(*_):
            {act}
            handled.append(1)
            if len(handled) < 500:
                ring_again()  # Only now: on a slow machine handlers would interrupt each other without end.

        def ring_again():
            signal.setitimer(signal.ITIMER_REAL, 0.0005)

        with dramalite.Worker(broker, worker_threads=2) as started:
            signal.signal(signal.SIGALRM, handle)
            ring_again()
            sent = 0
            while len(handled) < 500:
                work.send()
                sent += 1
            broker.join("default", timeout=100_000)
        print(len(ran) >= sent)
        """
    assert run_python(code).stdout == "True\n"


def test_pause_in_a_job_returns_and_starts_no_more(broker, worker):
    done = []

    def pause_and_go_on(number):
        started.pause()
        done.append(number)

    work = dramalite.actor(pause_and_go_on, actor_name="work")
    started = worker(broker)
    broker.enqueue_many([work.message(number) for number in range(3)])
    wait_until(lambda: done)
    started.pause()  # Returns when what ran has ended.
    paused_with = list(done)
    started.resume()
    wait_until(lambda: len(done) == 2)

    assert paused_with == [0]


def test_join_in_a_job_is_refused(broker, worker):
    raised = []

    def join():
        try:
            started.join()
        except RuntimeError as error:
            raised.append(str(error))

    work = dramalite.actor(join, actor_name="work")
    started = worker(broker)
    work.send()
    wait_until(lambda: raised)

    assert "waits for what calls join() here" in raised[0]


def test_a_worker_that_a_threads_boot_hook_stops_is_stopped(broker):
    class Stops(dramalite.Middleware):
        def after_worker_thread_boot(self, broker, thread):
            started.stop()

    broker.add_middleware(Stops())
    started = dramalite.Worker(broker, worker_threads=2)
    started.start()
    wait_until(lambda: started.has_stopped())
    started.start()  # As after any stop.
    wait_until(lambda: started.has_stopped())

    assert started.runners == set()


def test_a_worker_that_is_started_again_while_the_last_hooks_of_a_stop_run_can_be_stopped(broker, job):
    in_hook, go_on = threading.Event(), threading.Event()

    class IsSlow(dramalite.Middleware):
        def after_worker_shutdown(self, broker, worker):
            in_hook.set()
            go_on.wait(DEADLINE)

    broker.add_middleware(IsSlow())
    started = dramalite.Worker(broker, worker_threads=1)
    started.start()
    first = in_thread(started.stop)
    assert in_hook.wait(DEADLINE)
    started.start()
    runs_again = not started.has_stopped()
    second = in_thread(started.stop)
    wait_until(started.has_stopped)
    go_on.set()
    first.join(DEADLINE)
    second.join(DEADLINE)

    assert runs_again
    assert started.runners == set()


def test_a_stop_with_less_time_hastens_one_that_is_under_way(broker, worker, job):
    is_stopping = threading.Event()

    class Tells(dramalite.Middleware):
        def before_worker_shutdown(self, broker, worker):
            is_stopping.set()

    broker.add_middleware(Tells())
    dramalite.actor(job, actor_name="work").send(1)
    started = worker(broker)
    assert job.running.wait(DEADLINE)
    patient = in_thread(started.stop)
    assert is_stopping.wait(DEADLINE)
    started.stop(timeout=1)
    patient.join(DEADLINE)
    is_over = not patient.is_alive()
    job.go_on.set()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert is_over
    wait_until(lambda: job.finished == [1, 1])  # It was handed back, and ran again.


def test_what_a_resume_lets_a_stopping_worker_claim_goes_back(broker):
    switch_interval = sys.getswitchinterval()
    begun = []
    work = dramalite.actor(begun.append, actor_name="work", on_crash="fail")
    sys.setswitchinterval(1e-6)
    try:
        for turn in range(15):
            broker.enqueue_many([work.message((turn, number)) for number in range(200)])
            started = dramalite.Worker(broker, worker_threads=3)
            started.start()
            wait_until(lambda turn=turn: begun and begun[-1][0] == turn)
            has_stopped = threading.Event()
            resuming = in_thread(lambda: [started.resume() for _ in iter(has_stopped.is_set, True)])
            started.stop()
            has_stopped.set()
            resuming.join(DEADLINE)
            with dramalite.Worker(broker):
                broker.join("default", timeout=PATIENCE)
    finally:
        sys.setswitchinterval(switch_interval)

    assert broker.dead_letters == []
    assert sorted(map(tuple, begun)) == [(turn, number) for turn in range(15) for number in range(200)]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("on_crash", ["requeue", "fail"])
def test_a_job_that_a_stop_gave_up_before_its_actor_began_begins_once_only(broker, is_async, on_crash):
    before, go_on = threading.Event(), threading.Event()
    begun = []

    class Waits(dramalite.Middleware):
        def before_process_message(self, broker, message):
            before.set()
            go_on.wait(DEADLINE)

    async def begin():
        begun.append(1)

    broker.add_middleware(Waits())
    dramalite.actor(begin if is_async else lambda: begun.append(1), actor_name="work", on_crash=on_crash).send()
    threads = threading.active_count()
    started = dramalite.Worker(broker, worker_threads=1)
    started.start()
    assert before.wait(DEADLINE)
    started.stop(timeout=0)
    go_on.set()
    wait_until(lambda: threading.active_count() <= threads + is_async)  # The event loop's thread stays.
    begun_then = list(begun)
    with dramalite.Worker(broker):
        broker.join("default", timeout=PATIENCE)

    assert begun_then == []
    assert begun == [1]


@pytest.mark.parametrize("name", ["worker_threads", "async_concurrency", "worker_timeout"])
def test_a_worker_refuses_numbers_that_make_no_sense(broker, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        dramalite.Worker(broker, **{name: 0})


@pytest.mark.parametrize("name", ["worker_threads", "async_concurrency"])
def test_a_worker_refuses_a_number_of_threads_or_coroutines_that_is_not_whole(broker, name):
    with pytest.raises(TypeError, match=f"{name} is 2.5"):
        dramalite.Worker(broker, **{name: 2.5})
