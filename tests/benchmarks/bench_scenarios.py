"""What is measured of dramalite: each scenario yields its figures as they are ready."""

from __future__ import annotations

import contextlib
import logging
import random
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_actors
import dramalite
from bench_producer import LONGEST_DELAY_MS
from bench_samples import Samples
from bench_support import (
    PATIENCE_S,
    ROOT,
    BenchError,
    Figure,
    Run,
    Sizes,
    Started,
    Target,
    Unseen,
    cpu_seconds,
    descendants,
    drain_rate,
    dramalite_worker,
    need_proc,
    next_key,
    percentile,
    producer,
    progress,
    rate_between,
    ratios,
    resident_mb,
    small_progress,
    wait_until,
    wait_until_empty,
    watch,
    worker_pids,
    workplace,
)

#: What a broker calls the two durabilities, and what the output calls them.
DURABILITIES = {"full": "durable", "normal": "normal"}

#: Messages in one call of enqueue_many() when a backlog is filled.
_FILL = 10_000

#: Milliseconds from now of an eta that no run reaches.
_FAR_MS = 30 * 24 * 3600 * 1000


@contextlib.contextmanager
def opened(path: Path, durability: str) -> Iterator[tuple[Any, SimpleNamespace]]:
    """A broker on `path` and its actors."""
    broker = dramalite.SQLiteBroker(path, durability=durability)
    with contextlib.closing(broker):
        yield broker, bench_actors.declare(broker)


def timed_rate(count: int, work: Callable[[], object]) -> float:
    """How many a second, if `work` does `count` of them."""
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def fill(path: Path, count: int, kind: str = "noop") -> None:
    """Put `count` messages, no-ops unless told, into the database at `path`."""
    with opened(path, "normal") as (broker, actors):
        _enqueue_many(broker, actors, count, kind)


def _enqueue_many(
    broker: Any, actors: SimpleNamespace, count: int, kind: str = "noop", **options: Any
) -> None:
    actor = getattr(actors, kind)
    for start in range(0, count, _FILL):
        size = min(_FILL, count - start)
        broker.enqueue_many([actor.message_with_options(**options) for _ in range(size)])


# ------------------------------------------------------------------------------------------
# Sending
# ------------------------------------------------------------------------------------------


def sends(run: Run) -> Iterator[Figure]:
    """One by one from one thread, beside a bare loop of commits of the same bytes."""
    counts = {"full": run.sizes.sends_full, "normal": run.sizes.sends_normal}
    targets = {"full": (None, Target(at_least=0.8)), "normal": (Target(at_least=20_000), None)}
    for durability, label in DURABILITIES.items():
        bare, ours = [], []
        for _ in run.repeats():
            bare.append(_bare_rate(durability, counts[durability]))
            ours.append(send_rate(durability, counts[durability]))
        rate_target, ratio_target = targets[durability]
        yield Figure(f"bare sqlite3 commits of the same bytes, {label}", "/s", bare)
        yield Figure(f"send one by one, {label}", "/s", ours, rate_target)
        yield Figure(f"send one by one, {label}, over bare", "x", ratios(ours, bare), ratio_target)


def sends_from_threads(run: Run) -> Iterator[Figure]:
    """One by one from 8 threads of one process at once."""
    for durability, label in DURABILITIES.items():
        rates = [_threads_rate(durability, run.sizes.thread_sends) for _ in run.repeats()]
        yield Figure(f"send one by one from 8 threads, {label}", "/s", rates)


def sends_in_bulk(run: Run) -> Iterator[Figure]:
    """Many at once, the building of the messages included; durable, as by default."""
    target = Target(at_least=50_000)
    for name, send in (("group.run", _send_group), ("enqueue_many", _send_many)):
        rates = [_bulk_rate(send, run.sizes.bulk) for _ in run.repeats()]
        yield Figure(f"send {run.sizes.bulk:,} in bulk, {name}, durable", "/s", rates, target)


def send_rate(durability: str, count: int) -> float:
    """Sends a second, one by one from this thread, to a new database."""
    with workplace() as folder, opened(folder / "queue.db", durability) as (_, actors):
        actors.noop.send()

        def work() -> None:
            for _ in range(count):
                actors.noop.send()

        return timed_rate(count, work)


def _bare_rate(durability: str, count: int) -> float:
    """Single-row commits a second of a message's bytes, with nothing but sqlite3."""
    broker = dramalite.StubBroker()
    body = bench_actors.declare(broker).noop.message().encode()
    insert = "INSERT INTO bare (body) VALUES (?)"
    with workplace() as folder:
        connection = sqlite3.connect(folder / "bare.db", isolation_level=None)
        with contextlib.closing(connection):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {durability.upper()}")
            connection.execute("CREATE TABLE bare (id INTEGER PRIMARY KEY, body BLOB)")
            connection.execute(insert, (body,))

            def work() -> None:
                for _ in range(count):
                    connection.execute(insert, (body,))

            return timed_rate(count, work)


def _threads_rate(durability: str, count: int) -> float:
    """Sends a second of 8 threads together, `count` each."""
    with workplace() as folder, opened(folder / "queue.db", durability) as (_, actors):
        barrier = threading.Barrier(9)

        def send() -> None:
            actors.noop.send()
            barrier.wait(PATIENCE_S)
            for _ in range(count):
                actors.noop.send()

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        barrier.wait(PATIENCE_S)

        def work() -> None:
            for thread in threads:
                thread.join()

        return timed_rate(8 * count, work)


def _bulk_rate(send: Callable[[Any, SimpleNamespace, int], object], count: int) -> float:
    with workplace() as folder, opened(folder / "queue.db", "full") as (broker, actors):
        actors.noop.send()
        return timed_rate(count, lambda: send(broker, actors, count))


def _send_group(broker: Any, actors: SimpleNamespace, count: int) -> None:
    dramalite.group((actors.noop.message() for _ in range(count)), broker=broker).run()


def _send_many(broker: Any, actors: SimpleNamespace, count: int) -> None:
    broker.enqueue_many([actors.noop.message() for _ in range(count)])


# ------------------------------------------------------------------------------------------
# Draining
# ------------------------------------------------------------------------------------------


def drains(run: Run) -> Iterator[Figure]:
    """No-ops by the command line's worker, between 5 % and 95 % of a full queue done."""
    one, two = [], []
    for _ in run.repeats():
        one.append(worker_drain_rate(run.sizes.drain, processes=1))
        two.append(worker_drain_rate(run.sizes.drain, processes=2))
    target = Target(at_least=30_000)
    yield Figure("drain, 1 process of 8 threads", "/s", one, target)
    yield Figure("drain, 2 processes of 8 threads", "/s", two)
    yield Figure("drain, 2 processes over 1", "x", ratios(two, one), Target(at_least=1.0))


def result_drains(run: Run) -> Iterator[Figure]:
    """Jobs whose results are stored, by the command line's worker."""
    rates = [worker_drain_rate(run.sizes.drain, processes=1, kind="kept") for _ in run.repeats()]
    yield Figure("drain with stored results, 1 process", "/s", rates, Target(at_least=18_000))


def coroutines(run: Run) -> Iterator[Figure]:
    """Coroutines of 100 ms each in one worker process, from its start to the end of the last."""
    count = run.sizes.coroutines
    taken = [1 / _memory_rate(dramalite.MemoryBroker, count, "wait") * count for _ in run.repeats()]
    yield Figure(f"{count:,} coroutines that await 100 ms", "s", taken, Target(at_most=2.0))


def memory_drains(run: Run) -> Iterator[Figure]:
    """No-ops by a Worker of 8 threads in this process, from its start to the end of join()."""
    for kind in (dramalite.MemoryBroker, dramalite.StubBroker):
        rates = [_memory_rate(kind, run.sizes.memory_drain) for _ in run.repeats()]
        yield Figure(f"drain in process, {kind.__name__}", "/s", rates)


def production(run: Run) -> Iterator[Figure]:
    """Two processes send one by one while a worker works: from the first send to an empty queue."""
    counts = {"full": run.sizes.produced_full, "normal": run.sizes.produced_normal}
    targets = {"full": 3_500, "normal": 10_000}
    for durability, label in DURABILITIES.items():
        rates = [_production_rate(durability, counts[durability]) for _ in run.repeats()]
        target = Target(at_least=targets[durability])
        yield Figure(f"2 producer processes and 1 worker, {label}", "/s", rates, target)


def worker_drain_rate(count: int, *, processes: int, kind: str = "noop") -> float:
    """Messages a second that worker processes of 8 threads take off a full queue."""
    with workplace() as folder:
        path = folder / "queue.db"
        fill(path, count, kind)
        with progress(path, count) as watched, dramalite_worker(path, processes=processes):
            return drain_rate(watched.done, count)


def _memory_rate(make_broker: Callable[[], Any], count: int, kind: str = "noop") -> float:
    broker = make_broker()
    actors = bench_actors.declare(broker)
    _enqueue_many(broker, actors, count, kind)
    start = time.perf_counter()
    with dramalite.Worker(broker, worker_threads=8):
        broker.join(actors.noop.queue_name, timeout=int(PATIENCE_S * 1000))
        elapsed = time.perf_counter() - start
    broker.close()
    return count / elapsed


def _production_rate(durability: str, count: int) -> float:
    each = count // 2
    with workplace() as folder, contextlib.ExitStack() as stack:
        path = folder / "queue.db"
        fill(path, 100)
        worker = stack.enter_context(dramalite_worker(path))
        producers = [
            stack.enter_context(producer(path, durability, "noop", each)) for _ in range(2)
        ]
        wait_until_empty(path)
        start = time.perf_counter()
        for sender in producers:
            sender.go()
        for sender in producers:
            sender.wait()
        wait_until_empty(path)
        worker.check()
        return 2 * each / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------
# Latency and lateness
# ------------------------------------------------------------------------------------------


def latency(run: Run) -> Iterator[Figure]:
    """From the call of send() here to the first line of the actor in an idle worker process."""
    targets = {"full": 1.5, "normal": 1.0}
    for durability, label in DURABILITIES.items():
        taken = [_latencies(durability, run.sizes) for _ in run.repeats()]
        name = f"start latency across processes, {label}"
        middle = [percentile(values, 50) for values in taken]
        worst = [percentile(values, 99) for values in taken]
        yield Figure(f"{name}, p50", "ms", middle, Target(at_most=targets[durability]))
        yield Figure(f"{name}, p99", "ms", worst, Target(at_most=5.0))


def lateness(run: Run) -> Iterator[Figure]:
    """Messages delayed by 0 to 5 s, sent by another process, and undelayed ones meanwhile."""
    taken = [_lateness(run.sizes) for _ in run.repeats()]
    late = [values for values, _ in taken]
    probes = [values for _, values in taken]
    name = f"lateness of {run.sizes.late:,} delayed by 0 to 5 s"
    other = "start latency of an undelayed one meanwhile, p99"
    middle = [percentile(values, 50) for values in late]
    worst = [percentile(values, 99) for values in late]
    yield Figure(f"{name}, p50", "ms", middle, Target(at_most=2.0))
    yield Figure(f"{name}, p99", "ms", worst, Target(at_most=15.0))
    meanwhile = [percentile(values, 99) for values in probes]
    yield Figure(other, "ms", meanwhile, Target(at_most=10.0))


def urgency(run: Run) -> Iterator[Figure]:
    """From send() here to the start of an urgent message that passes a backlog, 4 threads."""
    backlogs = {"nap": ("20 ms jobs", 30.0), "noop": ("no-ops", 20.0)}
    for kind, (name, longest_ms) in backlogs.items():
        taken = [_urgencies(kind, run.sizes) for _ in run.repeats()]
        title = f"urgent start at a backlog of {name}"
        yield Figure(f"{title}, p50", "ms", [percentile(values, 50) for values in taken])
        worst = [percentile(values, 99) for values in taken]
        yield Figure(f"{title}, p99", "ms", worst, Target(at_most=longest_ms))


def _latencies(durability: str, sizes: Sizes) -> list[float]:
    """Milliseconds of sends at random gaps of 20 to 80 ms."""
    count = sizes.latency_samples
    chance = random.Random(count)
    with workplace() as folder, opened(folder / "queue.db", durability) as (_, actors):
        samples = Samples.create(folder / "samples", count + 20)
        with dramalite_worker(folder / "queue.db", samples=folder / "samples"):
            _stamp(actors, samples, 0)
            time.sleep(sizes.meet_s)
            for index in range(1, len(samples)):
                time.sleep(chance.uniform(0.02, 0.08))
                _stamp(actors, samples, index)
        return [value / 1e6 for value in samples.values(20, len(samples))]


def _stamp(actors: SimpleNamespace, samples: Samples, index: int) -> None:
    """Send one message and wait until it has run."""
    actors.stamp.send(index, time.monotonic_ns())
    wait_until(lambda: samples.get(index) != 0, f"message {index} to run", pause_s=0.005)


def _urgencies(kind: str, sizes: Sizes) -> list[float]:
    """Milliseconds of urgent sends at random gaps of 10 to 40 ms, while a backlog is worked off."""
    count = {"nap": sizes.urgent_naps, "noop": sizes.urgent_noops}[kind]
    chance = random.Random(count)
    with workplace() as folder, opened(folder / "queue.db", "full") as (broker, actors):
        path = folder / "queue.db"
        samples = Samples.create(folder / "samples", sizes.urgent)
        _enqueue_many(broker, actors, count, kind)
        sent = 0
        with (
            progress(path, count) as backlog,
            dramalite_worker(path, threads=4, samples=folder / "samples"),
        ):
            watch(backlog.done, count // 100)
            while sent < sizes.urgent and backlog.done() < count * 0.95:
                actors.stamp.send_with_options(args=(sent, time.monotonic_ns()), priority=-1)
                sent += 1
                time.sleep(chance.uniform(0.01, 0.04))
            wait_until(lambda: all(samples.values(0, sent)), "the urgent messages to run")
        return [value / 1e6 for value in samples.values(0, sent)]


def _lateness(sizes: Sizes) -> tuple[list[float], list[float]]:
    """Milliseconds: of delayed messages after their eta, and of probes every 50 ms."""
    count = sizes.late
    probes = int(LONGEST_DELAY_MS / 50)
    with workplace() as folder, opened(folder / "queue.db", "normal") as (_, actors):
        path = folder / "queue.db"
        samples = Samples.create(folder / "samples", count + probes + 1)
        with (
            dramalite_worker(path, samples=folder / "samples"),
            producer(path, "normal", "late", count) as sender,
        ):
            _stamp(actors, samples, count + probes)
            time.sleep(sizes.meet_s)
            sender.go()
            for index in range(count, count + probes):
                actors.stamp.send(index, time.monotonic_ns())
                time.sleep(0.05)
            sender.wait()
            wait_until_empty(path)
        late = [value / 1e3 for value in samples.values(0, count)]
        return late, [value / 1e6 for value in samples.values(count, count + probes)]


# ------------------------------------------------------------------------------------------
# Simulation
# ------------------------------------------------------------------------------------------


def simulation(run: Run) -> Iterator[Figure]:
    """Messages that fail 21 times each over virtual weeks, on a broker in memory."""
    count = run.sizes.simulated
    taken = [_simulated_s(count) / count * 10_000 for _ in run.repeats()]
    name, note = "10,000 messages with 20 retries each, simulated", f"by {count:,} of them"
    yield Figure(name, "s", taken, Target(at_most=30.0), note)


def _simulated_s(count: int) -> float:
    broker = dramalite.MemoryBroker()

    @dramalite.actor(broker=broker, max_retries=20)
    def fail(number: int) -> None:
        raise ValueError(number)

    with _quiet(), dramalite.simulate(broker) as sim:
        broker.enqueue_many([fail.message(number) for number in range(count)])
        start = time.perf_counter()
        sim.run_until_idle(max_steps=100 * count)
        elapsed = time.perf_counter() - start
        attempts = len(sim.events)
    broker.close()
    if attempts != 21 * count:
        raise BenchError(f"{attempts:,} attempts were simulated, and not {21 * count:,}.")
    return elapsed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is logged: what is expected to fail would fill the screen."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------------
# What it takes
# ------------------------------------------------------------------------------------------


def idle(run: Run) -> Iterator[Figure]:
    """CPU, writes and memory of a worker of 8 threads that has done some work and waits."""
    need_proc()
    with workplace() as folder:
        path = folder / "queue.db"
        with _idle_worker(path, run) as worker:
            pids = {"worker": worker_pids(worker), "supervisor": [worker.pid]}
            before = _file_states(path)
            used = {role: _cpu(members) for role, members in pids.items()}
            start = time.monotonic()
            time.sleep(run.sizes.idle_s)
            elapsed = time.monotonic() - start
            run.pace.read()
            share = {
                role: (_cpu(members) - used[role]) / elapsed * 100 for role, members in pids.items()
            }
            after = _file_states(path)
    window = f"over {run.sizes.idle_s:.0f} s"
    target = Target(at_most=0.2)
    yield Figure(f"CPU of an idle worker process {window}", "%", [share["worker"]], target)
    yield Figure(f"CPU of its supervising process {window}", "%", [share["supervisor"]])
    changed = [name for name in before if before[name] != after[name]]
    name, note = "files changed by the idle worker", ", ".join(changed)
    yield Figure(name, "files", [len(changed)], Target(at_most=0), note)


def memory(run: Run) -> Iterator[Figure]:
    """Resident memory of an idle worker of 8 threads and of the processes around it."""
    need_proc()
    taken: dict[str, list[float]] = {"worker": [], "supervisor": [], "helpers": []}
    for _ in run.repeats():
        with workplace() as folder, _idle_worker(folder / "queue.db", run) as worker:
            workers = worker_pids(worker)
            helpers = {child.pid for child in descendants(worker.pid)} - set(workers)
            taken["worker"].append(sum(map(resident_mb, workers)))
            taken["supervisor"].append(resident_mb(worker.pid))
            taken["helpers"].append(sum(map(resident_mb, helpers)))
    target = Target(at_most=28)
    yield Figure("resident memory of an idle worker process", "MB", taken["worker"], target)
    yield Figure("resident memory of its supervising process", "MB", taken["supervisor"])
    yield Figure("resident memory of helpers of multiprocessing", "MB", taken["helpers"])


def imports(run: Run) -> Iterator[Figure]:
    """`import dramalite` over a bare interpreter's start, both with -I -S, in turns."""
    prepare = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    code = {"bare": prepare, "ours": f"{prepare}; import dramalite"}
    for source in code.values():
        _interpreter_ms(source)  # Compiles what is not compiled yet.
    taken: dict[str, list[float]] = {name: [] for name in code}
    for _ in range(run.sizes.imports):
        for name, source in code.items():
            taken[name].append(_interpreter_ms(source))
        run.pace.read()
    over = statistics.median(taken["ours"]) - statistics.median(taken["bare"])
    note = f"difference of the medians of {run.sizes.imports} runs"
    yield Figure("start of a bare interpreter", "ms", taken["bare"])
    yield Figure("start of an interpreter with dramalite", "ms", taken["ours"])
    yield Figure("import dramalite", "ms", [over], Target(at_most=40), note)


@contextlib.contextmanager
def _idle_worker(path: Path, run: Run) -> Iterator[Started]:
    """A worker that has done a few jobs and come to rest."""
    fill(path, run.sizes.memory_jobs)
    with dramalite_worker(path) as worker:
        wait_until_empty(path)
        time.sleep(run.sizes.settle_s)
        worker.check()
        yield worker


def _cpu(pids: list[int]) -> float:
    return sum(map(cpu_seconds, pids))


def _file_states(path: Path) -> dict[str, tuple[int, int] | None]:
    """Size and time of change of the database and its write-ahead log."""
    states: dict[str, tuple[int, int] | None] = {}
    for suffix in ("", "-wal"):
        file = Path(f"{path}{suffix}")
        state = file.stat() if file.exists() else None
        states[f"database{suffix}"] = (state.st_size, state.st_mtime_ns) if state else None
    return states


def _interpreter_ms(source: str) -> float:
    command = [sys.executable, "-I", "-S", "-c", source]
    start = time.perf_counter()
    # Captured, since a bare wait with a timeout looks only every so often, 50 ms at last.
    subprocess.run(command, check=True, timeout=PATIENCE_S, capture_output=True)
    return (time.perf_counter() - start) * 1000


# ------------------------------------------------------------------------------------------
# Backlogs
#
# The rate is always that of the same number of messages, `window`, with the backlog behind
# them.  A backlog of 1,000 cannot hold that many, so there it is the rate of many fillings
# of 1,000, each between 5 % and 95 % done; one more line has a window with 1,000 behind it.
# ------------------------------------------------------------------------------------------


def backlogs(run: Run) -> Iterator[Figure]:
    """Drain rate and worker memory with more and more messages waiting, and delayed."""
    need_proc()
    small, small_mb = _refilled_rates(run)
    yield Figure("drain at a backlog of 1,000, filled again and again", "/s", small)
    yield Figure("worker memory at a backlog of 1,000", "MB", small_mb)
    for name, ready, delayed in _backlog_cases(run):
        rates, resident = _backlog_rates(run, ready=ready, delayed=delayed)
        yield Figure(f"drain with {name}", "/s", rates)
        yield Figure(f"worker memory with {name}", "MB", resident)
        large = max(ready, delayed) == max(run.sizes.backlogs)
        over = [statistics.median(rates) / statistics.median(small)]
        more = [max(resident) - statistics.median(small_mb)]
        rate_target = Target(at_least=0.8) if large else None
        memory_target = Target(at_most=10) if large else None
        yield Figure(f"drain with {name}, over 1,000", "x", over, rate_target)
        yield Figure(f"worker memory with {name}, more than 1,000", "MB", more, memory_target)


def _backlog_cases(run: Run) -> Iterator[tuple[str, int, int]]:
    """Name, messages ready behind the measured ones, and messages delayed beside them."""
    yield "1,000 ready behind", 1_000, 0
    for count in run.sizes.backlogs:
        yield f"{count:,} ready behind", count, 0
    largest = max(run.sizes.backlogs)
    yield f"{largest:,} delayed beside", 1_000, largest


def _refilled_rates(run: Run) -> tuple[list[float], list[float]]:
    """Rates of `refills` fillings of 1,000 together, and memory at the end of each round."""
    rates, resident = [], []
    with workplace() as folder, opened(folder / "queue.db", "normal") as (broker, actors):
        path = folder / "queue.db"
        _enqueue_many(broker, actors, 1_000)
        with dramalite_worker(path) as worker:
            wait_until_empty(path)
            for _ in run.repeats():
                seconds = 0.0
                for _ in range(run.sizes.refills):
                    seconds += _refill_seconds(path, broker, actors)
                rates.append(run.sizes.refills * 1_000 / seconds)
                resident.append(_worker_mb(worker))
    return rates, resident


def _refill_seconds(path: Path, broker: Any, actors: SimpleNamespace) -> float:
    """Seconds that a filling of 1,000 takes at the rate of its middle part; anew where nobody saw that."""
    for _ in range(10):
        messages = [actors.noop.message() for _ in range(1_000)]
        with small_progress(path, len(messages)) as done, contextlib.suppress(Unseen):
            broker.enqueue_many(messages)
            return len(messages) / drain_rate(done, len(messages), pause_s=0.001)
    raise Unseen("Ten fillings of 1,000 drained between two looks.")


def _backlog_rates(run: Run, *, ready: int, delayed: int) -> tuple[list[float], list[float]]:
    """Rates of one window after the other, and the worker's memory at the end of each."""
    rates, resident = [], []
    lead = run.sizes.window // 10
    total = lead + run.repeat * run.sizes.window + ready
    with workplace() as folder:
        path = folder / "queue.db"
        first = _fill_beside(path, delayed)
        fill(path, total)
        with progress(path, total, first=first) as queue, dramalite_worker(path) as worker:
            start = watch(queue.done, lead)
            for number in range(1, run.repeat + 1):
                end = watch(queue.done, lead + number * run.sizes.window)
                rates.append(rate_between(start, end))
                resident.append(_worker_mb(worker))
                start = end
    return rates, resident


def _fill_beside(path: Path, delayed: int) -> int:
    """Put far-off messages into the database; returns a key that lies behind them."""
    with opened(path, "normal") as (broker, actors):
        eta_ms = int(time.time() * 1000) + _FAR_MS
        _enqueue_many(broker, actors, delayed, eta=eta_ms)
        if not delayed:
            return 0
    return next_key(path)


def _worker_mb(worker: Started) -> float:
    return sum(map(resident_mb, worker_pids(worker)))
