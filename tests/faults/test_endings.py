"""A send at any moment of a script's life, its end included: stored or a clear error, and no hang."""

from __future__ import annotations

import contextlib
import re
import signal
import sqlite3
import sys
import threading

import dramalite
import pytest
from helpers import DEADLINE

JOBS = """
    if "PATIENT" in os.environ:
        dramalite._BUSY_TIMEOUT_S = 1000.0  # A send that waits in vain for another outlasts its test.

    @dramalite.actor(max_retries=0)
    def job(number):
        note("ran", number)

    @dramalite.actor(max_retries=0)
    def hold(times):
        note("holding")
        if noted("holding") <= times:
            time.sleep(30)
        note("held")

    def send(number):
        \"\"\"Send and note what came of it; only a clear error may come instead.\"\"\"
        try:
            job.send(number)
        except dramalite.DramatiqError as error:
            note("refused", number, type(error).__name__)
        else:
            note("stored", number)
"""


@pytest.fixture
def place(place):
    place.jobs(JOBS)
    return place


def assert_noted_is_stored(place, at_least):
    """What was noted as stored is in the file, and all else was refused clearly."""
    assert len(place.notes("stored")) + len(place.notes("refused")) >= at_least, place.story()
    assert place.waiting() == len(place.notes("stored")), place.story()
    assert [tree.tail() for tree in place.trees if "Traceback" in tree.output() or "Exception ignored" in tree.output()] == []


@pytest.mark.parametrize("used_before", [True, False], ids=["used before", "first use"])
def test_a_send_in_an_exit_handler_is_stored(place, used_before):
    place.script(f"import atexit, jobs\nif {used_before}: jobs.send(0)\natexit.register(jobs.send, 1)")

    assert place.notes("stored", 1)
    assert_noted_is_stored(place, 1)


def test_a_send_in_an_exit_handler_registered_before_the_import_is_stored(place):
    place.script("import atexit\natexit.register(lambda: jobs.send(1))\nimport jobs\njobs.send(0)\njobs.broker.close()")

    assert_noted_is_stored(place, 2)


def test_a_send_while_modules_are_torn_down_is_stored_or_a_clear_error(place):
    place.script(
        """
        import jobs

        class Farewell:
            send = staticmethod(jobs.send)  # Kept, since globals may be gone by then.

            def __init__(self, number):
                self.number = number

            def __del__(self):
                self.send(self.number)

        jobs.farewell = Farewell(1)
        farewell = Farewell(2)
        loop = [Farewell(3)]
        loop.append(loop)
        jobs.send(0)
        """,
        PATIENT="1",
    )

    assert place.notes("stored", 0)
    assert place.waiting() == len(place.notes("stored"))


def test_a_send_in_a_finalizer_of_the_garbage_collector_is_stored(place):
    place.script(
        """
        import gc
        import jobs

        class Cycle:
            def __init__(self, number):
                self.number, self.me = number, self

            def __del__(self):
                jobs.send(f"gc-{self.number}")

        gc.set_threshold(5, 2, 2)  # So that it strikes in the middle of sends.
        for number in range(150):
            Cycle(number)
            jobs.send(number)
        gc.collect()
        """
    )

    assert len(place.notes("stored")) == 300
    assert_noted_is_stored(place, 300)


def test_a_send_in_a_callback_of_the_garbage_collector_is_stored(place):
    place.script(
        """
        import gc
        import jobs

        sent = []

        def callback(phase, info):
            if len(sent) < 200:
                sent.append(phase)
                jobs.send(f"{phase}-{len(sent)}")

        jobs.send(0)
        gc.callbacks.append(callback)
        gc.set_threshold(3, 2, 2)
        for number in range(1, 150):
            jobs.send(number)
        gc.callbacks.clear()
        """
    )

    assert len(place.notes("stored", 149)) == 1
    assert_noted_is_stored(place, 151)


def test_a_send_in_a_signal_handler_that_interrupts_a_send_is_stored(place):
    place.script(
        """
        import signal
        import jobs

        from_handler = []

        def handler(*_):
            from_handler.append(1)
            jobs.send(f"signal-{len(from_handler)}")
            if len(from_handler) < 150:
                ring_again()  # Only now: on a slow machine handlers would interrupt each other without end.

        def ring_again():
            signal.setitimer(signal.ITIMER_REAL, 0.0006)

        signal.signal(signal.SIGALRM, handler)
        ring_again()
        number = 0
        while len(from_handler) < 150:
            jobs.send(number)
            number += 1
        """
    )

    assert len(place.notes("stored")) > 150
    assert_noted_is_stored(place, 151)


@pytest.mark.torture
def test_a_send_in_a_signal_handler_waits_for_nobody_who_waits_for_what_it_interrupted(place):
    place.script(
        """
        import random, signal, threading
        import dramalite
        import jobs

        draw = random.Random(1)
        handled = []

        def handler(*_):
            jobs.job.send("handler")
            handled.append(1)
            ring_again()

        def ring_again():
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.00005, 0.002))

        def start_and_stop(queue):
            with dramalite.Worker(jobs.broker, queues=[queue], worker_threads=1):
                pass

        def go_on_in_a_thread():
            while not is_over.is_set():
                start_and_stop("third")

        is_over = threading.Event()
        thread = threading.Thread(target=go_on_in_a_thread)
        thread.start()
        signal.signal(signal.SIGALRM, handler)
        ring_again()
        while len(handled) < 8000:
            start_and_stop("other")
        signal.setitimer(signal.ITIMER_REAL, 0)
        is_over.set()
        thread.join()
        """,
        seconds=150,
    )

    assert place.waiting() >= 8000


#: The first checkpoint of the script that begins like this is interrupted by a signal.
SIGNAL_IN_A_CHECKPOINT = """
        import os, signal, sqlite3

        connect, armed = sqlite3.connect, [True]

        class Connection(sqlite3.Connection):
            def execute(self, statement, *values):
                if armed and "wal_checkpoint" in statement:
                    armed.clear()
                    os.kill(os.getpid(), signal.SIGUSR1)
                return super().execute(statement, *values)

        sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)
        import jobs

"""


def test_a_send_in_a_signal_handler_that_interrupts_a_checkpoint_is_stored(place):
    place.durability = "full"
    place.script(
        SIGNAL_IN_A_CHECKPOINT
        + """
        from_handler = []

        def handler(*_):
            for _ in range(3):  # Enough for a checkpoint of its own.
                from_handler.append(jobs.job.send("x" * 1_000_000))

        signal.signal(signal.SIGUSR1, handler)
        while not from_handler:
            jobs.note("sent")
            jobs.job.send("x" * 1_000_000)
        """,
        PATIENT="1",
    )

    assert place.waiting() == len(place.notes("sent")) + 3


def test_a_signal_handler_that_interrupts_a_checkpoint_may_fork(place):
    place.durability = "full"
    place.script(
        SIGNAL_IN_A_CHECKPOINT
        + """
        codes = []

        def handler(*_):
            child = os.fork()
            if child == 0:
                os._exit(0)
            codes.append(os.waitpid(child, 0)[1])

        signal.signal(signal.SIGUSR1, handler)
        while not codes:
            jobs.note("sent")
            jobs.job.send("x" * 1_000_000)
        assert codes == [0]
        """,
        PATIENT="1",
    )

    assert place.waiting() == len(place.notes("sent"))


def test_a_signal_handler_that_interrupts_a_send_may_stop_a_worker(place):
    # The job has ended by then, but its outcome can only be written when the send is over.
    place.script(
        """
        import os, signal, sqlite3, threading
        from pathlib import Path

        connect, armed = sqlite3.connect, []

        class Connection(sqlite3.Connection):
            def execute(self, *statement):
                if armed and threading.current_thread() is threading.main_thread():
                    armed.clear()
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().execute(*statement)

        sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)
        import dramalite
        import jobs

        class Watch(dramalite.Middleware):
            def after_worker_shutdown(self, broker, worker):
                jobs.note("stopped")

        @dramalite.actor
        def held():
            jobs.note("holding")
            jobs.until(lambda: Path("release").exists())
            jobs.note("held")

        def handler(*_):
            Path("release").touch()
            jobs.until(lambda: jobs.noted("held"))
            worker.stop(timeout=1000)
            jobs.note("returned")

        signal.signal(signal.SIGTERM, handler)
        jobs.broker.add_middleware(Watch())
        worker = dramalite.Worker(jobs.broker, worker_threads=1, queues=["default"])
        worker.start()
        held.send()
        jobs.until(lambda: jobs.noted("holding"))
        jobs.broker.declare_queue("other")
        armed.append(True)
        jobs.broker.enqueue(jobs.job.message(1).copy(queue_name="other"))
        jobs.until(lambda: jobs.noted("stopped"))
        """,
    )

    assert [note[0] for note in place.notes()] == ["holding", "held", "returned", "stopped"]
    assert place.query("SELECT queue FROM dramalite_messages") == [("other",)]


@pytest.mark.parametrize("interruptions", [150, pytest.param(3000, marks=pytest.mark.torture)])
def test_an_exception_from_a_signal_handler_in_the_middle_of_a_send_breaks_nothing(place, interruptions):
    # What Ctrl+C does to a script that goes on: a later send is stored, and not only said to be.
    place.script(
        f"""
        import contextlib, os, random, signal, sqlite3
        import jobs

        class Alarm(Exception):
            pass

        def ring(*_):
            raise Alarm

        def count():
            with contextlib.closing(sqlite3.connect(os.environ["JOBS_DB"], timeout=20)) as connection:
                return connection.execute("SELECT count(*) FROM dramalite_messages").fetchone()[0]

        signal.signal(signal.SIGALRM, ring)
        jobs.job.send("first")
        draw = random.Random(6)
        for number in range({interruptions}):
            before = sent = count()
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.00002, 0.0006))
                while True:
                    jobs.job.send(number)
                    sent += 1
            except Alarm:
                pass
            jobs.job.send("afterwards")
            sent += 1
            stored = count()
            assert stored in (sent, sent + 1), f"{{stored - before}} stored of {{sent - before}}"
        jobs.broker.close()
        """,
        seconds=100,
    )

    assert place.sound()


@pytest.mark.parametrize("part", ["after", "before"])
def test_an_exception_from_a_signal_handler_in_a_checkpoint_leaves_later_ones_possible(place, part):
    # CPython raises such exceptions at calls.  Those are taken that come before the log is moved, or after.
    place.durability = "full"
    place.script(
        f"""
        import sqlite3, sys

        connect, stored, moved = sqlite3.connect, [], []

        class Connection(sqlite3.Connection):
            def execute(self, statement, *values):
                result = super().execute(statement, *values)
                (moved if "wal_checkpoint" in statement else stored).append(statement)
                return result

        sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)
        import dramalite
        import jobs

        class Alarm(Exception):
            pass

        def send():
            # So much that the log is moved into the file afterwards.
            jobs.broker.flush_all()
            stored.clear()
            moved.clear()
            jobs.broker.enqueue_many([jobs.job.message("x" * 600_000) for _ in range(2)])

        def send_with_an_alarm_at(number):
            calls, place = 0, None

            def profile(frame, event, argument):
                nonlocal calls, place
                if event in ("call", "c_return") and frame.f_code.co_filename == dramalite.__file__:
                    calls += bool(moved if {part!r} == "after" else "COMMIT" in stored and not moved)
                    if calls == number:
                        sys.setprofile(None)
                        place = f"{{frame.f_code.co_name}}, line {{frame.f_lineno}}"
                        raise Alarm

            sys.setprofile(profile)
            try:
                send()
            except Alarm:
                pass
            finally:
                sys.setprofile(None)
            return place

        send()
        assert moved
        places = []
        while place := send_with_an_alarm_at(len(places) + 1):
            places.append(place)
            if {part!r} == "before":
                send()
            if not moved:
                sys.exit(f"Nobody can move the log any more; before: {{places[-2:]}}.")
        assert len(places) > 10
        send()
        assert moved
        """
    )


def test_sends_are_stored_after_an_exception_from_a_signal_handler_as_a_transaction_began(
    make_file_broker, monkeypatch
):
    # Ctrl+C that arrives while SQLite begins a transaction is raised as soon as it has begun.
    connect, armed = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            result = super().execute(statement, *values)
            if armed and statement.startswith("BEGIN"):
                raise armed.pop()
            return result

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_file_broker()
    job = dramalite.actor(print, actor_name="job")
    job.send("before")
    armed.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        broker.enqueue_many([job.message("interrupted"), job.message("too")])
    job.send("afterwards")
    with contextlib.closing(connect(broker.path)) as connection:
        (stored,) = connection.execute("SELECT count(*) FROM dramalite_messages").fetchone()

    assert stored == 2


def test_sys_exit_in_a_signal_handler_that_closes_the_broker_ends_a_send_it_interrupts(make_file_broker, monkeypatch):
    connect, armed = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            result = super().execute(statement, *values)
            if armed and statement.startswith("BEGIN"):
                armed.clear()  # What a handler does that comes here:
                broker.close()
                sys.exit(7)
            return result

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_file_broker()
    job = dramalite.actor(print, actor_name="job")
    job.send("before")
    armed.append(True)
    with pytest.raises(SystemExit):
        broker.enqueue_many([job.message("interrupted"), job.message("too")])
    job.send("afterwards")

    assert [message.args for message in broker.pending()] == [("before",), ("afterwards",)]


def test_an_exception_anywhere_in_a_send_leaves_another_threads_send_stored_or_refused(place):
    # CPython raises such exceptions at calls.  The other send begins at the first one at which it has to wait.
    place.script(
        """
        import contextlib, itertools, os, sqlite3, sys, threading
        import dramalite
        import jobs

        class Alarm(Exception):
            pass

        class Sends(threading.Thread):
            refusal = None

            def run(self):
                try:
                    jobs.ping.send(1)
                except dramalite.BrokerError as error:
                    self.refusal = error

        def pings():
            with contextlib.closing(sqlite3.connect(os.environ["JOBS_DB"])) as connection:
                return connection.execute("SELECT count(*) FROM dramalite_messages WHERE actor = 'ping'").fetchone()[0]

        def send_beside(first, last):
            # Send, beside another send that begins at call `first`, and with an exception at call `last`.
            # Tells whether the other one had to wait, and whether there were so many calls.
            calls, has_waited = 0, False

            def profile(frame, event, argument):
                nonlocal calls, has_waited
                if event in ("call", "c_return") and frame.f_code.co_filename == dramalite.__file__:
                    calls += 1
                    if calls == first:
                        other.start()
                        other.join(0.02)
                        has_waited = other.is_alive()
                    elif calls == last:
                        sys.setprofile(None)
                        send_beside.place = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                        raise Alarm

            other, before = Sends(), pings()
            sys.setprofile(profile)
            try:
                jobs.job.send(1)
            except Alarm:
                pass
            finally:
                sys.setprofile(None)
            if calls >= first:
                other.join(100)
                assert not other.is_alive(), f"{send_beside.place}: the other send hangs."
                assert other.refusal or pings() > before, f"{send_beside.place}: neither stored nor refused."
            return has_waited, calls >= last

        jobs.job.send(0)
        jobs.ping.send(0)
        first = next(number for number in range(1, 200) if send_beside(number, 10_000)[0])
        last = next(number for number in itertools.count(first + 1) if not send_beside(first, number)[1])
        assert last > first + 5
        """
    )


#: Runs something at the n-th line of dramalite that a send passes, for each n; as a signal handler would.
AT_EACH_STEP = """
    import contextlib, os, sqlite3, sys
    import dramalite
    import jobs

    def count():
        with contextlib.closing(sqlite3.connect(os.environ["JOBS_DB"])) as connection:
            return connection.execute("SELECT count(*) FROM dramalite_messages").fetchone()[0]

    def at_step(wanted, act, do):
        \"\"\"Call `do`, and `act` at the wanted line of dramalite on the way; whether there was such a line.\"\"\"
        step = 0

        def trace(frame, event, argument):
            nonlocal step
            if frame.f_code.co_filename != dramalite.__file__:
                return None
            if event == "line":
                step += 1
                if step == wanted:
                    at_step.place = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                    act()
            return trace

        sys.settrace(trace)
        try:
            do()
        finally:
            sys.settrace(None)
        return step >= wanted
"""


def test_a_send_at_any_step_of_another_send_is_stored(place):
    place.script(
        AT_EACH_STEP
        + """
    for number in range(3):
        jobs.job.send(number)
    step, stored = 1, count()
    while at_step(step, lambda: jobs.job.send("inner"), lambda: jobs.job.send("outer")):
        assert count() == stored + 2, f"{at_step.place}: {count() - stored} of 2 were stored."
        step, stored = step + 1, count()
    assert step > 20
    """
    )


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.torture)])
def test_a_send_at_any_step_of_the_first_send_is_stored(place, stride):
    place.script(
        AT_EACH_STEP
        + f"""
    def at_first_use(step):
        broker = dramalite.SQLiteBroker(os.environ["JOBS_DB"], durability="normal")
        job = dramalite.actor(lambda number: None, actor_name="job", broker=broker)
        seen = at_step(step, lambda: job.send("inner"), lambda: job.send("outer"))
        assert count() == 1 + seen, f"{{at_step.place}}: {{count()}} of 2 were stored."
        broker.close()
        for name in os.listdir("."):
            if name.startswith("queue.db"):
                os.remove(name)
        return seen

    step = 1
    while at_first_use(step):
        step += {stride}
    assert step > 50
    """
    )


def test_daemon_threads_that_send_while_the_interpreter_ends_do_not_keep_it(place):
    place.script(
        """
        import itertools, threading
        import jobs

        def keep_sending(name):
            for number in itertools.count():
                jobs.send(f"{name}-{number}")

        for name in range(3):
            threading.Thread(target=keep_sending, args=(name,), daemon=True).start()
        jobs.until(lambda: jobs.noted("stored") > 20)
        """,
        PATIENT="1",
    )

    stored = place.waiting()
    assert len(place.notes("stored")) <= stored <= len(place.notes("stored")) + 3
    assert place.sound()


def test_a_finalizer_that_sends_while_the_interpreter_ends_does_not_keep_it(place):
    place.script(
        """
        import itertools, os, threading
        import jobs

        def keep_sending(name):
            for number in itertools.count():
                jobs.send(f"{name}-{number}")

        class Session:
            def __del__(self, note=jobs.note, error=jobs.dramalite.BrokerError):
                try:
                    jobs.job.send("bye")
                except error:
                    note("refused")
                note("over")

        session = Session()
        session.itself = session  # Collected at the very end.
        del session
        threading.Thread(target=keep_sending, args=("thread",), daemon=True).start()
        jobs.until(lambda: jobs.noted("stored") > 20)
        """,
        PATIENT="1",
    )

    assert len(place.notes("over")) == 1
    assert place.sound()


@pytest.mark.parametrize(
    "store", ['limits.add, "key", 1, 60_000', "results.store_result, message, 1, 60_000"], ids=["limit", "result"]
)
def test_a_finalizer_that_stores_a_value_while_a_thread_that_has_stopped_holds_the_database_gets_an_error(place, store):
    # The program's end stops the thread in the middle of its transaction; others wait for what is stored.
    tree = place.start_script(
        f"""
        import atexit, functools, gc, os, sqlite3, threading
        from pathlib import Path

        gc.disable()  # Until the very end: a finalizer that runs before would wait for the thread that holds.
        atexit.register(gc.enable)
        connect, forever, holding = sqlite3.connect, threading.Event(), []

        class Connection(sqlite3.Connection):
            def execute(self, statement, *values):
                result = super().execute(statement, *values)
                if threading.current_thread().name == "holds" and statement.startswith("BEGIN"):
                    holding.append(statement)
                    forever.wait()
                return result

        sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)
        import dramalite
        import jobs

        limits = dramalite.SQLiteRateLimiterBackend(jobs.broker)
        results = jobs.broker.get_results_backend()
        message = jobs.job.send_with_options(args=(1,), store_results=True)
        limits.add("other", 1, 60_000)

        class Stores:
            def __del__(self, note=jobs.note, error=dramalite.BrokerError, store=functools.partial({store})):
                try:
                    store()
                except error:
                    note("refused")
                note("over")

        def watch(first, then):
            first()  # So that nothing is still imported when the thread is stopped.
            ready.append(1)
            then()

        ready, other = [], jobs.job.send_with_options(args=(0,), store_results=True)
        for kind in (lambda key, message: limits.wait(key, None), lambda key, message: message.get_result(block=True)):
            waits = functools.partial(kind, "ready", other), functools.partial(kind, "never", message)
            threading.Thread(target=watch, args=waits, daemon=True).start()
        jobs.until(lambda: Path("queue.db-lock").exists())  # They are heard of there.
        limits.wait_notify("ready", 60_000)
        results.store_result(other, 1, 60_000)
        jobs.until(lambda: len(ready) == 2)
        several = [jobs.job.message(2), jobs.job.message(3)]
        threading.Thread(target=jobs.broker.enqueue_many, args=(several,), name="holds", daemon=True).start()
        jobs.until(lambda: holding)
        last = Stores()
        last.itself = last  # Collected at the very end.
        del last
        """
    )

    assert tree.wait(20) == 0, tree.tail()
    assert [note[0] for note in place.notes()] == ["refused", "over"]


def test_a_thread_that_outlives_the_main_thread_can_send(place):
    place.script(
        """
        import threading
        import jobs

        def later():
            threading.main_thread().join()
            jobs.send(1)

        threading.Thread(target=later).start()
        """
    )

    assert place.notes("stored", 1)
    assert_noted_is_stored(place, 1)


@pytest.mark.parametrize(
    "ending",
    ["os._exit(0)", "sys.exit(0)", "os.kill(os.getpid(), signal.SIGTERM)", "os.kill(os.getpid(), signal.SIGKILL)", "raise KeyError", "os.abort()"],
)
def test_what_was_sent_is_stored_however_the_script_ends(place, ending):
    tree = place.start_script(f"import os, signal, sys\nimport jobs\nfor number in range(5): jobs.send(number)\n{ending}")
    tree.wait()

    assert len(place.notes("stored")) == 5
    assert place.waiting() == 5
    assert place.sound()


@pytest.mark.parametrize("state", ["idle", "working", "paused", "never used"])
def test_a_worker_in_the_program_that_is_not_stopped_does_not_keep_the_interpreter(place, state):
    place.script(
        f"""
        import dramalite
        import jobs

        state = {state!r}
        if state != "never used":
            jobs.job.send(0)
        worker = dramalite.Worker(jobs.broker, worker_threads=2)
        worker.start()
        if state != "never used":
            jobs.broker.join("default", timeout=100_000)
            assert jobs.noted("ran") == 1
        if state == "working":
            jobs.hold.send(1)
            jobs.until(lambda: jobs.noted("holding"))
        if state == "paused":
            worker.pause()
        """
    )

    assert place.notes("held") == []
    assert place.waiting() == (1 if state == "working" else 0)
    assert [tree.tail() for tree in place.trees if "Fatal" in tree.output() or "Traceback" in tree.output()] == []


def test_work_that_was_running_when_the_program_ended_is_done_by_the_next(place):
    place.script(
        """
        import dramalite
        import jobs

        jobs.hold.send(1)
        dramalite.Worker(jobs.broker, worker_threads=2).start()
        jobs.until(lambda: jobs.noted("holding"))
        """
    )
    place.worker()
    place.drained()

    assert len(place.notes("holding")) == 2
    assert len(place.notes("held")) == 1


def test_a_worker_started_in_a_daemon_thread_does_not_keep_the_interpreter(place):
    place.script(
        """
        import threading
        import dramalite
        import jobs

        def serve():
            with dramalite.Worker(jobs.broker, worker_threads=2):
                threading.Event().wait()

        threading.Thread(target=serve, daemon=True).start()
        jobs.job.send(1)
        jobs.broker.join("default", timeout=100_000)  # Its outcome is written.
        """
    )

    assert place.waiting() == 0


def test_a_worker_in_a_thread_takes_no_signals(place):
    place.script(
        """
        import signal, threading
        import dramalite
        import jobs

        before = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        with dramalite.Worker(jobs.broker, worker_threads=2):
            jobs.job.send(1)
            jobs.until(lambda: jobs.noted("ran") == 1)
            assert before == [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        assert before == [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        """
    )

    assert place.waiting() == 0


def test_ctrl_c_in_a_program_with_a_worker_ends_it_at_once(place):
    tree = place.start_script(
        """
        import dramalite
        import jobs

        with dramalite.Worker(jobs.broker, worker_threads=2):
            jobs.job.send(1)
            jobs.until(lambda: False, 600)
        """
    )
    place.wait_until(lambda: place.notes("ran", 1), "the worker in the program works")
    tree.signal(signal.SIGINT)

    assert tree.wait() in (1, -signal.SIGINT, 130)
    assert re.search("KeyboardInterrupt", tree.output())


def test_a_closed_broker_says_so_or_opens_again(place):
    place.script(
        """
        import jobs

        jobs.send(1)
        jobs.broker.close()
        jobs.broker.close()
        jobs.send(2)
        """
    )

    assert place.notes("stored", 1)
    assert_noted_is_stored(place, 2)


def test_a_broker_that_is_closed_again_and_again_while_its_worker_checkpoints_leaves_the_interpreter_alive(place):
    place.script(
        """
        import threading
        import dramalite
        import jobs

        with dramalite.Worker(jobs.broker, worker_threads=2):
            for number in range(3):  # Each is 12 MB of log, which the worker moves into the file soon.
                jobs.broker.enqueue_many([jobs.ping.message("x" * 200_000) for _ in range(60)])
                threading.Event().wait(0.05 + number / 20)  # So that some strike just then.
                jobs.broker.close()
        """
    )

    assert place.sound()


def test_a_connection_is_not_closed_while_a_checkpoint_uses_it(make_file_broker, worker, monkeypatch):
    connect, uses, harmed = sqlite3.connect, [], []
    begun, is_closed = threading.Event(), threading.Event()

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            is_senders = threading.current_thread() is threading.main_thread()
            if "wal_checkpoint" not in statement or is_senders or begun.is_set():
                return super().execute(statement, *values)
            uses.append(self)
            begun.set()
            is_closed.wait(3)
            uses.clear()
            return super().execute(statement, *values)

        def close(self):
            harmed.extend(use for use in uses if use is self)
            super().close()

    monkeypatch.setattr("sqlite3.connect", lambda *args, **options: connect(*args, factory=Connection, **options))
    broker = make_file_broker()
    job = dramalite.actor(lambda load: None, actor_name="job")
    worker(broker)
    broker.enqueue_many([job.message("x" * 200_000) for _ in range(60)])
    has_begun = begun.wait(DEADLINE)
    broker.close()
    is_closed.set()

    assert has_begun is True
    assert harmed == []
