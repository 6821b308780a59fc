"""ShutdownNotifications: jobs that want to know are interrupted when their worker stops."""

import asyncio
import logging
import threading

import pytest

import dramalite
from dramalite import Retries, Shutdown, ShutdownNotifications

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000


class Announced(dramalite.Middleware):
    """Tells when the hooks before the worker's shutdown have run; to stand last in the list."""

    def __init__(self):
        self.event = threading.Event()

    def before_worker_shutdown(self, broker, worker):
        self.event.set()


class Job:
    """Works in small steps until it is let go, and writes down how it ended."""

    def __init__(self):
        self.running, self.go_on = threading.Event(), threading.Event()
        self.outcomes = []

    def __call__(self):
        try:
            self.running.set()  # From here on it may be notified.
            for _ in range(int(DEADLINE * 200)):
                if self.go_on.wait(0.005):
                    break
        except Shutdown:
            self.outcomes.append("notified")
            raise
        self.outcomes.append("finished")


@pytest.fixture
def job():
    job = Job()
    yield job
    job.go_on.set()


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def stop_while_running(worker, job):
    """Stop `worker` while it runs `job`; return when it has stopped."""
    job.running.wait(DEADLINE)
    stopping = in_thread(worker.stop)
    stopping.join(DEADLINE)
    return stopping


def options(value):
    return {} if value is None else {"notify_shutdown": value}


@pytest.mark.parametrize(
    "of_message, of_actor, of_middleware, expected",
    [
        (True, True, True, "notified"),
        (True, False, False, "notified"),
        (True, None, None, "notified"),
        (False, True, True, "finished"),
        (None, True, True, "notified"),
        (None, True, False, "notified"),
        (None, False, True, "finished"),
        (None, None, True, "notified"),
        (None, None, False, "finished"),
        (None, None, None, "finished"),
    ],
)
def test_message_then_actor_then_middleware_decide_who_is_notified(
    make_broker, worker, job, of_message, of_actor, of_middleware, expected
):
    announced = Announced()
    notifications = ShutdownNotifications(**options(of_middleware))
    broker = make_broker(middleware=[notifications, Retries(), announced])
    actor = dramalite.actor(job, actor_name="work", **options(of_actor))
    actor.send_with_options(**options(of_message))
    started = worker(broker)
    job.running.wait(DEADLINE)
    stopping = in_thread(started.stop)
    announced.event.wait(DEADLINE)
    if expected == "finished":
        job.go_on.set()
    stopping.join(DEADLINE)

    assert stopping.is_alive() is False
    assert job.outcomes == [expected]


def test_a_notified_job_may_finish_what_it_does(broker, worker):
    running, log = threading.Event(), []

    def work():
        try:
            running.set()
            never = threading.Event()
            for _ in range(int(DEADLINE * 200)):
                never.wait(0.005)
        except Shutdown:
            log.append("saved")

    dramalite.actor(work, notify_shutdown=True).send()
    started = worker(broker)
    running.wait(DEADLINE)
    started.stop()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert log == ["saved"]


@pytest.mark.parametrize("max_retries", [0, 5])
def test_an_interrupted_message_goes_back_to_its_queue_and_no_retry_is_counted(
    make_broker, worker, job, max_retries
):
    seen = []

    class Peek(dramalite.Middleware):
        def before_process_message(self, broker, message):
            seen.append((message.message_id, dict(message.options)))

    broker = make_broker(middleware=[ShutdownNotifications(), Retries(), Peek()])
    sent = dramalite.actor(
        job, actor_name="work", notify_shutdown=True, max_retries=max_retries
    ).send()
    stop_while_running(worker(broker), job)
    job.go_on.set()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert job.outcomes == ["notified", "finished"]
    assert seen == [(sent.message_id, {})] * 2
    assert list(broker.dead_letters) == []


@pytest.mark.parametrize("outcome", ["done", "failed", "skipped"])
def test_a_job_that_is_over_is_not_notified(make_broker, worker, job, caplog, outcome):
    """Nor is the job that its thread does by then, which does not want it."""
    caplog.set_level(logging.INFO)

    class Skips(dramalite.Middleware):
        def before_process_message(self, broker, message):
            if outcome == "skipped" and message.actor_name == "over":
                raise dramalite.SkipMessage("no")

    def over():
        if outcome == "failed":
            raise ValueError("no")

    announced = Announced()
    broker = make_broker(middleware=[ShutdownNotifications(), Skips(), announced])
    dramalite.actor(over, notify_shutdown=True).send()
    dramalite.actor(job, actor_name="indifferent").send()
    started = worker(broker)
    job.running.wait(DEADLINE)
    stopping = in_thread(started.stop)
    announced.event.wait(DEADLINE)
    job.go_on.set()
    stopping.join(DEADLINE)
    notified = [record for record in caplog.records if "shutdown.Shutdown" in record.name]

    assert job.outcomes == ["finished"]
    assert notified == []


def test_a_notification_is_announced_in_the_log(broker, worker, caplog):
    caplog.set_level(logging.DEBUG, logger="dramalite.middleware.shutdown")
    threads, job = [], Job()

    def work():
        threads.append(threading.get_ident())
        job()

    dramalite.actor(work, notify_shutdown=True, max_retries=0).send()
    stop_while_running(worker(broker), job)
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if "shutdown.Shutdown" in r.name]

    assert lines == [
        ("DEBUG", "Sending shutdown notification to worker threads..."),
        ("INFO", f"Worker shutdown notification. Raising exception in worker thread {threads[0]}."),
    ]


def test_only_those_who_want_it_are_notified(broker, worker):
    interested, indifferent = Job(), Job()
    dramalite.actor(interested, actor_name="interested", notify_shutdown=True).send()
    dramalite.actor(indifferent, actor_name="indifferent").send()
    started = worker(broker, worker_threads=2)
    interested.running.wait(DEADLINE)
    indifferent.running.wait(DEADLINE)
    stopping = in_thread(started.stop)
    wait_until(lambda: interested.outcomes)
    before = list(indifferent.outcomes)
    indifferent.go_on.set()
    stopping.join(DEADLINE)

    assert interested.outcomes == ["notified"]
    assert before == []
    assert indifferent.outcomes == ["finished"]


def test_no_job_begins_in_the_place_of_one_that_was_notified(make_broker, worker, job):
    begun = threading.Event()

    class Waits(dramalite.Middleware):
        def before_worker_shutdown(self, broker, worker):
            begun.wait(0.1)

    broker = make_broker(middleware=[ShutdownNotifications(), Waits()])
    dramalite.actor(job, actor_name="work", notify_shutdown=True).send()
    dramalite.actor(begun.set, actor_name="next").send()
    stop_while_running(worker(broker), job)

    assert job.outcomes == ["notified"]
    assert begun.is_set() is False


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_job_that_begins_after_the_notification_is_notified_too(make_broker, worker, job, place):
    begun, announced = threading.Event(), Announced()

    class Late(dramalite.Middleware):
        def before_process_message(self, broker, message):
            begun.set()
            announced.event.wait(DEADLINE)

    broker = make_broker(middleware=[ShutdownNotifications(), announced])
    broker.add_middleware(Late(), **{place: ShutdownNotifications})
    dramalite.actor(job, actor_name="work", notify_shutdown=True).send()
    started = worker(broker)
    begun.wait(DEADLINE)
    stopping = in_thread(started.stop)
    stopping.join(DEADLINE)
    job.go_on.set()
    stopping.join(DEADLINE)

    assert job.outcomes == ["notified"]


def test_a_late_notification_does_not_strike_a_worker_that_was_started_again(make_broker, worker):
    begun, go_on, ended = threading.Event(), threading.Event(), []

    class Late(dramalite.Middleware):
        def before_process_message(self, broker, message):
            if not begun.is_set():
                begun.set()
                go_on.wait(DEADLINE)

    broker = make_broker(middleware=[ShutdownNotifications(), Late()])

    @dramalite.actor(notify_shutdown=True)
    def work(name):
        try:
            for _ in range(50):
                threading.Event().wait(0.002)
        except dramalite.Shutdown:
            name += " notified"
        ended.append(name)

    work.send("old")
    started = worker(broker)
    begun.wait(DEADLINE)
    started.stop(timeout=0)
    started.start()
    work.send("new")
    wait_until(lambda: "new" in ended or "new notified" in ended)
    go_on.set()

    assert [name for name in ended if "notified" in name] == []


def test_an_async_job_is_notified_by_cancellation(broker, worker):
    running, log = threading.Event(), []

    @dramalite.actor(notify_shutdown=True)
    async def work():
        running.set()
        try:
            await asyncio.sleep(DEADLINE)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise

    work.send()
    started = worker(broker)
    running.wait(DEADLINE)
    started.stop()

    assert log == ["cancelled"]
