"""The same little programs on Dramatiq and on dramalite, in memory and in a file: the same happens.

Where it does not, the row of programs.py says why, and what happens on either side is asserted.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import re
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest

import dramalite

from helpers import DEADLINE, wait_until
from programs import PROGRAMS

dramatiq = pytest.importorskip("dramatiq", reason="compares with Dramatiq, which is not installed")

for path in ("brokers.stub", "rate_limits.backends.stub", "results.backends.stub", "worker"):
    importlib.import_module(f"dramatiq.{path}")

PATIENCE = int(DEADLINE * 1000)

TIMES = {"eta", "message_timestamp", "requeue_timestamp"}
UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
NOW = re.compile(r"\b1[7-9]\d{11}\b")
MODULE = re.compile(r"^(\w+\.)+(?=\w+(:|$))")


class Plain:
    """Turns what a program recorded into plain data that two runs have in common.

    Times become "time", ids are numbered in the order of their appearance, and of a traceback
    the last line is kept, without the module.  The order of a message's options stays visible.
    """

    def __init__(self):
        self._ids = {}

    def __call__(self, value, key=None):
        if key in TIMES and isinstance(value, (int, float)) and value > 10**9:
            return "time"
        if key == "traceback" and isinstance(value, str):
            return MODULE.sub("", value.strip().rpartition("\n")[2])
        if isinstance(value, str):
            return NOW.sub("time", UUID.sub(self._number, value))
        if value is None or isinstance(value, (bool, int, float, bytes)):
            return value
        if isinstance(value, BaseException):
            return f"{type(value).__name__}: {value}"
        if isinstance(value, dict):
            return {k: self(v, k) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(self(item) for item in value)
        if isinstance(value, list):
            return [self(item) for item in value]
        if isinstance(value, set):
            return sorted(self(item) for item in value)
        if hasattr(value, "asdict"):
            fields = {name: self(item, name) for name, item in value.asdict().items()}
            return {**fields, "options": list(fields["options"].items())}
        raise TypeError(f"{value!r} can't be compared.")

    def _number(self, match):
        return self._ids.setdefault(match.group(), f"id {len(self._ids) + 1}")


class World:
    """What a program sees of the place where it runs."""

    module = None

    def __init__(self, closing):
        self.closing = closing
        self.topics = collections.defaultdict(list)
        self._changes = []
        self.use()

    # What is recorded.

    def record(self, topic, value):
        """Keep a value."""
        self.topics[topic].append(value)

    def sort(self, topic):
        """Say that the order of a topic is a matter of luck."""
        self.topics[topic].sort(key=repr)

    def forget(self, topic):
        """Leave out a topic."""
        self.topics.pop(topic, None)

    def attempt(self, function, *args, text=False, exact=False, **kwargs):
        """What a call returns; or the kind of its error, and with `text` what it says."""
        try:
            return function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001
            name = type(error).__name__
            if name == "ResultUnavailable" and not exact:  # A ResultMissing that knows why.
                name = "ResultMissing"
            return f"raises {name}: {error}" if text else f"raises {name}"

    def caught(self, function, *args, **kwargs):
        """The error of a call."""
        try:
            function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001
            return error
        raise AssertionError(f"{function} raised nothing.")

    def hide_options(self, *names):
        """Leave options out of the dead letters."""
        self._changes.append(lambda options: {k: options[k] for k in options if k not in names})

    def cut_tracebacks(self):
        """Keep the kinds of errors of the dead letters, not their texts."""

        def cut(options):
            kind, _, _text = options["traceback"].partition(":")
            return {**options, "traceback": kind}

        self._changes.append(cut)

    def outcome(self):
        """All that was recorded and what is left, as plain data."""
        plain = Plain()
        outcome = {topic: plain(self.topics[topic]) for topic in sorted(self.topics)}
        letters = []
        for letter in self.broker.dead_letters:
            options = plain(letter.options)
            for change in self._changes:
                options = change(options)
            letters.append((plain(str(letter)), options))
        if letters:
            outcome["dead letters"] = sorted(letters, key=repr)
        if self.waiting():
            outcome["left over"] = [self.waiting()]
        return outcome

    # Brokers and what goes with them.

    def use(self, middleware=None):
        """Have a new broker, with this middleware, as the global one."""
        self.broker = self._make_broker(middleware)
        self.module.set_broker(self.broker)
        return self.broker

    def use_stub_broker(self, **options):
        """Have a new StubBroker as the global broker."""
        self.broker = self.module.brokers.stub.StubBroker(**options)
        self.closing.callback(self.broker.close)
        self.module.set_broker(self.broker)
        return self.broker

    def use_time_limit(self, *others):
        """Have a new broker that looks at its time limits often, with this other middleware."""
        limit = self.module.middleware.TimeLimit(interval=5)
        self.use([limit, *others])
        self.broker.emit_after("process_boot")
        return limit

    def set_bystander(self):
        """Make another broker the global one."""
        other = self.module.brokers.stub.StubBroker(middleware=[])
        self.closing.callback(other.close)
        self.module.set_broker(other)

    def keep_results(self, **options):
        """Add Results to the broker; return its backend."""
        backend = self.result_backend()
        self.broker.add_middleware(self.module.results.Results(backend=backend, **options))
        return backend

    def add_group_callbacks(self):
        """Add GroupCallbacks to the broker."""
        self.broker.add_middleware(self.module.middleware.GroupCallbacks(self.counters()))

    def run_coroutines(self):
        """Set up what coroutines need."""
        self.broker.add_middleware(self.module.middleware.AsyncIO())

    def old(self, message, age_ms):
        """A message as if it had been made `age_ms` milliseconds ago."""
        return message._replace(message_timestamp=int(time.time() * 1000) - age_ms)

    @contextlib.contextmanager
    def no_unawaited_warnings(self):
        """Let coroutines be thrown away without a warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield

    # Work.

    @contextlib.contextmanager
    def started(self, *, threads=1, queues=None, prefetch=None):
        """Have a worker for a while."""
        self.worker = self.module.Worker(
            self.broker, worker_threads=threads, queues=queues, worker_timeout=10
        )
        self._prepare(self.worker, prefetch)
        self.worker.start()
        try:
            yield self.worker
        finally:
            self.worker.stop(timeout=PATIENCE)
            self._after_stop()

    def work(self, *, threads=1, queues=None, until=None, join=True):
        """Have a worker until nothing is left to do, or an event is set; then stop it."""
        with self.started(threads=threads, queues=queues):
            if until is not None:
                assert until.wait(DEADLINE)
            elif join:
                self.join(queues)
            else:
                wait_until(lambda: not self.waiting())

    def join(self, queues=None):
        """Wait until all queues, or these, are done."""
        names = [q for q in self.broker.get_declared_queues() if not q.endswith(".DQ")]
        names = [q for q in names if not queues or q in queues]
        for _ in range(3):  # A message of one queue may send to another.
            for name in names:
                self.broker.join(name, timeout=PATIENCE, fail_fast=False)


class DramatiqWorld(World):
    module = dramatiq

    def _make_broker(self, middleware):
        return dramatiq.brokers.stub.StubBroker(middleware=middleware)

    def use_time_limit(self, *others):
        limit = super().use_time_limit(*others)
        # Its thread never ends; let it sleep then.
        self.closing.callback(setattr, limit.manager, "interval", 24 * 3600)

    def result_backend(self, **options):
        return dramatiq.results.backends.stub.StubBackend(**options)

    def counters(self):
        return dramatiq.rate_limits.backends.stub.StubBackend()

    def waiting(self):
        return sum(queue.qsize() for queue in self.broker.queues.values())

    def wait_for_prefetch(self, count):
        wait_until(lambda: self.worker.work_queue.qsize() == count)

    def _prepare(self, worker, prefetch):
        if prefetch is not None:
            worker.queue_prefetch = prefetch

    def _after_stop(self):
        # The worker's own middleware stays behind and would start its consumers again.
        kind = dramatiq.worker._WorkerMiddleware
        self.broker.middleware = [m for m in self.broker.middleware if type(m) is not kind]


class DramaliteWorld(World):
    module = dramalite

    def waiting(self):
        return sum(queue.unfinished_tasks for queue in self.broker.queues.values())

    def wait_for_prefetch(self, count):
        pass  # A worker sees all that waits.

    def _prepare(self, worker, prefetch):
        pass

    def _after_stop(self):
        pass


class MemoryWorld(DramaliteWorld):
    def _make_broker(self, middleware):
        broker = dramalite.StubBroker(middleware)
        self.closing.callback(broker.close)
        return broker

    def result_backend(self, **options):
        backend = dramalite.results.backends.StubBackend(**options)
        self.closing.callback(backend.broker.close)
        return backend

    def counters(self):
        backend = dramalite.rate_limits.backends.StubBackend()
        self.closing.callback(backend.broker.close)
        return backend


class FileWorld(DramaliteWorld):
    def _make_broker(self, middleware):
        folder = self.closing.enter_context(tempfile.TemporaryDirectory())
        broker = dramalite.SQLiteBroker(Path(folder) / "queue.db", middleware=middleware)
        self.closing.callback(broker.close)
        return broker

    def result_backend(self, **options):
        return dramalite.results.backends.SQLiteBackend(self.broker, **options)

    def counters(self):
        return dramalite.rate_limits.backends.SQLiteBackend(self.broker)


def run(name, kind):
    """What happens when a program runs in a world of this kind."""
    with contextlib.ExitStack() as closing:
        world = kind(closing)
        try:
            PROGRAMS[name].run(kind.module, world)
        except Exception as error:
            raise RuntimeError(f"The program failed in a {kind.__name__}.") from error
        return world.outcome()


@functools.cache
def dramatiqs_outcome(name):
    """What happens on Dramatiq, as JSON text; it is run once for all comparisons."""
    encoder = dramatiq.get_encoder()
    bystander = dramatiq.brokers.stub.StubBroker(middleware=[])
    with pytest.MonkeyPatch.context() as patch:
        # A consumer that failed comes back in no time; a thread that dies does so in silence.
        patch.setattr(dramatiq.worker, "CONSUMER_RESTART_DELAY_SECS", 0.01)
        patch.setattr(threading, "excepthook", lambda _arguments: None)
        try:
            return run(name, DramatiqWorld)
        finally:
            dramatiq.set_encoder(encoder)
            dramatiq.set_broker(bystander)


def cases():
    """Each program in each place."""
    for name, program in PROGRAMS.items():
        defect = pytest.mark.xfail(strict=True, raises=AssertionError, reason=program.defect)
        marks = [defect] if program.defect else []
        for kind in (MemoryWorld, FileWorld):
            place = kind.__name__.removesuffix("World").lower()
            yield pytest.param(name, kind, place, marks=marks, id=f"{name}-{place}")


@pytest.mark.parametrize(("name", "kind", "place"), list(cases()))
def test_the_same_happens_as_on_dramatiq(name, kind, place):
    program = PROGRAMS[name]
    theirs, ours = dramatiqs_outcome(name), run(name, kind)

    if program.on_purpose:
        assert theirs == program.expected["dramatiq"]
        assert ours == program.expected[place], program.on_purpose
    else:
        assert theirs  # A program that records nothing would compare nothing.
        assert ours == theirs
