"""Fixtures: brokers in memory and in a file, workers that are stopped, a clean global state."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from hypothesis import HealthCheck, settings  # noqa: E402

import dramalite  # noqa: E402

from helpers import DEADLINE, FakeClock  # noqa: E402

settings.register_profile(
    "quick", max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "ci", max_examples=75, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "deep", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # So it is behind a shell's `&`, and programs inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_state(tmp_path, monkeypatch):
    """Run each test in its own folder, with a broker and an encoder of its own as the global ones.

    Gives the ExitStack that closes what the test opens; it is unwound after all other fixtures.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRAMALITE_DB", raising=False)
    with contextlib.ExitStack() as closing:
        bystander = dramalite.Broker(middleware=[])
        dramalite.set_broker(bystander)
        dramalite.set_encoder(dramalite.JSONEncoder())
        yield closing
        dramalite.set_broker(bystander)
        dramalite.set_encoder(dramalite.JSONEncoder())


@pytest.fixture(params=["memory", "file"])
def make_broker(request, tmp_path, clean_state):
    """A function that makes a MemoryBroker or a SQLiteBroker and sets it as the global broker."""

    def make(**options):
        if request.param == "memory":
            broker = dramalite.MemoryBroker(**options)
        else:
            broker = dramalite.SQLiteBroker(tmp_path / "queue.db", **options)
        clean_state.callback(broker.close)
        dramalite.set_broker(broker)
        return broker

    return make


@pytest.fixture
def broker(make_broker):
    """A broker with its default middleware, in memory and in a file; it is the global broker."""
    return make_broker()


@pytest.fixture
def make_stub_broker(clean_state):
    """A function that makes a StubBroker and sets it as the global broker."""

    def make(*args, **options):
        broker = dramalite.StubBroker(*args, **options)
        clean_state.callback(broker.close)
        dramalite.set_broker(broker)
        return broker

    return make


@pytest.fixture
def stub_broker(make_stub_broker):
    """A StubBroker with Dramatiq's default middleware; it is the global broker."""
    return make_stub_broker()


@pytest.fixture
def make_file_broker(tmp_path, clean_state):
    """A function that makes SQLiteBrokers on one file (or another, by `name`), the last being the global one."""

    def make(name="queue.db", **options):
        broker = dramalite.SQLiteBroker(tmp_path / name, **options)
        clean_state.callback(broker.close)
        dramalite.set_broker(broker)
        return broker

    return make


@pytest.fixture
def worker():
    """A function that starts a Worker (of one thread unless told otherwise), stopped when the test ends."""
    started = []

    def start(broker, *, worker_threads=1, **options):
        worker = dramalite.Worker(broker, worker_threads=worker_threads, **options)
        started.append(worker)
        worker.start()
        return worker

    yield start
    for worker in reversed(started):
        worker.stop(timeout=2000)


@pytest.fixture
def unhurried(monkeypatch):
    """Who was interrupted is given up only after all the time that a test has: its thread may be held up."""
    monkeypatch.setattr("dramalite._STUCK_GRACE_S", 10 * DEADLINE)


@pytest.fixture
def clock():
    """A clock that stands still until the test moves it."""
    return FakeClock()


@pytest.fixture
def run_python(tmp_path):
    """A function that runs code in a fresh interpreter in the test's folder and returns what came of it."""

    def run(code, *, timeout=120, **environment):
        inherited = {k: v for k, v in os.environ.items() if k != "DRAMALITE_DB"}
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**inherited, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
