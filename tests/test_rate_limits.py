"""Rate limits: counters with a time to live, the three limiters and the barrier, alone and in actors."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import dramalite
from dramalite import (
    Barrier,
    BucketRateLimiter,
    ConcurrentRateLimiter,
    RateLimitExceeded,
    RateLimiter,
    RateLimiterBackend,
    SQLiteRateLimiterBackend,
    StubRateLimiterBackend,
    WindowRateLimiter,
)

from helpers import DEADLINE, wait_until

PATIENCE = DEADLINE * 1000
MINUTE = 60_000


@pytest.fixture
def backend(make_broker, clock):
    """Counters in memory and in a file, whose time the test moves."""
    return SQLiteRateLimiterBackend(make_broker(clock=clock))


@pytest.fixture
def run_processes(tmp_path):
    """A function that runs copies of a script at the same time, with a backend on one file, to their ends."""
    started = []

    def run(script, *, copies):
        path = tmp_path / "script.py"
        path.write_text(PRELUDE + textwrap.dedent(script), "utf-8")
        for _ in range(copies):
            command = [sys.executable, str(path)]
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
        return [process.communicate(timeout=120)[0].split() for process in started]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


PRELUDE = f"""\
import sys
sys.path.insert(0, {str(dramalite.__file__).rpartition("/")[0]!r})
import dramalite
broker = dramalite.SQLiteBroker("limits.db", durability="normal")
backend = dramalite.SQLiteRateLimiterBackend(broker)
"""


def acquired(limiter):
    """Whether the limiter has a place now; it is given back at once where the limiter does that."""
    with limiter.acquire(raise_on_failure=False) as is_acquired:
        return is_acquired


def lose_a_place(limiter, closing):
    """Take a place and never give it back, until the test has ended."""
    lost = limiter.acquire()
    lost.__enter__()
    closing.callback(lost.__exit__, None, None, None)


def in_threads(count, call):
    """What `call()` returned in each of so many threads that ran at the same time."""
    results, start = [], threading.Barrier(count)

    def run():
        start.wait(DEADLINE)
        results.append(call())

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    return results


# The backend


def test_a_number_is_added_once_until_its_time_is_over(backend, clock):
    first, second = backend.add("key", 1, 1000), backend.add("key", 1, 1000)
    clock.advance(999)
    third = backend.add("key", 1, 1000)
    clock.advance(1)

    assert (first, second, third) == (True, False, False)
    assert backend.add("key", 1, 1000) is True


def test_an_increment_beyond_the_maximum_changes_nothing(backend):
    steps = [backend.incr("key", amount, 5, MINUTE) for amount in (2, 4, 3, 1)]

    assert steps == [True, False, True, False]


def test_a_decrement_below_the_minimum_changes_nothing(backend):
    backend.add("key", 5, MINUTE)
    steps = [backend.decr("key", amount, 1, MINUTE) for amount in (2, 3, 2, 1)]

    assert steps == [True, False, True, False]


def test_what_is_not_there_counts_as_zero(backend):
    assert backend.incr("up", 3, 2, MINUTE) is False
    assert backend.incr("up", 2, 2, MINUTE) is True
    assert backend.decr("down", 1, 0, MINUTE) is False
    assert backend.decr("down", 1, -1, MINUTE) is True


def test_numbers_may_fall_below_zero_where_the_minimum_does(backend):
    steps = [backend.decr("key", 2, -5, MINUTE) for _ in range(3)]

    assert steps == [True, True, False]
    assert backend.incr("key", 5, 1, MINUTE) is True


def test_a_change_gives_a_number_its_whole_time_again(backend, clock):
    backend.incr("key", 1, 2, 1000)
    clock.advance(900)
    backend.incr("key", 1, 2, 1000)
    clock.advance(900)
    before = backend.incr("key", 1, 2, 1000)
    clock.advance(100)

    assert before is False
    assert backend.incr("key", 2, 2, 1000) is True


def test_a_refused_change_does_not_prolong_a_number(backend, clock):
    backend.incr("key", 2, 2, 1000)
    clock.advance(900)
    backend.incr("key", 1, 2, 1000)
    clock.advance(100)

    assert backend.incr("key", 2, 2, 1000) is True


@pytest.mark.parametrize(("value", "ttl"), [(1 << 63, MINUTE), (-(1 << 63) - 1, MINUTE), (1, 1 << 63)])
def test_a_number_or_time_that_takes_more_than_64_bits_is_refused(backend, value, ttl):
    with pytest.raises(ValueError, match="64 bits"):
        backend.add("key", value, ttl)

    assert backend.add("key", 1, MINUTE) is True


def test_keys_are_counted_apart(backend):
    backend.incr("one", 1, 1, MINUTE)

    assert backend.incr("other", 1, 1, MINUTE) is True


def test_a_sum_over_keys_bounds_an_increment(backend):
    backend.incr("a", 2, 10, MINUTE)
    backend.incr("b", 3, 10, MINUTE)
    steps = [backend.incr_and_sum("a", lambda: ["a", "b"], amount, 7, MINUTE) for amount in (3, 2, 1)]

    assert steps == [False, True, False]
    assert backend.decr("a", 4, 0, MINUTE) is True


def test_the_keys_of_a_sum_are_asked_for_at_each_call(backend):
    asked = []

    def keys():
        asked.append(1)
        return ["a", "b"]

    backend.incr_and_sum("a", keys, 1, 5, MINUTE)
    backend.incr_and_sum("b", keys, 1, 5, MINUTE)

    assert len(asked) == 2


def test_a_sum_leaves_out_what_has_expired(backend, clock):
    backend.incr("a", 5, 5, 1000)
    clock.advance(1000)

    assert backend.incr_and_sum("b", lambda: ["a", "b"], 5, 5, 1000) is True


def test_an_increment_is_atomic_among_threads(broker):
    backend = SQLiteRateLimiterBackend(broker)
    results = in_threads(8, lambda: [backend.incr("key", 1, 60, MINUTE) for _ in range(10)])

    assert sum(sum(result) for result in results) == 60


def test_a_sum_is_atomic_among_threads(broker):
    backend = SQLiteRateLimiterBackend(broker)
    keys = [f"key-{number}" for number in range(4)]

    def take():
        return [backend.incr_and_sum(key, lambda: keys, 1, 30, MINUTE) for key in keys * 3]

    assert sum(sum(result) for result in in_threads(6, take)) == 30


def test_counters_are_atomic_among_processes(run_processes):
    counts = run_processes(
        """
        start = dramalite.Barrier(backend, "start")
        start.create(2)
        assert start.wait(timeout=100_000)
        keys = ["a", "b", "c"]
        print(sum(backend.incr("key", 1, 150, 60_000) for _ in range(100)))
        print(sum(backend.incr_and_sum(k, lambda: keys, 1, 100, 60_000) for k in keys * 25))
        """,
        copies=2,
    )

    assert sum(int(count) for count, _sum in counts) == 150
    assert sum(int(sum_) for _count, sum_ in counts) == 100


def test_a_file_shares_its_counters_among_brokers(make_file_broker):
    one, other = (SQLiteRateLimiterBackend(make_file_broker()) for _ in range(2))
    one.incr("key", 1, 1, MINUTE)

    assert other.incr("key", 1, 1, MINUTE) is False


def test_counters_are_still_there_when_the_file_is_opened_again(make_file_broker):
    first = make_file_broker()
    SQLiteRateLimiterBackend(first).add("key", 1, MINUTE)
    first.close()

    assert SQLiteRateLimiterBackend(make_file_broker()).add("key", 1, MINUTE) is False


def test_a_backend_without_a_broker_takes_the_default_one(broker):
    SQLiteRateLimiterBackend().add("key", 1, MINUTE)

    assert SQLiteRateLimiterBackend().broker is broker
    assert SQLiteRateLimiterBackend(broker).add("key", 1, MINUTE) is False


def test_backends_for_tests_share_nothing(clean_state):
    one, other = StubRateLimiterBackend(), StubRateLimiterBackend()
    for backend in (one, other):
        clean_state.callback(backend.broker.close)

    assert [backend.add("key", 1, MINUTE) for backend in (one, other)] == [True, True]
    assert one.add("key", 1, MINUTE) is False


def test_expired_counters_do_not_stay_in_the_file(make_file_broker, clock, tmp_path):
    import sqlite3

    backend = SQLiteRateLimiterBackend(make_file_broker(clock=clock))
    for number in range(20):
        backend.add(f"key-{number}", 1, 1000)
    clock.advance(1000)
    for _ in range(5):  # Each change drops some.
        backend.add("last", 1, 1000)
    connection = sqlite3.connect(tmp_path / "queue.db")
    kept = connection.execute("SELECT key FROM dramalite_limits").fetchall()
    connection.close()

    assert kept == [("last",)]


# Notifications


def test_waiting_ends_without_a_notification_when_the_time_is_over(broker):
    before = time.monotonic()
    came = SQLiteRateLimiterBackend(broker).wait("key", 50)

    assert came is False
    assert 0.045 <= time.monotonic() - before < DEADLINE


@pytest.mark.parametrize("timeout", [PATIENCE, None])
def test_a_notification_wakes_all_that_wait(broker, timeout):
    backend = SQLiteRateLimiterBackend(broker)
    came = []
    waiting = [
        threading.Thread(target=lambda: came.append(backend.wait("key", timeout)), daemon=True) for _ in range(3)
    ]
    for thread in waiting:
        thread.start()
    backend.wait_notify("key", MINUTE)
    for thread in waiting:
        thread.join(DEADLINE)

    assert came == [True] * 3


def test_a_notification_lasts_for_those_that_come_late(backend, clock):
    backend.wait_notify("key", 1000)
    early = backend.wait("key", 0)
    clock.advance(1000)

    assert early is True
    assert backend.wait("key", 0) is False


# Concurrent


def test_a_mutex_lets_one_in_at_a_time(backend):
    mutex = ConcurrentRateLimiter(backend, "key")
    with mutex.acquire() as is_acquired:
        meanwhile = acquired(mutex)

    assert (is_acquired, meanwhile) == (True, False)
    assert acquired(mutex) is True


def test_who_is_refused_is_told_the_key(backend):
    mutex = ConcurrentRateLimiter(backend, "the-key")
    with mutex.acquire():
        with pytest.raises(RateLimitExceeded, match="the-key"):
            with mutex.acquire():
                raise AssertionError("unreachable")


def test_who_is_refused_gives_nothing_back(backend):
    mutex = ConcurrentRateLimiter(backend, "key")
    with mutex.acquire():
        refused = [acquired(mutex) for _ in range(3)]

    assert refused == [False] * 3


def test_a_place_is_given_back_when_the_block_fails(backend):
    mutex = ConcurrentRateLimiter(backend, "key")
    with pytest.raises(ValueError):
        with mutex.acquire():
            raise ValueError("no")

    assert acquired(mutex) is True


def test_a_limiter_is_not_reentrant(backend):
    mutex = ConcurrentRateLimiter(backend, "key")
    with mutex.acquire():
        assert acquired(mutex) is False


@pytest.mark.parametrize(("limit", "threads"), [(1, 8), (4, 16)])
def test_as_many_threads_as_the_limit_get_in_at_once(broker, limit, threads):
    limiter = ConcurrentRateLimiter(SQLiteRateLimiterBackend(broker), "key", limit=limit)
    all_have_tried = threading.Barrier(threads)

    def enter():
        with limiter.acquire(raise_on_failure=False) as is_acquired:
            all_have_tried.wait(DEADLINE)
            return is_acquired

    assert sum(in_threads(threads, enter)) == limit
    assert acquired(limiter) is True


def test_processes_exclude_each_other(run_processes):
    entered = run_processes(
        """
        limiter = dramalite.ConcurrentRateLimiter(backend, "key", limit=2)
        start, tried = (dramalite.Barrier(backend, key) for key in ("start", "tried"))
        start.create(3)
        tried.create(3)
        assert start.wait(timeout=100_000)
        with limiter.acquire(raise_on_failure=False) as is_acquired:
            assert tried.wait(timeout=100_000)
            print(int(is_acquired))
        """,
        copies=3,
    )

    assert sorted(entered) == [["0"], ["1"], ["1"]]


def test_a_place_that_nobody_gave_back_is_free_after_its_time(backend, clock, clean_state):
    mutex = ConcurrentRateLimiter(backend, "key", ttl=1000)
    lose_a_place(mutex, clean_state)
    clock.advance(999)
    before = acquired(mutex)
    clock.advance(1)

    assert before is False
    assert acquired(mutex) is True


def test_a_place_that_nobody_gave_back_is_free_after_its_time_though_others_come_and_go(
    backend, clock, clean_state
):
    limiter = ConcurrentRateLimiter(backend, "key", limit=2, ttl=1000)
    lose_a_place(limiter, clean_state)
    for _ in range(4):
        clock.advance(500)
        assert acquired(limiter) is True

    with limiter.acquire():
        assert acquired(limiter) is True


def test_who_outstays_its_time_gives_back_nobody_elses_place(backend, clock):
    mutex = ConcurrentRateLimiter(backend, "key", ttl=1000)
    late = mutex.acquire()
    late.__enter__()
    clock.advance(1000)
    with mutex.acquire():
        late.__exit__(None, None, None)

        assert acquired(mutex) is False


# Bucket


def test_a_bucket_holds_its_limit_and_the_next_one_again(backend, clock):
    limiter = BucketRateLimiter(backend, "key", limit=2, bucket=1000)
    first = [acquired(limiter) for _ in range(3)]
    clock.advance(1000)
    second = [acquired(limiter) for _ in range(3)]

    assert first == second == [True, True, False]


def test_buckets_begin_at_multiples_of_their_length(backend, clock):
    limiter = BucketRateLimiter(backend, "key", bucket=1000)
    clock.advance(990)
    at_the_end = [acquired(limiter) for _ in range(2)]
    clock.advance(10)
    at_the_start = [acquired(limiter) for _ in range(2)]
    clock.advance(990)

    assert (at_the_end, at_the_start) == ([True, False], [True, False])
    assert acquired(limiter) is False


def test_a_bucket_is_counted_under_the_time_of_its_start(backend, clock):
    acquired(BucketRateLimiter(backend, "key", bucket=1000))

    assert backend.add(f"key@{clock.time_ms() // 1000 * 1000}", 1, 1000) is False


def test_a_bucket_gets_nothing_back(backend):
    limiter = BucketRateLimiter(backend, "key", bucket=MINUTE)
    with limiter.acquire():
        pass

    with pytest.raises(RateLimitExceeded):
        with limiter.acquire():
            pass


# Window


def test_a_window_holds_its_limit_over_a_long_time(backend, clock):
    limiter = WindowRateLimiter(backend, "key", limit=2, window=5)
    calls = 0
    for _ in range(200):
        calls += acquired(limiter)
        clock.advance(100)

    assert 7 <= calls <= 8


def test_a_window_moves_with_the_time(backend, clock):
    limiter = WindowRateLimiter(backend, "key", limit=1, window=2)
    acquired(limiter)
    clock.advance(1900)
    within = acquired(limiter)
    clock.advance(200)

    assert within is False
    assert acquired(limiter) is True


def test_a_window_has_no_border_where_twice_as_many_get_in(backend, clock):
    limiter = WindowRateLimiter(backend, "key", limit=2, window=1)
    clock.advance(900)
    at_the_end = [acquired(limiter) for _ in range(2)]
    clock.advance(100)

    assert at_the_end == [True, True]
    assert acquired(limiter) is False


def test_a_window_gets_nothing_back(backend):
    limiter = WindowRateLimiter(backend, "key", window=60)
    with limiter.acquire():
        pass

    assert acquired(limiter) is False


# All limiters


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ConcurrentRateLimiter, {"limit": 0}),
        (BucketRateLimiter, {"limit": 0}),
        (WindowRateLimiter, {"limit": -1}),
        (WindowRateLimiter, {"window": 0}),
    ],
)
def test_a_limit_below_one_is_refused(kind, options):
    with pytest.raises(AssertionError, match=next(iter(options))):
        kind(StubRateLimiterBackend(), "key", **options)


def test_a_limit_below_one_is_refused_by_an_optimising_interpreter_too(run_python):
    result = run_python(
        """if True:
        import dramalite
        try:
            dramalite.ConcurrentRateLimiter(dramalite.StubRateLimiterBackend(), "key", limit=0)
        except AssertionError as error:
            print("refused")
        """,
        PYTHONOPTIMIZE="1",
    )

    assert result.stdout == "refused\n", result.stderr


def test_limiters_of_one_key_share_its_places(backend):
    with ConcurrentRateLimiter(backend, "key").acquire():
        assert acquired(ConcurrentRateLimiter(backend, "key")) is False


def test_a_limiter_of_ones_own_gives_back_as_in_dramatiq(backend):
    given_back = []

    class Generous(RateLimiter):
        def _acquire(self):
            return True

        def _release(self):
            given_back.append(self.key)

    with pytest.raises(ValueError), Generous(backend, "key").acquire() as is_acquired:
        assert is_acquired and not given_back
        raise ValueError

    assert given_back == ["key"]


def test_a_limiter_of_ones_own_needs_to_take_only(backend):
    taken = []

    class Once(RateLimiter):
        def _acquire(self):
            taken.append(self.key)
            return len(taken) == 1

    limiter = Once(backend, "key")

    assert [acquired(limiter) for _ in range(2)] == [True, False]
    assert taken == ["key", "key"]


class OwnBackend(RateLimiterBackend):
    """Counters in a dict, without times; as those of Memcached, only add() makes one."""

    def __init__(self):
        self.numbers = {}

    def add(self, key, value, ttl):
        return key not in self.numbers and self._set(key, value, lambda _value: True)

    def incr(self, key, amount, maximum, ttl):
        return key in self.numbers and self._set(key, self.numbers[key] + amount, lambda value: value <= maximum)

    def decr(self, key, amount, minimum, ttl):
        return self._set(key, self.numbers[key] - amount, lambda value: value >= minimum)

    def incr_and_sum(self, key, keys, amount, maximum, ttl):
        total = sum(self.numbers.get(key, 0) for key in keys())
        if total + amount > maximum:
            return False
        return self.add(key, amount, ttl) or self.incr(key, amount, maximum, ttl)

    def wait(self, key, timeout):
        return key in self.numbers

    def wait_notify(self, key, ttl):
        self.numbers[key] = 1

    def _set(self, key, value, is_good):
        if is_good(value):
            self.numbers[key] = value
        return is_good(value)


Duck = type("Duck", (), {name: value for name, value in vars(OwnBackend).items() if name != "__dict__"})


@pytest.mark.parametrize(
    "limiter",
    [
        ConcurrentRateLimiter(OwnBackend(), "key"),
        BucketRateLimiter(OwnBackend(), "key", bucket=100 * 365 * 86_400_000),
        WindowRateLimiter(OwnBackend(), "key", window=3600),
    ],
    ids=lambda limiter: type(limiter).__name__,
)
def test_limiters_work_on_a_backend_of_ones_own(limiter):
    with limiter.acquire():
        assert acquired(limiter) is False


def test_a_limiter_works_on_what_only_looks_like_a_backend():
    limiter = ConcurrentRateLimiter(Duck(), "key")
    with limiter.acquire():
        assert acquired(limiter) is False


@pytest.mark.parametrize("backend", [OwnBackend, Duck])
def test_a_barrier_works_on_a_backend_of_ones_own(backend):
    barrier = Barrier(backend(), "key")

    assert barrier.create(parties=2)
    assert not barrier.create(parties=2)
    assert barrier.wait(block=False) is False
    assert barrier.wait() is True


# In actors


def test_a_job_that_finds_no_place_is_retried_until_it_gets_one(broker, worker):
    mutex = ConcurrentRateLimiter(SQLiteRateLimiterBackend(broker), "key")
    inside, most, done = [], [], []

    @dramalite.actor(max_retries=None, min_backoff=1, max_backoff=5)
    def work(number):
        with mutex.acquire():
            inside.append(number)
            most.append(len(inside))
            threading.Event().wait(0.002)
            inside.remove(number)
            done.append(number)

    for number in range(8):
        work.send(number)
    worker(broker, worker_threads=4)
    broker.join("default", timeout=PATIENCE)

    assert sorted(done) == list(range(8))
    assert set(most) == {1}


def test_workers_on_one_file_keep_a_limit_together(make_file_broker, worker):
    brokers = [make_file_broker() for _ in range(2)]
    inside, most, done = [], [], []
    for broker in brokers:
        limiter = ConcurrentRateLimiter(SQLiteRateLimiterBackend(broker), "key", limit=2)

        @dramalite.actor(broker=broker, max_retries=None, min_backoff=1, max_backoff=5)
        def work(number, limiter=limiter):
            with limiter.acquire():
                inside.append(number)
                most.append(len(inside))
                threading.Event().wait(0.005)
                inside.remove(number)
                done.append(number)

    for number in range(10):
        work.send(number)
    for broker in brokers:
        worker(broker, worker_threads=3)
    brokers[0].join("default", timeout=PATIENCE)

    assert sorted(done) == list(range(10))
    assert max(most) <= 2


def test_a_job_without_a_place_uses_up_its_retries(broker, worker):
    mutex = ConcurrentRateLimiter(SQLiteRateLimiterBackend(broker), "key")
    attempts = []

    @dramalite.actor(max_retries=2, min_backoff=0)
    def work():
        attempts.append(1)
        with mutex.acquire():
            raise AssertionError("unreachable")

    with mutex.acquire():
        work.send()
        worker(broker)
        broker.join("default", timeout=PATIENCE)

    assert len(attempts) == 3
    assert [letter.options["retries"] for letter in broker.dead_letters] == [3]


def test_a_job_gives_its_place_back_when_it_fails(broker, worker):
    mutex = ConcurrentRateLimiter(SQLiteRateLimiterBackend(broker), "key")

    @dramalite.actor(max_retries=0)
    def work():
        with mutex.acquire():
            raise ValueError("no")

    work.send()
    work.send()
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert ["ValueError" in letter.reason for letter in broker.dead_letters] == [True, True]


def test_a_limit_is_taken_at_once_and_not_with_the_outcome_of_the_job(broker, worker):
    backend = SQLiteRateLimiterBackend(broker)
    go_on, entered = threading.Event(), threading.Event()

    @dramalite.actor
    def work():
        with ConcurrentRateLimiter(backend, "key").acquire():
            entered.set()
            go_on.wait(DEADLINE)

    work.send()
    worker(broker)
    entered.wait(DEADLINE)
    meanwhile = acquired(ConcurrentRateLimiter(backend, "key"))
    go_on.set()
    broker.join("default", timeout=PATIENCE)

    assert meanwhile is False
    assert acquired(ConcurrentRateLimiter(backend, "key")) is True


def test_coroutines_keep_a_limit(broker, worker):
    import asyncio

    mutex = ConcurrentRateLimiter(SQLiteRateLimiterBackend(broker), "key")
    inside, most, done = [], [], []

    @dramalite.actor(max_retries=None, min_backoff=1, max_backoff=5)
    async def work(number):
        with mutex.acquire():
            inside.append(number)
            most.append(len(inside))
            await asyncio.sleep(0.002)
            inside.remove(number)
            done.append(number)

    for number in range(6):
        work.send(number)
    worker(broker)
    broker.join("default", timeout=PATIENCE)

    assert sorted(done) == list(range(6))
    assert set(most) == {1}


# Barrier


def test_a_barrier_is_created_once(backend):
    barrier = Barrier(backend, "key")

    assert [barrier.create(2), barrier.create(2)] == [True, False]


@pytest.mark.parametrize("parties", [0, -1])
def test_a_barrier_for_nobody_is_refused(backend, parties):
    with pytest.raises(AssertionError, match="parties"):
        Barrier(backend, "key").create(parties)


def test_only_the_last_arrival_is_told_if_nobody_waits(backend):
    barrier = Barrier(backend, "key")
    barrier.create(3)

    assert [barrier.wait(block=False) for _ in range(3)] == [False, False, True]


def test_a_cleared_barrier_stays_open(backend):
    barrier = Barrier(backend, "key")
    barrier.create(1)

    assert [barrier.wait(block=False) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("block", [True, False])
def test_a_barrier_that_nobody_created_is_open(backend, block):
    assert Barrier(backend, "key").wait(block=block) is True


@pytest.mark.parametrize("timeout", [PATIENCE, None])
def test_the_last_arrival_lets_the_others_go(broker, timeout):
    barrier = Barrier(SQLiteRateLimiterBackend(broker), "key")
    barrier.create(4)

    assert in_threads(4, lambda: barrier.wait(timeout=timeout)) == [True] * 4


def test_those_that_wait_hear_at_once_of_the_last_arrival(broker):
    late_s = []
    for number in range(20):  # The best counts, for the machine may be busy.
        barrier = Barrier(SQLiteRateLimiterBackend(broker), f"key-{number}")
        barrier.create(2)
        left_at = []

        def wait(barrier=barrier, left_at=left_at):
            if barrier.wait(timeout=PATIENCE):
                left_at.append(time.monotonic())

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        threading.Event().wait(0.05)  # Who naps while it waits would be deep in a nap.
        barrier.wait(timeout=PATIENCE)
        arrived_at = time.monotonic()
        waiting.join(DEADLINE)
        late_s += [time_ - arrived_at for time_ in left_at]
        assert len(late_s) == number + 1
        if late_s[-1] < 0.1:
            break

    assert min(late_s) < 0.1


def test_waiting_at_a_barrier_ends_with_its_timeout(broker):
    barrier = Barrier(SQLiteRateLimiterBackend(broker), "key")
    barrier.create(2)
    before = time.monotonic()
    passed = barrier.wait(timeout=50)

    assert passed is False
    assert 0.045 <= time.monotonic() - before < DEADLINE


def test_a_barrier_can_be_created_again_after_its_time(backend, clock):
    barrier = Barrier(backend, "key", ttl=1000)
    barrier.create(2)
    clock.advance(1000)

    assert barrier.create(2) is True
    assert [barrier.wait(block=False) for _ in range(2)] == [False, True]


def test_a_barrier_that_is_created_again_is_closed(backend, clock):
    barrier = Barrier(backend, "key", ttl=1000)
    barrier.create(1)
    clock.advance(500)
    barrier.wait()
    clock.advance(500)
    is_new = barrier.create(2)

    assert is_new is True
    assert barrier.wait(timeout=0) is False


def test_who_arrives_while_a_barrier_is_still_being_created_is_let_go(make_file_broker, monkeypatch):
    # Where its creation is more than one transaction, all arrive in between.
    connect, creations, all_have_arrived = sqlite3.connect, [], threading.Event()

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if threading.current_thread() is creating and statement.startswith("BEGIN"):
                creations.append(statement)
                if len(creations) > 1:
                    all_have_arrived.wait(DEADLINE)
            return super().execute(statement, *values)

    class Late(SQLiteRateLimiterBackend):
        def decr(self, *args):
            is_taken = super().decr(*args)
            has_arrived.set()
            creating.join(DEADLINE)  # As in a thread that gets no processor before it waits.
            return is_taken

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    creator = SQLiteRateLimiterBackend(make_file_broker())
    first, last = [Barrier(kind(make_file_broker()), "key") for kind in (Late, SQLiteRateLimiterBackend)]
    has_arrived, told = threading.Event(), []
    creating = threading.Thread(target=Barrier(creator, "key").create, args=(2,), daemon=True)
    arriving = threading.Thread(target=lambda: told.append(first.wait(timeout=PATIENCE)), daemon=True)
    creator.add("other", 1, MINUTE)  # So that all is open by then.
    creating.start()
    wait_until(lambda: len(creations) > 1 or not creating.is_alive())
    arriving.start()
    has_arrived.wait(DEADLINE)
    told.append(last.wait(timeout=PATIENCE))
    all_have_arrived.set()
    arriving.join(DEADLINE)

    assert told == [True, True]


def test_processes_meet_at_a_barrier(run_processes):
    told = run_processes(
        """
        barrier = dramalite.Barrier(backend, "key")
        created = barrier.create(2)
        print(int(created), int(barrier.wait(timeout=100_000)))
        """,
        copies=2,
    )

    assert sorted(told) == [["0", "1"], ["1", "1"]]


@pytest.mark.parametrize("threads", [2])
def test_jobs_meet_at_a_barrier(broker, worker, threads):
    barrier = Barrier(SQLiteRateLimiterBackend(broker), "key")
    barrier.create(threads)
    passed = []
    work = dramalite.actor(lambda: passed.append(barrier.wait(timeout=PATIENCE)), actor_name="work", max_retries=0)
    for _ in range(threads):
        work.send()
    worker(broker, worker_threads=threads)
    broker.join("default", timeout=PATIENCE)

    assert passed == [True] * threads


# One of them may strike in a callback of Python's own, for a weak reference or a collection, and end there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_time_limit_that_strikes_when_a_place_is_given_back_loses_no_place(broker, worker, unhurried):
    backend = SQLiteRateLimiterBackend(broker)
    jobs = 400

    @dramalite.actor(max_retries=0, time_limit=30)
    def work(number):
        with ConcurrentRateLimiter(backend, f"key-{number}", limit=1).acquire():
            time.sleep(0.0285 + number / jobs * 0.003)

    broker.enqueue_many([work.message(number) for number in range(jobs)])
    worker(broker, worker_threads=16)
    broker.join("default", timeout=PATIENCE, fail_fast=False)

    lost = [number for number in range(jobs) if not acquired(ConcurrentRateLimiter(backend, f"key-{number}"))]
    assert lost == []
