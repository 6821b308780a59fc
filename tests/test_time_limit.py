"""TimeLimit: jobs that take too long are interrupted."""

import asyncio
import contextlib
import datetime
import logging
import sqlite3
import threading
import time

import pytest

import dramalite
from dramalite import Retries, TimeLimit, TimeLimitExceeded

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000
MINUTE = 60_000

#: A limit may strike in a callback of Python's own, for a weak reference or a collection, and end there.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("unhurried"),
]


@pytest.fixture
def log():
    """What the jobs write down."""
    return []


def busy():
    """Keep a thread busy, in small steps so that an interrupt gets in between, for at most DEADLINE."""
    never = threading.Event()
    for _ in range(int(DEADLINE * 200)):
        never.wait(0.005)


class Outcomes(dramalite.Middleware):
    """Keeps the exception with which each attempt ended."""

    def __init__(self):
        self.exceptions = []

    def after_process_message(self, broker, message, *, result=None, exception=None):
        self.exceptions.append(exception)


@pytest.fixture
def outcomes():
    return Outcomes()


@pytest.fixture
def limited(make_broker, clock, outcomes):
    """A broker whose time limits are checked often, by a clock that jobs move too; no retries unless asked for."""
    return make_broker(
        clock=clock, middleware=[TimeLimit(interval=10), Retries(max_retries=0, min_backoff=0), outcomes]
    )


@pytest.fixture
def be_late(clock):
    """What a job calls to exceed its limit of a minute here, and nowhere before."""

    def be_late():
        clock.advance(MINUTE)
        busy()

    return be_late


def work_off(broker, worker):
    started = worker(broker)
    broker.join("default", timeout=PATIENCE)
    return started


def test_a_job_that_takes_too_long_is_interrupted(limited, worker, outcomes):
    dramalite.actor(busy, time_limit=30).send()
    work_off(limited, worker)

    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]
    assert len(limited.dead_letters) == 1


def test_a_worker_inside_a_program_has_time_limits_with_the_default_middleware(broker, worker):
    dramalite.actor(busy, time_limit=30, max_retries=0).send()
    work_off(broker, worker)

    assert len(broker.dead_letters) == 1
    assert "TimeLimitExceeded" in list(broker.dead_letters)[0].options["traceback"]


def test_a_job_within_its_limit_is_left_alone(limited, worker, log, outcomes):
    dramalite.actor(lambda: log.append("done"), actor_name="work", time_limit=MINUTE).send()
    work_off(limited, worker)

    assert log == ["done"]
    assert outcomes.exceptions == [None]


def test_except_exception_does_not_swallow_the_interrupt(limited, worker, be_late, log, outcomes):
    def work():
        try:
            be_late()
        except Exception:
            log.append("swallowed")

    dramalite.actor(work, time_limit=MINUTE).send()
    work_off(limited, worker)

    assert log == []
    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]


def test_a_job_may_clean_up_and_raise_again(limited, worker, be_late, log, outcomes):
    def work():
        try:
            be_late()
        except TimeLimitExceeded:
            log.append("cleaned up")
            raise

    dramalite.actor(work, time_limit=MINUTE).send()
    work_off(limited, worker)

    assert log == ["cleaned up"]
    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]


def test_a_job_may_end_well_in_spite_of_the_interrupt(limited, worker, be_late, log, outcomes):
    def work():
        try:
            be_late()
        except TimeLimitExceeded:
            log.append("saved what there was")

    dramalite.actor(work, time_limit=MINUTE).send()
    work_off(limited, worker)

    assert log == ["saved what there was"]
    assert outcomes.exceptions == [None]
    assert list(limited.dead_letters) == []


def test_a_job_is_interrupted_once_only(limited, worker, be_late, log, outcomes):
    def work():
        try:
            be_late()
        except TimeLimitExceeded:
            never = threading.Event()
            for _ in range(20):
                never.wait(0.005)
            log.append("went on undisturbed")

    dramalite.actor(work, time_limit=MINUTE).send()
    work_off(limited, worker)

    assert log == ["went on undisturbed"]
    assert outcomes.exceptions == [None]


def test_the_thread_lives_on_after_an_interrupt(limited, worker, log):
    dramalite.actor(busy, time_limit=20).send()
    after = dramalite.actor(lambda: log.append(threading.get_ident()), actor_name="after")
    after.send()
    work_off(limited, worker)
    after.send()
    limited.join("default", timeout=PATIENCE)

    assert len(log) == 2
    assert len(set(log)) == 1


def test_an_interrupted_job_is_retried(limited, worker, be_late, outcomes):
    attempts = []

    def work():
        attempts.append(1)
        if len(attempts) == 1:
            be_late()

    dramalite.actor(work, time_limit=MINUTE, max_retries=1).send()
    work_off(limited, worker)

    assert len(attempts) == 2
    assert [type(exception) for exception in outcomes.exceptions] == [
        TimeLimitExceeded,
        type(None),
    ]


def test_a_limit_for_all_can_be_set_on_the_middleware(make_broker, worker, outcomes):
    broker = make_broker(
        middleware=[TimeLimit(time_limit=30, interval=10), Retries(max_retries=0), outcomes]
    )
    dramalite.actor(busy).send()
    work_off(broker, worker)

    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]


def test_an_actors_limit_overrides_that_of_the_middleware(make_broker, worker, log, outcomes):
    broker = make_broker(middleware=[TimeLimit(time_limit=5, interval=5), outcomes])
    waiting = threading.Event()

    def work():
        for _ in range(8):
            waiting.wait(0.005)
        log.append("done")

    dramalite.actor(work, time_limit=10_000).send()
    work_off(broker, worker)

    assert log == ["done"]
    assert outcomes.exceptions == [None]


def test_a_messages_limit_overrides_that_of_its_actor(limited, worker, outcomes):
    dramalite.actor(busy, time_limit=60_000).send_with_options(time_limit=30)
    work_off(limited, worker)

    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]


def test_a_messages_limit_of_0_leaves_it_to_its_actor(limited, worker, log, outcomes):
    waiting = threading.Event()

    def work():
        for _ in range(8):
            waiting.wait(0.005)
        log.append("done")

    dramalite.actor(work, time_limit=60_000).send_with_options(time_limit=0)
    work_off(limited, worker)

    assert log == ["done"]
    assert outcomes.exceptions == [None]


def test_a_limit_may_be_a_timedelta(limited, worker, outcomes):
    dramalite.actor(busy, time_limit=datetime.timedelta(milliseconds=30)).send()
    work_off(limited, worker)

    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]


def test_an_infinite_limit_is_no_limit(make_broker, worker, log):
    broker = make_broker(middleware=[TimeLimit(time_limit=5, interval=5)])
    waiting = threading.Event()

    def work():
        for _ in range(8):
            waiting.wait(0.005)
        log.append("done")

    dramalite.actor(work, time_limit=float("inf")).send()
    work_off(broker, worker)

    assert log == ["done"]


def test_an_async_job_that_takes_too_long_is_cancelled(limited, worker, clock, log, outcomes):
    @dramalite.actor(time_limit=MINUTE)
    async def work():
        try:
            clock.advance(MINUTE)
            await asyncio.sleep(DEADLINE)
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")

    work.send()
    work_off(limited, worker)

    assert log == ["cleaned up"]
    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]


def test_limits_of_several_jobs_at_a_time_are_their_own(limited, worker, clock, log):
    begun = threading.Barrier(4)

    def quick_limit():
        try:
            begun.wait(DEADLINE)
            busy()
        except TimeLimitExceeded:
            log.append("interrupted")

    release = threading.Event()

    def long_limit():
        begun.wait(DEADLINE)
        release.wait(DEADLINE)
        log.append("undisturbed")

    dramalite.actor(long_limit, time_limit=100 * MINUTE).send()
    dramalite.actor(quick_limit, time_limit=MINUTE).send()
    dramalite.actor(quick_limit, actor_name="again", time_limit=MINUTE).send()
    worker(limited, worker_threads=3)
    begun.wait(DEADLINE)
    clock.advance(MINUTE)
    wait_until(lambda: len(log) == 2)
    release.set()
    limited.join("default", timeout=PATIENCE)

    assert log == ["interrupted", "interrupted", "undisturbed"]


class Holding(logging.Handler):
    """Holds the thread that logs first until it is let go."""

    def __init__(self):
        super().__init__()
        self.holds, self.go_on = threading.Event(), threading.Event()

    def emit(self, record):
        if not self.holds.is_set():
            self.holds.set()
            self.go_on.wait(DEADLINE)


@pytest.fixture
def watched(make_broker, clock):
    """A broker whose clock is moved by hand, with a Holding for what is logged of its time limits as `holding`."""
    limits = TimeLimit(interval=10)
    broker = make_broker(clock=clock, middleware=[limits, Retries(max_retries=0)])
    broker.holding = Holding()
    limits.logger.addHandler(broker.holding)
    yield broker
    broker.holding.go_on.set()
    limits.logger.removeHandler(broker.holding)


def test_a_limit_does_not_strike_the_next_job_of_its_thread(watched, worker, clock, log):
    over, ends, begun, may_end = (threading.Event() for _ in range(4))

    def late(name):
        log.append(name)
        try:
            busy()
        except TimeLimitExceeded:
            log.append(f"{name} interrupted")
            over.wait(DEADLINE)

    def ends_by_itself():
        log.append("edge")
        ends.wait(DEADLINE)

    def innocent():
        begun.set()
        for _ in range(int(DEADLINE * 200)):
            if may_end.wait(0.005):
                break
        log.append("innocent ended")

    late = dramalite.actor(late, time_limit=MINUTE)
    edge = dramalite.actor(ends_by_itself, actor_name="edge", time_limit=MINUTE)
    innocent = dramalite.actor(innocent, time_limit=100 * MINUTE)
    worker(watched, worker_threads=3)
    for message, name in ((late.message("first"), "first"), (edge.message(), "edge"), (late.message("last"), "last")):
        watched.enqueue(message)
        wait_until(lambda: name in log)
    clock.advance(2 * MINUTE)  # All three are late at the same look, which is held after the first.
    watched.holding.holds.wait(DEADLINE)
    ends.set()
    innocent.send()
    begun.wait(DEADLINE)  # In the only thread that is free.
    watched.holding.go_on.set()
    wait_until(lambda: "last interrupted" in log)  # The look is over.
    may_end.set()
    over.set()
    watched.join("default", timeout=PATIENCE)

    assert "innocent ended" in log


def test_a_limit_that_a_hook_kept_from_ending_does_not_strike_a_job_without_limit(make_broker, worker, clock, log):
    class Cuts(dramalite.Middleware):
        def after_process_message(self, broker, message, *, result=None, exception=None):
            if message.actor_name == "first":
                raise SystemExit("No further hook is called.")

    def unlimited():
        clock.advance(2 * MINUTE)
        waiting = threading.Event()
        for _ in range(10):
            waiting.wait(0.005)
        log.append("done")

    broker = make_broker(clock=clock, middleware=[TimeLimit(interval=10), Cuts()])
    dramalite.actor(lambda: log.append("first"), actor_name="first", time_limit=MINUTE).send()
    dramalite.actor(unlimited, time_limit=float("inf")).send()
    work_off(broker, worker)

    assert log == ["first", "done"]


def test_a_job_that_was_handed_back_at_a_stop_is_watched_no_more_when_it_has_ended(make_broker, worker):
    running, go_on = threading.Event(), threading.Event()

    def work():
        running.set()
        go_on.wait(DEADLINE)

    before = set(threading.enumerate())
    broker = make_broker(middleware=[TimeLimit(interval=10)])
    dramalite.actor(work, time_limit=MINUTE).send()
    started = worker(broker)
    running.wait(DEADLINE)
    started.stop(timeout=0)
    go_on.set()
    wait_until(lambda: set(threading.enumerate()) <= before)  # Who watches, ends when nobody is left.


def add_a_number(backend):
    backend.add("key", 1, MINUTE)
    busy()


def enter_a_mutex(backend):
    with dramalite.ConcurrentRateLimiter(backend, "mutex", limit=1).acquire():
        busy()


def have_a_limit_strike_in_a_transaction(
    make_broker, worker, monkeypatch, clock, caplog, outcomes, call=add_a_number
):
    """Have the time limit of a job strike just when SQLite has begun a transaction for it; the broker."""
    connect, jobs = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            result = super().execute(statement, *values)
            if statement.startswith("BEGIN") and threading.get_ident() in jobs:
                jobs.clear()
                clock.advance(MINUTE)
                wait_until(lambda: "Time limit exceeded" in caplog.text)
            return result

    def work():
        jobs.append(threading.get_ident())
        call(backend)

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_broker(clock=clock, middleware=[TimeLimit(interval=10), Retries(max_retries=0), outcomes])
    backend = dramalite.SQLiteRateLimiterBackend(broker)
    dramalite.actor(work, time_limit=MINUTE).send()
    worker(broker)
    wait_until(lambda: outcomes.exceptions)
    return broker


def test_a_limit_that_strikes_in_a_transaction_ends_the_job(make_broker, worker, monkeypatch, clock, caplog, outcomes):
    have_a_limit_strike_in_a_transaction(make_broker, worker, monkeypatch, clock, caplog, outcomes)

    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]


def test_a_limit_that_strikes_in_a_transaction_leaves_the_worker_at_work(
    make_broker, worker, monkeypatch, clock, caplog, outcomes, log
):
    broker = have_a_limit_strike_in_a_transaction(make_broker, worker, monkeypatch, clock, caplog, outcomes)
    after = dramalite.actor(log.append, actor_name="after")
    threading.Thread(target=after.send, args=("after",), daemon=True).start()
    wait_until(lambda: log)

    assert log == ["after"]


def test_a_limit_that_strikes_in_a_transaction_locks_nobody_out(
    make_file_broker, worker, monkeypatch, clock, caplog, outcomes
):
    broker = have_a_limit_strike_in_a_transaction(make_file_broker, worker, monkeypatch, clock, caplog, outcomes)
    with contextlib.closing(sqlite3.connect(broker.path, timeout=1, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        begun = connection.in_transaction
        connection.execute("ROLLBACK")

    assert begun is True


def test_a_limit_that_strikes_while_a_limiter_is_acquired_leaves_no_place_taken(
    make_broker, worker, monkeypatch, clock, caplog, outcomes
):
    broker = have_a_limit_strike_in_a_transaction(make_broker, worker, monkeypatch, clock, caplog, outcomes, enter_a_mutex)
    mutex = dramalite.ConcurrentRateLimiter(dramalite.SQLiteRateLimiterBackend(broker), "mutex", limit=1)
    with mutex.acquire(raise_on_failure=False) as acquired:
        pass

    assert acquired is True


@pytest.mark.parametrize("does", ["counts", "sends"])
def test_a_job_that_is_nearly_always_in_the_engine_is_interrupted_too(limited, worker, outcomes, does):
    other = dramalite.actor(print, actor_name="other", queue_name="unserved")
    backend = dramalite.SQLiteRateLimiterBackend(limited)

    def work():
        end = time.monotonic() + DEADLINE / 2
        while time.monotonic() < end:
            other.send() if does == "sends" else backend.add("key", 1, MINUTE)

    dramalite.actor(work, time_limit=30).send()
    worker(limited, queues={"default"})
    limited.join("default", timeout=PATIENCE)

    assert [type(exception) for exception in outcomes.exceptions] == [TimeLimitExceeded]


def test_limits_hold_though_the_thread_that_watches_them_could_not_be_started_at_first(
    limited, worker, outcomes, monkeypatch
):
    refused, start = [], threading.Thread.start

    def start_or_refuse(thread):
        if threading.current_thread() is not threading.main_thread() and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    def work(is_late):
        if is_late:
            busy()

    work = dramalite.actor(work, time_limit=30)
    work.send(False)
    work.send(True)
    monkeypatch.setattr("threading.Thread.start", start_or_refuse)
    work_off(limited, worker)

    assert len(refused) == 1
    assert type(outcomes.exceptions[-1]) is TimeLimitExceeded


def test_an_interrupt_is_announced_in_the_log(limited, worker, caplog):
    dramalite.actor(busy, time_limit=30).send()
    work_off(limited, worker)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    assert any("ime limit exceeded" in text for text in warnings)


def test_a_stub_broker_raises_the_interrupt_from_join(make_stub_broker, worker):
    broker = make_stub_broker(middleware=[TimeLimit(interval=10), Retries(max_retries=0)])
    dramalite.actor(busy, time_limit=30).send()
    worker(broker)

    with pytest.raises(TimeLimitExceeded):
        broker.join("default", timeout=PATIENCE)


def test_nothing_is_watched_any_more_after_a_stop_that_gave_coroutines_up(broker, worker):
    begun = []

    async def wait():
        begun.append(1)
        await asyncio.sleep(DEADLINE)

    work = dramalite.actor(wait, actor_name="wait", time_limit=500)
    broker.enqueue_many([work.message() for _ in range(20)])
    started = worker(broker)
    wait_until(lambda: len(begun) >= 20)  # Or more, where their limit was quicker: they are tried again.
    started.stop(timeout=0)

    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "dramalite-time-limit"])


@pytest.mark.parametrize(("interval", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError)])
def test_an_interval_that_makes_no_sense_is_refused(interval, error):
    with pytest.raises(error, match="interval is"):
        TimeLimit(interval=interval)
