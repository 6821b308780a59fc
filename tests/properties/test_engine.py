"""The engine against a plain model, for any order of sends, failures, crashes, pauses and restarts."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import dramalite

from model import ABORT, FAIL, MAX_BACKOFF, MAX_CRASHES, MIN_BACKOFF, OK, RETRY, SKIP, Model

WORKERS = 2

actions = st.sampled_from([OK, OK, FAIL, FAIL, RETRY, SKIP, ABORT])
scripts = st.lists(st.tuples(actions, st.sampled_from([0, 1, 70, 400])), min_size=1, max_size=4)
durations = st.sampled_from([0, 1, 50, 100, 333, 1000, 5000])
workers = st.integers(0, WORKERS - 1)


class Job(NamedTuple):
    script: list[tuple[str, int]]
    priority: int
    delay: int | None
    takes_ms: int
    max_retries: int


jobs = st.builds(
    Job,
    script=scripts,
    priority=st.sampled_from([0, 0, -1, 5]),
    delay=st.none() | durations,
    takes_ms=st.sampled_from([0, 0, 30, 250]),
    max_retries=st.integers(0, 3),
)


class Expected(Exception):
    """What an actor raises on purpose."""


class Engine(RuleBasedStateMachine):
    """Rules for a broker in memory; the file's machine below adds what files can do."""

    def __init__(self):
        super().__init__()
        logging.getLogger("dramalite").setLevel(logging.CRITICAL)  # Until teardown().
        self.model = Model()
        self.folder = Path(tempfile.mkdtemp(prefix="dramalite-engine-"))
        self.seen = 0
        self.data = None
        self.broker = self.sim = None

    # Set-up

    def make_broker(self):
        return dramalite.MemoryBroker(max_crashes=MAX_CRASHES)

    @initialize(threads=st.integers(1, 2), seed=st.integers(0, 3))
    def start(self, threads, seed):
        self.threads, self.seed = threads, seed
        self.broker = self.make_broker()
        self.declare()
        self.simulate()

    def declare(self):
        @dramalite.actor(
            broker=self.broker, min_backoff=MIN_BACKOFF, max_backoff=MAX_BACKOFF, throws=Expected,
            store_results=True, result_ttl=timedelta(days=3650), time_limit=timedelta(days=1),
        )  # fmt: skip
        def act(takes_ms):
            message = dramalite.CurrentMessage.get_current_message()
            self.follow()
            entry = self.model.entries[message.message_id]
            action, ms = entry.act()
            self.model.begin(message.message_id, self.broker.clock.time_ms())
            dramalite.simulated_work(takes_ms)
            if action == FAIL:
                raise ValueError("a failure")
            if action == RETRY:
                raise dramalite.Retry(delay=ms)
            if action == SKIP:
                raise dramalite.SkipMessage("skipped")
            if action == ABORT:
                raise Expected
            return entry.number

        self.actor = act

    def simulate(self, start=None):
        self.sim = dramalite.simulate(
            self.broker, seed=self.seed, workers=WORKERS, threads=self.threads, choose=self.choose, start=start
        )
        self.sim.__enter__()
        self.events = self.sim.events
        self.seed += 100  # Another one would make the same message ids.
        self.seen = 0

    def choose(self, steps):
        return steps[0] if self.data is None else self.data.draw(st.sampled_from(steps))

    def follow(self):
        """Tell the model what has happened since it was last told."""
        while self.seen < len(self.events):
            event = self.events[self.seen]
            self.seen += 1
            self.model.end(event)

    # Rules

    @rule(jobs=st.lists(jobs, min_size=1, max_size=4))
    def send(self, jobs):
        for job in jobs:
            message = self.actor.send_with_options(
                args=(job.takes_ms,), delay=job.delay, priority=job.priority, max_retries=job.max_retries
            )
            eta, now = message.options.get("eta"), self.broker.clock.time_ms()
            self.model.send(message.message_id, now, job.priority, eta, job.script, job.max_retries)

    @rule(count=st.integers(1, 8), data=st.data())
    def step(self, count, data):
        self.data = data
        for _ in range(count):
            self.sim.step()
        self.data = None
        self.follow()

    @rule(ms=durations)
    def advance(self, ms):
        self.sim.advance(ms)
        self.follow()

    @rule(worker=workers, count=st.integers(0, 2), data=st.data())
    def crash(self, worker, count, data):
        """A worker dies; mostly one of them has begun something."""
        for _ in range(9):
            if self.model.is_busy():
                break
            self.step(1, data)
        self.step(count, data)
        self.sim.crash(worker)
        self.follow()

    @rule(worker=workers)
    def pause(self, worker):
        self.sim.pause(worker)

    @rule(worker=workers)
    def resume(self, worker):
        self.sim.resume(worker)

    @rule()
    def leave_and_come_back(self):
        """The workers stop and others start: what ran goes back without a crash."""
        self.simulate(start=self.stop_simulation())

    def stop_simulation(self):
        """End it; return the time."""
        sim, self.sim = self.sim, None
        sim.__exit__(None, None, None)
        self.follow()
        for entry in self.model.entries.values():
            if entry.state == "running":  # It was handed back.
                entry.state = "waiting"
                entry.starts -= 1
        return sim.now

    # What holds after each rule

    @invariant()
    def nothing_is_wrong(self):
        assert not self.model.problems, self.model.problems[0]

    @invariant()
    def each_message_is_in_one_place(self):
        if self.sim is None:
            return
        pending = [message.message_id for message in self.broker.pending()]
        dead = [letter.message_id for letter in self.broker.dead_letters]
        assert len(pending) == len(set(pending)) and len(dead) == len(set(dead))
        assert not set(pending) & set(dead)
        assert set(pending) == self.model.unfinished()
        assert set(dead) == self.model.dead()

    @invariant()
    def each_attempt_was_one_start(self):
        assert self.model.ran_as_often_as_it_should()

    def teardown(self):
        logging.getLogger("dramalite").setLevel(logging.NOTSET)
        if self.sim is None:  # It did not begin or end as it should.
            if self.broker is not None:
                self.broker.close()
            shutil.rmtree(self.folder)
            return
        try:
            for worker in range(WORKERS):
                self.sim.resume(worker)
            self.sim.run_until_idle()
            self.follow()
            self.nothing_is_wrong()
            self.each_message_is_in_one_place()
            self.each_attempt_was_one_start()
            assert self.model.unfinished() == set()
            self.check_results()
        finally:
            self.sim.__exit__(None, None, None)
            self.close()
            shutil.rmtree(self.folder)

    def check_results(self):
        backend = self.broker.get_results_backend()
        for entry in self.model.entries.values():
            message = dramalite.Message("default", "act", (), {}, {}, entry.message_id, 0)
            if entry.state == "dead":
                with pytest.raises(dramalite.ResultFailure):
                    backend.get_result(message)
            else:
                is_skipped = self.model.attempts[entry.message_id][-1] == "skipped"
                assert backend.get_result(message) == (None if is_skipped else entry.number)

    def close(self):
        self.broker.close()


class FileEngine(Engine):
    """The same on a file, which can also be closed and opened again."""

    def make_broker(self):
        return dramalite.SQLiteBroker(self.folder / "queue.db", max_crashes=MAX_CRASHES, durability="normal")

    @precondition(lambda self: self.sim is not None)
    @rule()
    def restart(self):
        """Another process opens the file."""
        now = self.stop_simulation()
        before = self.contents()
        self.broker.close()
        self.broker = self.make_broker()
        self.declare()
        assert self.contents() == before
        self.simulate(start=now)

    def contents(self):
        return self.broker.pending(), [letter.asdict() for letter in self.broker.dead_letters]

    def close(self):
        self.broker.close()
        with contextlib.closing(sqlite3.connect(self.folder / "queue.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


EXAMPLES = settings().max_examples
TestEngine = Engine.TestCase
TestEngine.settings = settings(stateful_step_count=30, max_examples=2 * EXAMPLES)
TestFileEngine = FileEngine.TestCase
TestFileEngine.settings = settings(stateful_step_count=30, max_examples=EXAMPLES)
