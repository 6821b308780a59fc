"""What is struck by strikes.py, and what must hold after each strike.

A scenario names its messages.  Each name is in at most one place, waiting or dead; nothing that
was accepted is in none before it has ended; what follows upon something (a pipeline's next step,
a callback) is there from the very moment at which that is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import dramalite

from strikes import PATIENCE_S, Fault, Journal, Strike

QUEUES = ("default", "other")


class World:
    """A process's view of a place: a broker on its file, its actors, its journal."""

    def __init__(self, place: Path):
        self.path = place / "queue.db"
        self.journal = Journal(place / "journal")
        self.strike: Any = None  # In the process that is struck.
        self.broker = dramalite.SQLiteBroker(self.path)
        dramalite.set_broker(self.broker)
        self.worker = dramalite.Worker(self.broker, worker_threads=1)
        self.actors = declare(self.journal)
        for queue in QUEUES:
            self.broker.declare_queue(queue)

    def message(self, actor: str, name: str, *args: Any, queue: str = "default") -> Any:
        """A message whose first argument is its name."""
        message = getattr(self.actors, actor).message(name, *args).copy(queue_name=queue)
        self.journal.note("message", name, message.encode().decode())
        return message

    def send(self, *messages: Any, how: Callable[[], object] | None = None, delay: int | None = None) -> None:
        """Send messages, in one go if `how` says so; note what came of it."""
        names = [message.args[0] for message in messages]
        try:
            if how is None:
                [message] = messages
                self.broker.enqueue(message, delay=delay)
            else:
                how()
        except dramalite.BrokerError as error:
            self.refuse(error)
            self.note_all("refused", names)
        else:
            self.note_all("accepted", names)

    def note_all(self, word: str, names: list[str]) -> None:
        for name in names:
            self.journal.note(word, name)

    def refuse(self, error: dramalite.BrokerError) -> None:
        """Note an error that reached the caller, which must be a clear one."""
        self.journal.note("error", " ".join(str(error).split()))
        if str(self.path) not in str(error):
            self.journal.note("harm", f"an error does not name the file: {error}")

    def patiently(self, work: Callable[[], object]) -> None:
        """Do what may be refused once, by a step that fails."""
        for _ in range(3):
            try:
                work()
                return
            except dramalite.BrokerError as error:
                self.refuse(error)

    def join(self, timeout_ms: int = PATIENCE_S * 500) -> None:
        """Wait until all queues are empty."""
        for queue in QUEUES:
            self.broker.join(queue, timeout=timeout_ms)

    def open(self) -> None:
        """Open all connections, so that what is struck afterwards is not the opening."""
        self.send(self.message("job", "first"))
        self.broker.consume("other").close()
        self.broker.dead_letters

    def result_of(self, name: str) -> Any:
        """The stored result of a message, "failure" for a stored failure, None if there is none."""
        texts = [line[2] for line in self.journal.lines() if line[:2] == ["message", name]]
        try:
            return self.broker.get_results_backend().get_result(dramalite.Message.decode(texts[0].encode()))
        except dramalite.ResultMissing:
            return None
        except dramalite.ResultFailure:
            return "failure"


def declare(journal: Journal) -> SimpleNamespace:
    """The actors; each notes when it starts and ends, under its message's name."""
    note = journal.note

    @dramalite.actor(max_retries=0)
    def job(name, load=""):
        note("start", name)
        note("end", name)

    @dramalite.actor(max_retries=0)
    def slow(name):
        note("start", name)
        if journal.noted("start").count(name) == 1:
            time.sleep(0.03)  # What it takes to be found running.
        note("end", name)

    @dramalite.actor(max_retries=0, store_results=True)
    def keeps(name):
        note("start", name)
        note("end", name)
        return f"result of {name}"

    @dramalite.actor(max_retries=3, min_backoff=0, max_backoff=0)
    def flaky(name):
        note("start", name)
        if not dramalite.CurrentMessage.get_current_message().options.get("retries"):
            raise RuntimeError("The first time fails.")
        note("end", name)

    @dramalite.actor(max_retries=3, min_backoff=5, max_backoff=5)
    def flaky_later(name):
        flaky.fn(name)

    @dramalite.actor(max_retries=0, store_results=True, on_failure="after_failure")
    def fails(name):
        note("start", name)
        note("end", name)
        raise RuntimeError("It always fails.")

    @dramalite.actor(max_retries=0)
    def after_failure(message_data, exception_data):
        job.fn(message_data["args"][0] + ".failure")

    @dramalite.actor(max_retries=0, on_success="after_success")
    def pleases(name):
        job.fn(name)

    @dramalite.actor(max_retries=0)
    def after_success(message_data, result):
        job.fn(message_data["args"][0] + ".success")

    @dramalite.actor(max_retries=2, min_backoff=0, max_backoff=0, store_results=True)
    def step(name, before=None):
        note("start", name)
        note("got", name, json.dumps(before))
        note("end", name)
        return name

    @dramalite.actor(max_retries=0, on_crash="fail", on_failure="after_failure")
    def poison(name):
        note("start", name)
        os.kill(os.getpid(), signal.SIGKILL)

    @dramalite.actor(max_retries=0, on_crash="fail")
    def never_twice(name):
        job.fn(name)

    actors = (job, never_twice, slow, keeps, flaky, flaky_later, fails, after_failure, pleases, after_success, step, poison)
    return SimpleNamespace(**{actor.actor_name: actor for actor in actors})


# What is left after a strike


class State:
    """What the file and the journal hold."""

    def __init__(self, world: World, connection: sqlite3.Connection):
        self._connection = connection
        self.is_sound = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        self.waiting = Counter(self._names("dramalite_messages"))
        self.dead = Counter(self._names("dramalite_dead"))
        self.crashes = self._rows("SELECT actor, body, crashes FROM dramalite_messages")
        self.groups = self._rows("SELECT unsuccessful, unended FROM dramalite_groups")
        self.limits = self._rows("SELECT value FROM dramalite_limits")
        lines = self.lines = world.journal.lines()
        self.known = {line[1] for line in lines if line[0] == "message"}
        self.accepted = {line[1] for line in lines if line[0] == "accepted"}
        self.refused = {line[1] for line in lines if line[0] == "refused"}
        self.starts = Counter(line[1] for line in lines if line[0] == "start")
        self.ended = {line[1] for line in lines if line[0] == "end"}
        self.first: dict[tuple[str, ...], int] = {}  # Where in the journal each thing was first noted.
        for number, line in enumerate(lines):
            self.first.setdefault(tuple(line[:2]), number)

    def has(self, name: str) -> bool:
        return name in self.waiting or name in self.dead

    def noted(self, *words: str) -> bool:
        return words in self.first

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        made = self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'dramalite_meta'").fetchall()
        return self._connection.execute(query).fetchall() if made else []

    def _names(self, table: str) -> list[str]:
        return [_name(actor, body) for actor, body in self._rows(f"SELECT actor, body FROM {table}")]


def _name(actor: str, body: bytes) -> str:
    """The name of a stored message; that of a callback tells whose it is."""
    first = json.loads(body)["args"][0]
    if isinstance(first, dict):
        return f"{first['args'][0]}.{actor.removeprefix('after_')}"
    return str(first)


Harms = Iterator[str]


def nothing(_: Any) -> Harms:
    return iter(())


@dataclass
class Scenario:
    """An operation, the messages it is about, and what is special about them."""

    act: Callable[[World], object]
    prepare: Callable[[World], object] = nothing
    warm_up: Callable[[World], object] = World.open
    is_killed_first: bool = False  # Whoever prepares it ends by SIGKILL.
    follows: dict[str, tuple[str, ...]] = field(default_factory=dict)  # Names: what they come after.
    together: tuple[str, ...] = ()  # All of them are stored, or none.
    dead: frozenset[str] = frozenset()  # These end as dead letters,
    may_die: frozenset[str] = frozenset()  # and these perhaps, but not before they have started.
    may_vanish: frozenset[str] = frozenset()  # These are dropped.
    results: dict[str, str] = field(default_factory=dict)  # Names: what is kept as their results.
    got: dict[str, Any] = field(default_factory=dict)  # Names: what they get from what is before them.
    starts: dict[str, int] = field(default_factory=dict)  # How often a message starts, if not once.
    tells_what_runs: bool = True  # So that nothing else is blamed for the death of the process.
    repeats: int = 1  # How often a message may run again where no process died.
    check: Callable[[State], Harms] = nothing
    name: str = ""

    # In processes of their own.

    def make(self, place: Path) -> None:
        """Prepare a place that all strikes begin with."""
        world = World(place)
        self.prepare(world)
        world.broker.close()

    def do(self, place: Path, fault: Fault, at: int) -> None:
        """Do what is struck, and go on."""
        world = World(place)
        strike = world.strike = Strike(fault, at, world.journal)
        self.warm_up(world)
        strike.arm()
        try:
            self.act(world)
        except dramalite.BrokerError as error:
            world.refuse(error)
        except Exception as error:
            world.journal.note("harm", f"an error that is not clear: {error!r}")
        strike.disarm()
        if not fault.is_seen:
            world.note_all("harm", [f"somebody noticed: {text}" for text in world.journal.noted("error")])
        world.send(world.message("job", "later"))
        if "later" not in world.journal.noted("accepted"):
            world.journal.note("harm", "nothing can be sent afterwards")
        world.broker.close()
        world.journal.note("steps", strike.seen)

    def finish(self, place: Path, fault: Fault) -> None:
        """Look at what is left, let a worker finish it, and look again."""
        world = World(place)
        with contextlib.closing(sqlite3.connect(world.path, timeout=PATIENCE_S)) as connection:
            state = State(world, connection)
            harms = [*self._harms_now(state, fault), *self.check(state), *self._harms_of_results(world, state)]
            with dramalite.Worker(world.broker, worker_threads=2):
                try:
                    world.join()
                except dramalite.QueueJoinTimeout as error:
                    harms.append(f"a worker could not finish it: {error}")
            state = State(world, connection)
            harms += [f"at the end {harm}" for harm in self._harms_at_the_end(state, fault)]
            harms += [f"at the end {harm}" for harm in (*self.check(state), *self._harms_of_results(world, state))]
        log = (place / "log").read_text("utf-8").splitlines()
        harms += [f"the log says: {line}" for line in log if line.startswith("CRITICAL")]
        world.note_all("harm", harms)
        world.broker.close()

    # What must hold.

    def _names(self, state: State) -> list[str]:
        return sorted(state.known | self.follows.keys())

    def _is_due(self, name: str, state: State) -> bool:
        """Whether a message must be somewhere, or have ended."""
        if name not in self.follows:
            return name in state.accepted
        return all(
            before not in state.waiting and (before in state.ended or before in state.dead)
            for before in self.follows[name]
        )

    def _is_over(self, name: str, state: State) -> bool:
        """Whether a message has done all that it was to do, or is where it was to end."""
        return name in state.dead or (name in state.ended and name not in self.dead)

    def _harms_now(self, state: State, fault: Fault) -> Harms:
        names = self._names(state)
        yield from _harms_of_any(self, state, names)
        for name in names:
            is_lost = self._is_due(name, state) and name not in state.waiting and not self._is_over(name, state)
            if is_lost and name not in self.may_vanish:
                yield f"{name} is lost"
            if name in state.refused and name in state.waiting and not fault.calls:
                yield f"{name} was refused and is stored"
        for actor, body, crashes in state.crashes:
            name = _name(actor, body)
            if self.tells_what_runs and crashes > state.starts[name]:
                yield f"{name} is blamed for {crashes} deaths and has started {state.starts[name]} times"
        there = [name in state.waiting for name in self.together]
        if any(there) and not all(there):
            yield f"of {self.together} only some are stored"

    def _harms_at_the_end(self, state: State, fault: Fault) -> Harms:
        names = self._names(state)
        yield from _harms_of_any(self, state, names)
        for name in names:
            if self._is_due(name, state) and not self._is_over(name, state) and name not in self.may_vanish:
                yield f"{name} was never done"
            if name in state.waiting:
                yield f"{name} still waits"
            most = self.starts.get(name, 1) + (1 if fault.kills else self.repeats) + self.is_killed_first
            if name not in self.dead and state.starts[name] > most:
                yield f"{name} has run {state.starts[name]} times"
        for name, value in self.got.items():
            found = [line[2] for line in state.lines if line[:2] == ["got", name]]
            if any(text != json.dumps(value) for text in found):
                yield f"{name} got {found}"
        if self.dead - state.dead.keys():
            yield f"{set(self.dead - state.dead.keys())} are no dead letters"

    def _harms_of_results(self, world: World, state: State) -> Harms:
        for name, result in self.results.items():
            found = world.result_of(name)
            if found != (None if name in state.waiting else result) and self._is_due(name, state):
                yield f"the result of {name} is {found!r}"


def _harms_of_any(scenario: Scenario, state: State, names: list[str]) -> Harms:
    if not state.is_sound:
        yield "the file is damaged"
    for name, count in (state.waiting + state.dead).items():
        if count > 1:
            yield f"{name} is there {count} times"
        if name not in names:
            yield f"{name} comes from nowhere"
        if name in state.dead and name not in scenario.dead | scenario.may_die:
            yield f"{name} is a dead letter"
        if name in state.dead and scenario.tells_what_runs and not state.starts[name]:
            yield f"{name} is a dead letter and has never started"
    for name, befores in scenario.follows.items():
        for before in befores:
            if state.has(name) and before in state.waiting:
                yield f"{name} is there before {before} is gone"
            start, end = state.first.get(("start", name)), state.first.get(("end", before))
            if start is not None and before not in state.dead and (end is None or start < end):
                yield f"{name} started before {before} ended"


# Sending


def first_send(world: World) -> None:
    world.send(world.message("job", "a"))
    world.broker.close()


def send(world: World) -> None:
    world.send(world.message("job", "a"))
    world.send(world.message("job", "b"))


def send_delayed(world: World) -> None:
    world.send(world.message("job", "a"), delay=5)
    world.send(world.message("job", "b"), delay=1)


BULK = ("a", "b", "c", "d", "e")


def send_in_bulk(world: World) -> None:
    messages = [world.message("job", name) for name in BULK]
    world.send(*messages, how=lambda: world.broker.enqueue_many(messages))


MEMBERS = ("g1", "g2", "g3")


def run_group(world: World) -> None:
    messages = [world.message("job", name) for name in MEMBERS]
    group = dramalite.group(messages, broker=world.broker)
    group.add_completion_callback(world.message("job", "done"))
    world.send(*messages, how=group.run)


def check_new_group(state: State) -> Harms:
    waiting = sum(name in state.waiting for name in MEMBERS)
    if waiting and state.groups != [(waiting, waiting)]:
        yield f"{waiting} members wait, and the group counts {state.groups}"


STEPS = ("s1", "s2", "s3")
ONE_AFTER_THE_OTHER = {"s2": ("s1",), "s3": ("s2",)}


def run_pipeline(world: World) -> None:
    messages = [world.message("step", name) for name in STEPS]
    world.send(messages[0], how=dramalite.pipeline(messages, broker=world.broker).run)


def fill_the_log(world: World) -> None:
    for number in range(4):
        world.send(world.message("job", f"big{number}", "x" * 1_000_000))


def send_over_the_log(world: World) -> None:
    """The first of these makes the log so long that it is moved."""
    world.send(world.message("job", "a", "x" * 1_000_000))
    world.send(world.message("job", "b"))


# Looking after queues


def put_into_two_queues(world: World) -> None:
    for name in ("o1", "o2"):
        world.send(world.message("job", name, queue="other"))
    world.send(world.message("job", "o3", queue="other"), delay=40)
    world.send(world.message("job", "k"))


def flush(world: World) -> None:
    world.broker.flush("other")
    world.journal.note("flushed", "other")


def check_flush(state: State) -> Harms:
    if state.noted("flushed", "other") and any(name in state.waiting for name in ("o1", "o2", "o3")):
        yield "what was flushed is still there"


def put_three(world: World) -> None:
    for name in ("c1", "c2", "c3"):
        world.send(world.message("job", name))


def consume(world: World) -> None:
    consumer = world.broker.consume("default", prefetch=3, timeout=2000)
    message = next(consumer)
    world.journal.note("end", message.args[0])
    consumer.ack(message)
    consumer.nack(next(consumer))
    consumer.requeue([next(consumer)])
    consumer.close()


def limit(world: World) -> None:
    backend = dramalite.SQLiteRateLimiterBackend(world.broker)
    limiter = dramalite.ConcurrentRateLimiter(backend, "key", limit=2)
    with limiter.acquire():
        world.journal.note("acquired", "key")
    world.journal.note("released", "key")


def check_limit(state: State) -> Harms:
    allowed = [[(0,)]] if state.noted("released", "key") else [[], [(0,)], [(1,)]]
    if state.limits not in allowed:
        yield f"the limit counts {state.limits}"


# Working


def drain(world: World) -> None:
    """Work in this thread: the steps come in the same order each time."""
    try:
        world.broker.drain()
    except RuntimeError as error:
        if " fails." not in str(error):
            raise


def put(*pairs: str) -> Callable[[World], None]:
    """What prepares messages: actors and names, "actor name"."""

    def prepare(world: World) -> None:
        for pair in pairs:
            world.send(world.message(*pair.split()))

    return prepare


def check_group(state: State) -> Harms:
    waiting = sum(name in state.waiting for name in MEMBERS)
    if state.groups != ([(waiting, waiting)] if waiting else []):
        yield f"{waiting} members wait, and the group counts {state.groups}"


def put_group_between_steps(world: World) -> None:
    members = dramalite.group([world.message("step", "m1"), world.message("step", "m2")], broker=world.broker)
    first, last = world.message("step", "s1"), world.message("step", "s3")
    world.send(first, how=dramalite.pipeline([first, members, last], broker=world.broker).run)


def die(world: World) -> None:
    """Work until messages are claimed well ahead of their turn, then die of one, with some claimed behind it."""
    names = [*(f"n{number}" for number in range(60)), "p", "a", "b", "c"]
    kinds = {"p": "poison", "a": "never_twice", "b": "never_twice", "c": "never_twice"}
    messages = [world.message(kinds.get(name, "job"), name) for name in names]
    world.send(*messages, how=lambda: world.broker.enqueue_many(messages))
    world.worker.start()
    signal.pause()


def take_over(world: World) -> None:
    """Take up what the dead worker held; this process can do so itself after a step that failed."""
    world.patiently(lambda: drain(world))
    world.strike.disarm()  # Space has returned, say.
    drain(world)
    try:
        world.join(500)
    except dramalite.QueueJoinTimeout as error:
        world.journal.note("harm", f"the struck process can't take over what a dead one held: {error}")


def put_all_sorts(world: World) -> None:
    put("job a", "keeps k", "flaky_later l", "fails f", "pleases p", "job b")(world)
    world.send(world.message("job", "later1"), delay=20)
    run_pipeline(world)
    run_group(world)


def work(world: World) -> None:
    """Work with a real worker, whose steps come in any order; it must outlast what goes wrong."""
    world.patiently(world.worker.start)
    try:
        world.patiently(lambda: world.join(500))
    except dramalite.QueueJoinTimeout:
        world.strike.disarm()  # Space has returned, say.
        world.join()
    world.patiently(world.worker.stop)


MANY = tuple(f"n{number}" for number in range(50))


def put_many(world: World) -> None:
    messages = [world.message("slow" if name == "n35" else "job", name) for name in MANY]
    world.send(*messages, how=lambda: world.broker.enqueue_many(messages))


def work_until_many_are_claimed(world: World) -> None:
    world.worker.start()
    while "n35" not in world.journal.noted("start"):
        time.sleep(0.001)


def stop(world: World) -> None:
    world.worker.stop()


SCENARIOS = {
    "first send": Scenario(first_send, warm_up=nothing),
    "send": Scenario(send),
    "delayed send": Scenario(send_delayed),
    "bulk send": Scenario(send_in_bulk, together=BULK),
    "group run": Scenario(run_group, together=MEMBERS, follows={"done": MEMBERS}, check=check_new_group),
    "pipeline run": Scenario(run_pipeline, follows=ONE_AFTER_THE_OTHER),
    "checkpoint": Scenario(send_over_the_log, warm_up=fill_the_log),
    "flush": Scenario(
        flush, put_into_two_queues, together=("o1", "o2", "o3"), may_vanish=frozenset({"o1", "o2", "o3"}), check=check_flush
    ),
    "consume": Scenario(consume, put_three, may_die=frozenset({"c2"}), tells_what_runs=False),
    "rate limit": Scenario(limit, check=check_limit),
    "work": Scenario(
        drain, put("job j", "keeps k", "flaky a", "fails f", "pleases p"),
        follows={"f.failure": ("f",), "p.success": ("p",)}, dead=frozenset({"f"}), starts={"a": 2},
        results={"k": "result of k", "f": "failure"},
    ),
    "retry": Scenario(drain, put("flaky_later a", "job b"), starts={"a": 2}),
    "pipeline": Scenario(
        drain, run_pipeline, follows=ONE_AFTER_THE_OTHER, results={name: name for name in STEPS},
        got={"s1": None, "s2": "s1", "s3": "s2"},
    ),
    "group": Scenario(drain, run_group, follows={"done": MEMBERS}, check=check_group),
    "group between steps": Scenario(
        drain, put_group_between_steps, follows={"m1": ("s1",), "m2": ("s1",), "s3": ("m1", "m2")},
        got={"m1": "s1", "m2": "s1", "s3": ["m1", "m2"]},
    ),
    "recovery": Scenario(
        take_over, die, warm_up=nothing, is_killed_first=True, follows={"p.failure": ("p",)}, dead=frozenset({"p"}),
        may_die=frozenset({"a", "b", "c"}),
    ),
    "worker": Scenario(
        work, put_all_sorts, warm_up=nothing, dead=frozenset({"f"}), starts={"l": 2}, repeats=0,
        follows={**ONE_AFTER_THE_OTHER, "done": MEMBERS, "f.failure": ("f",), "p.success": ("p",)},
        results={"k": "result of k", "f": "failure", **{name: name for name in STEPS}}, check=check_group,
    ),
    "stop": Scenario(stop, put_many, work_until_many_are_claimed),
}  # fmt: skip
for name, scenario in SCENARIOS.items():
    scenario.name = name
