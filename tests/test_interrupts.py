"""Interrupts: exceptions raised in a thread from outside, which strike in an actor and nowhere else."""

from __future__ import annotations

import gc
import logging
import textwrap
import threading

import pytest

import dramalite
from dramalite import Interrupt, Retries, TimeLimit, TimeLimitExceeded, raise_thread_exception

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000

#: An interrupt may strike in a callback of Python's own, for a weak reference or a collection, and end there.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("unhurried"),
]


def busy(seconds=DEADLINE):
    """Keep a thread busy, in small steps so that an interrupt gets in between."""
    never = threading.Event()
    for _ in range(int(seconds * 200)):
        never.wait(0.005)


class Mine(Interrupt):
    """An interrupt of one's own."""


# raise_thread_exception


@pytest.fixture
def no_collection():
    """No garbage is collected: what strikes in a callback of the collector, such as Hypothesis's, is lost there."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "exception",
    [
        Mine,
        ValueError,
    ],
    ids=str,
)
def test_an_exception_is_raised_in_another_thread(no_collection, exception):
    started, raised = threading.Event(), []

    def run():
        try:
            started.set()
            busy()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait(DEADLINE)
    raise_thread_exception(thread.ident, exception)
    thread.join(DEADLINE)

    kind = exception if isinstance(exception, type) else type(exception)
    assert [type(error) for error in raised] == [kind]


def test_a_thread_that_is_not_there_is_logged_as_critical(caplog):
    raise_thread_exception(-1 & 0xFFFF_FFFF, Interrupt)
    records = [(record.name, record.levelno, record.getMessage()) for record in caplog.records]

    assert records == [
        ("dramalite.threading", logging.CRITICAL, "Failed to set exception (Interrupt) in thread 4294967295.")
    ]


def test_interrupts_are_no_exceptions():
    assert not issubclass(Interrupt, Exception)
    assert {kind.__mro__[1] for kind in (TimeLimitExceeded, dramalite.Shutdown)} == {Interrupt}


# Where they strike


class Slow(dramalite.Middleware):
    """A middleware whose hooks take a while, and which keeps what struck them."""

    def __init__(self, *slow):
        self.slow, self.struck, self.ended = slow, [], []

    def _run(self, hook):
        try:
            if hook in self.slow:
                busy(0.1)
            self.ended.append(hook)
        except BaseException as error:
            self.struck.append((hook, type(error)))
            raise

    def before_process_message(self, broker, message):
        self._run("before_process_message")

    def after_process_message(self, broker, message, *, result=None, exception=None):
        self._run("after_process_message")
        self.exception = exception

    def before_ack(self, broker, message):
        self._run("before_ack")

    def after_ack(self, broker, message):
        self._run("after_ack")


@pytest.mark.parametrize("hook", ["after_process_message", "before_ack", "after_ack"])
def test_no_interrupt_strikes_a_hook_after_the_actor(make_stub_broker, worker, hook):
    slow = Slow(hook)
    broker = make_stub_broker([TimeLimit(interval=5), Retries(max_retries=0), slow], fail_fast_default=False)
    work = dramalite.actor(lambda: None, actor_name="work", time_limit=30)
    work.send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert slow.struck == []
    assert "after_process_message" in slow.ended


def test_an_interrupt_does_not_strike_before_the_actor_but_in_it(make_stub_broker, worker):
    slow = Slow("before_process_message")
    broker = make_stub_broker([TimeLimit(interval=5), Retries(max_retries=0), slow], fail_fast_default=False)
    dramalite.actor(busy, time_limit=30).send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert slow.struck == []
    assert type(slow.exception) is TimeLimitExceeded


def test_no_thread_of_a_worker_is_lost_to_interrupts(make_stub_broker, worker):
    booted, left, ran = [], [], []

    class Threads(dramalite.Middleware):
        def after_worker_thread_boot(self, broker, thread):
            booted.append(thread)

        def before_worker_thread_shutdown(self, broker, thread):
            left.append(thread)

    broker = make_stub_broker(
        [TimeLimit(interval=1), Retries(max_retries=0), Threads()], fail_fast_default=False
    )
    brief = dramalite.actor(lambda: ran.append(1), actor_name="brief", time_limit=1)
    for _ in range(200):
        brief.send()
    worker(broker, worker_threads=2)
    broker.join("default", timeout=PATIENCE)
    wait_until(lambda: len(booted) >= 2)  # One may have done it all before the other begins.

    assert len(booted) == 2
    assert left == []
    assert all(thread.is_alive() for thread in booted)


# Other implementations of Python

OTHER_PYTHON = """
    import sys
    sys.implementation.name = "not supported"
    import logging, threading, warnings
    import dramalite
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
    broker = dramalite.MemoryBroker()
    dramalite.set_broker(broker)
"""


@pytest.fixture
def run_elsewhere(run_python):
    """A function that runs code on an implementation of Python that can't interrupt threads."""
    return lambda code: run_python(textwrap.dedent(OTHER_PYTHON) + textwrap.dedent(code))


def test_where_threads_cannot_be_interrupted_the_log_says_so(run_elsewhere):
    result = run_elsewhere("dramalite.raise_thread_exception(1, dramalite.Interrupt)")

    assert result.stdout == (
        "dramalite.threading CRITICAL Setting thread exceptions (Interrupt) is not supported for your current "
        "platform ('not supported').\n"
    ), result.stderr


BOOT = """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        broker.emit_after("process_boot")
    print(sorted((warning.category.__name__, str(warning.message)) for warning in caught))
"""


def test_where_threads_cannot_be_interrupted_a_worker_process_warns_of_time_limits(run_elsewhere):
    result = run_elsewhere(BOOT)
    text = "TimeLimit cannot kill threads on your current platform ('not supported')."

    assert str(("RuntimeWarning", text)) in result.stdout, result.stderr


def test_where_threads_cannot_be_interrupted_a_worker_process_warns_of_shutdown_notifications(run_elsewhere):
    result = run_elsewhere(BOOT)
    text = "ShutdownNotifications cannot kill threads on your current platform ('not supported')."

    assert str(("RuntimeWarning", text)) in result.stdout, result.stderr


def test_where_threads_cannot_be_interrupted_actors_run_past_their_limits(run_elsewhere):
    result = run_elsewhere(
        """
        @dramalite.actor(time_limit=20, notify_shutdown=True, max_retries=0)
        def work():
            threading.Event().wait(0.1)
            print("ran to its end", flush=True)

        logging.disable(logging.CRITICAL)
        work.send()
        with dramalite.Worker(broker, worker_threads=1):
            broker.join("default", timeout=100_000)
        print(len(broker.dead_letters))
        """
    )

    assert result.stdout == "ran to its end\n0\n", result.stderr


def test_a_program_can_be_traced_after_a_job_was_interrupted(run_python):
    code = """if True:
        import sys, time
        import dramalite

        broker = dramalite.MemoryBroker()

        @dramalite.actor(broker=broker, max_retries=0, time_limit=50)
        def work():
            while True:
                time.sleep(0.01)

        with dramalite.Worker(broker, worker_threads=1):
            work.send()
            broker.join("default", timeout=100_000, fail_fast=False)
        called = []

        def call():
            called.append(1)

        sys.settrace(lambda *_: None)
        call()
        sys.settrace(None)
        print(len(broker.dead_letters), len(called))
        """

    assert run_python(code).stdout == "1 1\n"
