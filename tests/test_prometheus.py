"""Prometheus: which numbers are told, in which format, where, and by whom."""

from __future__ import annotations

import contextlib
import errno
import http.client
import http.server
import logging
import os
import re
import socket
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import dramalite
from dramalite import Prometheus

from helpers import DEADLINE, wait_until

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import harness  # noqa: E402

PATIENCE = DEADLINE * 1000
HOUR = 3_600_000

BUCKETS = (
    "5 10 25 50 75 100 250 500 750 1000 2500 5000 7500 10000 30000 60000 600000 900000 +Inf".split()
)  # fmt: skip


class Metrics(NamedTuple):
    """A text that was parsed."""

    types: dict[str, str]
    samples: dict[tuple, float]  # By name and sorted pairs of labels.
    texts: dict[tuple, str]  # The numbers as they were written.

    def value(self, name, actor="work", queue="default", **labels):
        """A number; 0 where there is none."""
        return self.samples.get(key(name, queue_name=queue, actor_name=actor, **labels), 0)


def key(name, **labels):
    return (name, *sorted(labels.items()))


LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([0-9.eE+-]+|\+Inf|NaN)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')
ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


def parse(text):
    """Read the text format line by line; whatever is not exactly as the format wants it is an error."""
    assert text.endswith("\n")
    types, helps, samples, texts = {}, {}, {}, {}
    for line in text.split("\n")[:-1]:
        if line.startswith("# "):
            _, what, name, words = line.split(" ", 3)
            known = {"HELP": helps, "TYPE": types}[what]
            assert name not in known, f"twice: {line}"
            known[name] = words
            continue
        found = LINE.fullmatch(line)
        assert found, f"no sample: {line!r}"
        name, labels, value = found.groups()
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in types or name in types, f"no type before: {line!r}"
        pairs, at = [], 0
        while at < len(labels or ""):
            label = LABEL.match(labels, at)
            assert label, f"bad label: {line!r}"
            pairs.append((label[1], re.sub(r'\\[\\"n]', lambda escape: ESCAPES[escape[0]], label[2])))
            at = label.end()
        assert (name, *sorted(pairs)) not in samples, f"twice: {line!r}"
        samples[(name, *sorted(pairs))] = float(value.replace("+Inf", "inf"))
        texts[(name, *sorted(pairs))] = value
    assert types.keys() == helps.keys()
    return Metrics(types, samples, texts)


def free_port():
    """A port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port, path="/metrics"):
    """What the endpoint answers: its status, headers and text; None where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode("utf-8")
    except ConnectionRefusedError:
        return None
    finally:
        connection.close()


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def metrics_of(port):
    """A function that adds the middleware to a broker."""

    def add(broker):
        prometheus = Prometheus(http_port=port)
        broker.add_middleware(prometheus)
        return prometheus

    return add


@pytest.fixture
def prometheus(broker, metrics_of):
    """The middleware, added to `broker`."""
    return metrics_of(broker)


@pytest.fixture
def metrics(broker, prometheus):
    """A function that gives the metrics as they are now."""
    return lambda: parse(prometheus.render(broker))


def run(broker):
    """Run all there is, in virtual time: no worker, so no endpoint."""
    with dramalite.simulate(broker) as sim:
        sim.run_until_idle()


def fail():
    raise ValueError("no")


# Names and numbers


def test_the_names_and_kinds_of_metrics_are_dramatiqs(metrics):
    assert metrics().types == {
        "dramatiq_messages_total": "counter",
        "dramatiq_message_errors_total": "counter",
        "dramatiq_message_retries_total": "counter",
        "dramatiq_message_rejects_total": "counter",
        "dramatiq_messages_inprogress": "gauge",
        "dramatiq_delayed_messages_inprogress": "gauge",
        "dramatiq_message_duration_milliseconds": "histogram",
    }


def test_a_success_is_counted_under_its_queue_and_actor(broker, metrics):
    work = dramalite.actor(lambda: None, actor_name="work")
    other = dramalite.actor(lambda: None, actor_name="other", queue_name="mail")
    for _ in range(3):
        work.send()
    other.send()
    run(broker)
    found = metrics()

    assert found.value("dramatiq_messages_total") == 3
    assert found.value("dramatiq_messages_total", "other", "mail") == 1
    assert found.value("dramatiq_message_errors_total") == 0
    assert found.value("dramatiq_message_retries_total") == 0
    assert found.value("dramatiq_message_rejects_total") == 0


def test_a_retry_is_counted_once(broker, metrics):
    dramalite.actor(fail, actor_name="work", max_retries=2, min_backoff=1, max_backoff=1).send()
    run(broker)
    found = metrics()

    assert found.value("dramatiq_messages_total") == 3
    assert found.value("dramatiq_message_errors_total") == 3
    assert found.value("dramatiq_message_retries_total") == 2
    assert found.value("dramatiq_message_rejects_total") == 1


def test_a_delayed_message_is_counted_under_its_own_queue(broker, metrics):
    dramalite.actor(lambda: None, actor_name="work").send_with_options(delay=1)
    run(broker)
    queues = {dict(labels)["queue_name"] for _name, *labels in metrics().samples}

    assert queues == {"default"}


def test_a_skipped_message_is_no_error(broker, metrics):
    def skip():
        raise dramalite.SkipMessage("not today")

    dramalite.actor(skip, actor_name="work").send()
    run(broker)
    found = metrics()

    assert found.value("dramatiq_messages_total") == 1
    assert found.value("dramatiq_message_errors_total") == 0
    assert found.value("dramatiq_message_rejects_total") == 0


def test_a_message_that_a_stop_interrupts_is_no_retry(make_broker, metrics_of, worker):
    broker = make_broker()
    running = worker(broker)
    prometheus = metrics_of(broker)  # Late, so that no endpoint is opened.
    attempts, started = [], threading.Event()

    @dramalite.actor(notify_shutdown=True, min_backoff=0)
    def work():
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("not yet")
        started.set()
        for _ in range(1000):
            threading.Event().wait(0.005)

    work.send()
    started.wait(DEADLINE)
    running.stop()

    assert parse(prometheus.render(broker)).value("dramatiq_message_retries_total") == 1


def test_a_coroutine_is_counted_like_a_function(broker, metrics):
    async def work():
        return None

    work = dramalite.actor(work)
    for _ in range(3):
        work.send()
    run(broker)
    found = metrics()

    assert found.value("dramatiq_messages_total") == 3
    assert found.value("dramatiq_message_duration_milliseconds_count") == 3


def test_gauges_tell_what_is_in_progress_and_what_is_delayed(broker, metrics):
    @dramalite.actor(max_retries=0)
    def work():
        dramalite.simulated_work(1000)

    with dramalite.simulate(broker, threads=2) as sim:
        work.send()
        for _ in range(5):
            work.send_with_options(delay=HOUR)
        sim.advance(500)
        during = metrics()
        sim.run_until_idle()
    after = metrics()

    assert during.value("dramatiq_messages_inprogress") == 1
    assert during.value("dramatiq_delayed_messages_inprogress") == 5
    assert after.value("dramatiq_messages_inprogress") == 0
    assert after.value("dramatiq_delayed_messages_inprogress") == 0
    assert after.value("dramatiq_messages_total") == 6


def test_durations_are_counted_in_dramatiqs_buckets(broker, metrics):
    @dramalite.actor(max_retries=0, time_limit=float("inf"))
    def work(ms):
        dramalite.simulated_work(ms)

    with dramalite.simulate(broker) as sim:
        for ms in (0, 5, 6, 100, 101, 950_000):
            work.send(ms)
        sim.run_until_idle()
    found = metrics()
    name = "dramatiq_message_duration_milliseconds"
    counts = [found.value(f"{name}_bucket", le=bound) for bound in BUCKETS]

    assert counts == [2, 3, 3, 3, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6]
    assert found.value(f"{name}_count") == 6
    assert found.value(f"{name}_sum") == 950_212


def test_the_buckets_of_each_actor_are_all_there(broker, metrics):
    dramalite.actor(lambda: None, actor_name="work").send()
    run(broker)
    bounds = [dict(labels)["le"] for name, *labels in metrics().samples if name.endswith("_bucket")]

    assert bounds == BUCKETS


def test_counts_are_kept_in_the_file_over_restarts(make_file_broker, metrics_of):
    for _ in range(2):
        broker = make_file_broker()
        prometheus = metrics_of(broker)
        dramalite.actor(lambda: None, actor_name="work").send()
        run(broker)
        prometheus.render(broker)
        broker.close()

    assert parse(prometheus.render(broker)).value("dramatiq_messages_total") == 2


def test_large_counts_are_told_exactly(make_file_broker, metrics_of, tmp_path):
    broker = make_file_broker()
    prometheus = metrics_of(broker)
    dramalite.actor(lambda: None, actor_name="work").send()
    run(broker)
    prometheus.render(broker)
    with sqlite3.connect(tmp_path / "queue.db") as connection:
        connection.execute("UPDATE dramalite_metrics SET amount = 1234567 WHERE name NOT LIKE '%sum'")
        connection.execute("UPDATE dramalite_metrics SET amount = 123456789012 WHERE name LIKE '%sum'")
    connection.close()
    found = parse(prometheus.render(broker))
    name = "dramatiq_message_duration_milliseconds"

    assert found.value("dramatiq_messages_total") == 1_234_567
    assert found.value(f"{name}_count") == 1_234_567
    assert found.value(f"{name}_bucket", le="+Inf") == 1_234_567
    assert found.value(f"{name}_sum") == 123_456_789_012


def test_counts_are_written_as_whole_numbers(broker, metrics):
    work = dramalite.actor(lambda: None, actor_name="work")
    for _ in range(12):
        work.send()
    run(broker)
    name = key("dramatiq_messages_total", queue_name="default", actor_name="work")

    assert metrics().texts[name] == "12"


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "<lambda>",
        'with "quotes" and \\backslashes\\',
        "two\nlines",
        "grüße 😀",
        'all } of, it="\\n',
        "a\ttab",
    ],
)
def test_any_actors_name_is_told_as_it_is(broker, metrics, name):
    dramalite.actor(lambda: None, actor_name=name).send()
    run(broker)

    assert metrics().value("dramatiq_messages_total", name) == 1


def test_metrics_that_nobody_counted_yet_are_told_without_numbers(metrics):
    assert metrics().samples == {}


# The endpoint


@pytest.fixture
def served(make_stub_broker, metrics_of):
    """A broker in memory with the middleware, for what is the same in a file, and an actor."""
    broker = make_stub_broker()
    metrics_of(broker)
    dramalite.actor(lambda: None, actor_name="work")
    return broker


def test_any_get_is_answered_with_the_metrics_as_they_are(served, worker, port):
    worker(served)
    wait_until(lambda: ask(port))
    served.get_actor("work").send()
    served.join("default", timeout=PATIENCE)
    answers = [ask(port, path) for path in ("/", "/metrics", "/any/other?with=query")]

    assert [status for status, _headers, _text in answers] == [200] * 3
    assert {headers["Content-Type"] for _status, headers, _text in answers} == {
        "text/plain; version=0.0.4; charset=utf-8"
    }
    assert [parse(text).value("dramatiq_messages_total") for _status, _headers, text in answers] == [1] * 3


def test_while_the_database_cannot_be_read_a_get_is_answered_with_503_and_the_cause(
    make_file_broker, metrics_of, worker, port, tmp_path
):
    broker = make_file_broker()
    metrics_of(broker)
    worker(broker)
    wait_until(lambda: ask(port))
    with sqlite3.connect(tmp_path / "queue.db") as connection:
        connection.execute("ALTER TABLE dramalite_metrics RENAME TO dramalite_lost")
    connection.close()
    status, _headers, text = ask(port)

    assert status == 503
    assert "no such table: dramalite_metrics" in text


def test_the_endpoint_is_dramatiqs_but_for_this_machine_only():
    prometheus = Prometheus()

    assert (prometheus.http_host, prometheus.http_port) == ("127.0.0.1", 9191)


def test_the_environment_names_the_endpoint(monkeypatch):
    monkeypatch.setenv("dramatiq_prom_host", "127.0.0.2")
    monkeypatch.setenv("dramatiq_prom_port", "9999")
    of_the_environment = Prometheus()
    given = Prometheus(http_host="127.0.0.3", http_port=1)

    assert (of_the_environment.http_host, of_the_environment.http_port) == ("127.0.0.2", 9999)
    assert (given.http_host, given.http_port) == ("127.0.0.3", 1)


def test_adding_the_middleware_opens_nothing(served, port):
    assert ask(port) is None


def test_a_stopped_worker_frees_the_port_soon_and_the_next_one_takes_it(served, worker, port):
    first = worker(served)
    wait_until(lambda: ask(port))
    before = time.monotonic()
    first.stop()
    stopping_s = time.monotonic() - before
    with socket.create_server(("127.0.0.1", port)):
        between = "free"
    worker(served)
    wait_until(lambda: ask(port))

    assert between == "free"
    assert stopping_s < DEADLINE / 2


def test_a_port_that_is_taken_is_waited_for_while_work_goes_on(served, worker, port):
    with socket.create_server(("127.0.0.1", port)):
        worker(served)
        served.get_actor("work").send()
        served.join("default", timeout=PATIENCE)
    wait_until(lambda: ask(port))

    assert parse(ask(port)[2]).value("dramatiq_messages_total") == 1


@pytest.mark.parametrize(("error", "level"), [(errno.EADDRINUSE, "INFO"), (errno.EACCES, "ERROR")])
def test_a_port_that_cannot_be_served_is_told_of_once(served, worker, port, caplog, monkeypatch, error, level):
    tries = []

    def fail(_server):
        tries.append(1)
        raise OSError(error, os.strerror(error))

    caplog.set_level(logging.INFO, "dramalite")
    monkeypatch.setattr("http.server.ThreadingHTTPServer.server_bind", fail)
    worker(served)
    wait_until(lambda: len(tries) > 1)
    told = [record for record in caplog.records if str(port) in record.getMessage()]

    assert [record.levelname for record in told] == [level]
    assert os.strerror(error) in told[0].getMessage()


def test_metrics_that_cannot_be_stored_are_told_of_once(served, worker, port, caplog, monkeypatch):
    tries = []

    def fail(_broker):
        tries.append(1)
        raise dramalite.BrokerError("the disk is full")

    (prometheus,) = [item for item in served.middleware if isinstance(item, Prometheus)]
    monkeypatch.setattr(prometheus, "flush", fail)
    worker(served)
    wait_until(lambda: len(tries) > 2)

    assert caplog.text.count("kept for later") == 1
    monkeypatch.undo()


@pytest.mark.torture
def test_who_connects_and_says_nothing_is_hung_up_on(served, worker, port):
    worker(served)
    wait_until(lambda: ask(port))
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as silent:
        assert silent.recv(1) == b""


def test_metrics_are_served_over_ipv6_too(make_stub_broker, worker, port):
    try:
        with socket.create_server(("::1", port), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("There is no IPv6 here.")
    broker = make_stub_broker()
    broker.add_middleware(Prometheus(http_host="::1", http_port=port))
    worker(broker)

    def answer():
        with contextlib.suppress(ConnectionRefusedError):
            with socket.create_connection(("::1", port), DEADLINE) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return connection.recv(100)

    wait_until(answer)
    assert b" 200 " in answer()


@pytest.mark.parametrize("value", ["", "abc", "-1", "70000"])
def test_a_port_in_the_environment_that_is_none_is_named(monkeypatch, value):
    monkeypatch.setenv("dramatiq_prom_port", value)

    with pytest.raises(ValueError, match="dramatiq_prom_port") as raised:
        Prometheus()
    assert repr(value) in str(raised.value)


def test_the_endpoint_stays_until_the_last_worker_of_a_broker_has_stopped(served, worker, port):
    first, second = worker(served), worker(served)
    wait_until(lambda: ask(port))
    first.stop()
    meanwhile = ask(port)
    second.stop()

    assert meanwhile is not None
    assert ask(port) is None


def test_a_worker_stops_though_another_one_starts_meanwhile(served, worker, monkeypatch):
    go_on, bind = threading.Event(), http.server.ThreadingHTTPServer.server_bind
    monkeypatch.setattr(
        "http.server.ThreadingHTTPServer.server_bind", lambda server: go_on.wait(DEADLINE) and bind(server)
    )
    stopping = threading.Thread(target=worker(served).stop, daemon=True)
    stopping.start()
    stopping.join(0.03)
    worker(served)
    go_on.set()
    stopping.join(DEADLINE)

    assert stopping.is_alive() is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")
def test_one_endpoint_sums_what_all_worker_processes_count(tmp_path, port):
    with harness.new_place(tmp_path) as place:
        place.jobs(f"""
            broker.add_middleware(dramalite.Prometheus(http_port={port}))

            @dramalite.actor(max_retries=0)
            def meet(number):
                note("met", number, os.getpid())
                until(lambda: noted("met") >= 2)
        """)
        tree = place.worker(processes=2, threads=1)
        for number in range(2):
            place.send("meet", number)
        place.drained()
        pids = {note[2] for note in place.notes("met")}
        place.wait_until(
            lambda: (answer := ask(port)) and parse(answer[2]).value("dramatiq_messages_total", "meet") == 2,
            "one answers for both",
        )
        tree.signal(harness.signal.SIGTERM)

        assert len(pids) == 2
        assert tree.wait() == 0, tree.tail()
        assert ask(port) is None


# Forked processes


#: Serves at a port of its own, and adds what it counts only when it is told.
METRICS = """
    import encodings.idna, http.server  # Or a thread may be importing them as the process forks.
    import urllib.request

    class Metrics(dramalite.Prometheus):
        may_flush = False

        def flush(self, broker):
            if self.may_flush:
                super().flush(broker)

    metrics = Metrics(http_port={port})
    broker.add_middleware(metrics)

    def is_served():
        try:
            with urllib.request.urlopen("http://127.0.0.1:{port}", timeout=3) as answer:
                return answer.status == 200
        except OSError:
            return False
"""


@pytest.fixture
def place(tmp_path, port):
    if not sys.platform.startswith("linux"):
        pytest.skip("finds processes through /proc")
    with harness.new_place(tmp_path) as place:
        place.jobs(METRICS.format(port=port))
        yield place


def test_what_ran_before_a_fork_is_not_counted_by_the_child_too(place):
    place.script("""
        import os
        from pathlib import Path
        import dramalite
        import jobs

        with dramalite.Worker(jobs.broker, worker_threads=1) as worker:
            for number in range(3):
                jobs.ping.send(number)
            jobs.broker.join("default", timeout=100_000)
            worker.pause()
            child = os.fork()
            jobs.metrics.may_flush = True
            if child == 0:
                code = 1
                try:
                    with dramalite.Worker(jobs.broker, worker_threads=1):
                        jobs.ping.send(3)
                        jobs.broker.join("default", timeout=100_000)
                    jobs.metrics.flush(jobs.broker)
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
        Path("metrics").write_text(jobs.metrics.render(jobs.broker))
    """)

    assert parse((place.folder / "metrics").read_text()).value("dramatiq_messages_total", "ping") == 4


FORKS = """
    import os
    import dramalite
    import jobs

    with dramalite.Worker(jobs.broker, worker_threads=1):
        jobs.until(lambda: {is_taken} or jobs.is_served())
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with dramalite.Worker(jobs.broker, worker_threads=1):
                    jobs.note("working")
                    jobs.until(lambda: os.path.exists("free"))
                    jobs.until(jobs.is_served, {seconds})
                code = 0
            finally:
                os._exit(code)
        jobs.until(lambda: jobs.noted("working"))
    jobs.note("stopped")
    assert os.waitpid(child, 0)[1] == 0
"""


def test_the_worker_of_a_forked_child_serves_the_metrics_once_the_port_is_free(place, port):
    with socket.create_server(("127.0.0.1", port)):
        tree = place.start_script(FORKS.format(is_taken=True, seconds=30))
        place.wait_until(lambda: place.notes("stopped"), "the parent's worker has stopped")
    (place.folder / "free").touch()

    assert tree.wait() == 0, tree.tail()


def test_the_worker_of_a_forked_child_serves_the_metrics_once_its_parents_worker_has_stopped(place):
    tree = place.start_script(FORKS.format(is_taken=False, seconds=30))
    place.wait_until(lambda: place.notes("stopped"), "the parent's worker has stopped")
    (place.folder / "free").touch()

    assert tree.wait() == 0, tree.tail()


# Locked databases


def test_a_worker_stops_without_waiting_for_its_metrics_to_be_stored_in_a_locked_database(
    make_file_broker, metrics_of, worker, monkeypatch
):
    # It is locked when the worker has done all else.  Another program gives up waiting for the lock, but only later.
    flush, is_locked, told = Prometheus.flush, threading.Event(), []

    class Locks(dramalite.Middleware):
        def after_worker_shutdown(self, broker, worker):
            holder.execute("BEGIN IMMEDIATE")
            waiting.start()
            is_locked.set()

    def wait_for_the_lock():
        with contextlib.closing(sqlite3.connect(broker.path, timeout=15, isolation_level=None)) as another:
            try:
                another.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                told.append("gave up")
            else:
                told.append("waited")
                another.execute("ROLLBACK")

    monkeypatch.setattr(Prometheus, "flush", lambda *args: flush(*args) if is_locked.is_set() else None)
    waiting = threading.Thread(target=wait_for_the_lock, daemon=True)
    broker = make_file_broker()
    metrics_of(broker)
    broker.add_middleware(Locks())
    dramalite.actor(lambda: None, actor_name="work").send()
    started = worker(broker)
    broker.join("default", timeout=PATIENCE)
    with contextlib.closing(sqlite3.connect(broker.path, isolation_level=None)) as holder:
        started.stop(timeout=1000)
        told.append("stopped")
        holder.execute("ROLLBACK")
    waiting.join(DEADLINE)

    assert told == ["stopped", "waited"]
