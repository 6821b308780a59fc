"""fork() after use, with threads, and in jobs: parent and child go on, and nothing runs twice."""

from __future__ import annotations

import signal
import sys

import pytest

JOBS = """
    from pathlib import Path

    HERE = Path(JOURNAL).parent

    @dramalite.actor(max_retries=0)
    def job(number):
        note("ran", number, os.getpid())

    @dramalite.actor(max_retries=0)
    def forks(number, ending):
        note("forks", number)
        child = os.fork()
        if child == 0:
            if ending == "returns":
                return
            if ending == "raises":
                raise RuntimeError("in the child")
            if ending == "exits":
                sys.exit(3)
            if ending == "closes":
                dramalite.get_broker().close()
                os._exit(0)
        os.waitpid(child, 0)
        note("forked", number)

    @dramalite.actor(max_retries=0)
    def forks_and_goes_on(number):
        note("forks", number)
        child = os.fork()
        if child == 0:
            dramalite.get_broker().close()
            os._exit(0)
        os.waitpid(child, 0)
        until(lambda: (HERE / "release").exists())
        note("forked", number)

    @dramalite.actor(max_retries=0)
    async def forks_in_a_coroutine(number):
        child = os.fork()
        if child:
            note("forked", number)

    @dramalite.actor(max_retries=0, notify_shutdown=True, queue_name="told")
    def told(number):
        held(number)

    @dramalite.actor(max_retries=0)
    def held(number):
        note("held", number)
        until(lambda: (HERE / "release").exists())
        note("ended", number)

    def in_child(function, seconds=100):
        # Which must end well, and in time.
        child = os.fork()
        if child == 0:
            code = 1
            try:
                function()
                code = 0
            finally:
                os._exit(code)
        ended = [0, 0]

        def has_ended():
            ended[:] = os.waitpid(child, os.WNOHANG)
            return ended[0] == child

        try:
            until(has_ended, seconds)
        except RuntimeError:
            os.kill(child, signal.SIGKILL)
            raise
        assert ended[1] == 0

    @dramalite.actor(max_retries=0)
    def terminates(number):
        import multiprocessing
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(100)
        note("terminated", number, child.exitcode)
        child.kill()

    @dramalite.actor(max_retries=0)
    def uses_a_pool(number):
        import multiprocessing
        with multiprocessing.get_context("fork").Pool(2) as pool:
            note("pooled", number, *pool.map(abs, [-1, -2]))
"""


@pytest.fixture
def place(place):
    place.jobs(JOBS)
    return place


def test_parent_and_children_go_on_when_a_process_with_sending_threads_forks(place):
    tree = place.script(
        """
        import os, threading
        import jobs

        stop = threading.Event()
        counts = [0] * 4

        def keep_sending(index):
            while not stop.is_set():
                jobs.job.send(f"thread{index}-{counts[index]}")
                counts[index] += 1

        threads = [threading.Thread(target=keep_sending, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        jobs.until(lambda: all(counts))
        for child_number in range(8):
            child = os.fork()
            if child == 0:
                for number in range(3):
                    jobs.job.send(f"child{child_number}-{number}")
                os._exit(0)
            deadline = jobs.time.monotonic() + 25
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                assert jobs.time.monotonic() < deadline, "A child hangs."
                jobs.time.sleep(0.002)
            jobs.job.send(f"parent-{child_number}")
        stop.set()
        for thread in threads:
            thread.join()
        print("sent", sum(counts) + 8 * 3 + 8)
        """
    )

    assert place.waiting() == int(tree.output().split("sent")[1])
    assert place.sound()


def test_two_threads_that_fork_at_the_same_time_leave_sends_possible(place):
    # One of them naps between any two lines of what a fork calls here, so that the other one gets in between.
    tree = place.script(
        """
        import os, sys, threading, time
        import dramalite
        import jobs

        def nap(frame, event, argument):
            if frame.f_code.co_filename == dramalite.__file__:
                time.sleep(0.0001)
                return nap

        def fork(trace, times):
            sys.settrace(trace)
            for _ in range(times):
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)

        def keep_sending():
            while any(thread.is_alive() for thread in forking):
                jobs.job.send("meanwhile")

        jobs.job.send("before")
        sys.setswitchinterval(1e-5)
        forking = [threading.Thread(target=fork, args=args, daemon=True) for args in ((nap, 10), (None, 50))]
        sending = threading.Thread(target=keep_sending, daemon=True)
        for thread in (*forking, sending):
            thread.start()
        for thread in (*forking, sending):
            thread.join(100)
            assert not thread.is_alive(), "A thread hangs."
        jobs.ping.send("afterwards")
        """
    )

    assert "Exception ignored" not in tree.output()
    assert place.query("SELECT count(*) FROM dramalite_messages WHERE actor = 'ping'") == [(1,)]


def test_children_and_grandchildren_of_a_used_broker_can_send_and_end_normally(place):
    tree = place.script(
        """
        import multiprocessing, sys
        import jobs

        def grandchild():
            jobs.job.send("grandchild")

        def child(number):
            jobs.job.send(number)
            process = context.Process(target=grandchild)
            process.start()
            process.join(100)
            sys.exit(process.exitcode)

        context = multiprocessing.get_context("fork")
        jobs.job.send("parent")
        processes = [context.Process(target=child, args=(number,)) for number in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
        print("codes", [process.exitcode for process in processes])
        jobs.job.send("parent again")
        jobs.broker.close()
        """
    )

    assert "codes [0, 0, 0]" in tree.output()
    assert place.waiting() == 8
    assert place.sound()


def test_spawned_and_forkserver_children_can_send_too(place):
    tree = place.script(
        """
        import multiprocessing
        import jobs

        def child(number):
            jobs.job.send(number)

        if __name__ == "__main__":
            jobs.job.send("parent")
            for method in ("spawn", "forkserver"):
                process = multiprocessing.get_context(method).Process(target=child, args=(method,))
                process.start()
                process.join(100)
                print(method, process.exitcode)
        """
    )

    assert tree.output().split() == ["spawn", "0", "forkserver", "0"]
    assert place.waiting() == 3


def test_a_child_forked_inside_a_transaction_of_another_thread_is_not_stuck(place):
    # A foreign writer holds the file while threads wait for it; then the process forks.
    place.script(
        """
        import os, sqlite3, threading
        import jobs

        jobs.job.send("first")
        foreign = sqlite3.connect(os.environ["JOBS_DB"], isolation_level=None, check_same_thread=False)
        foreign.execute("BEGIN IMMEDIATE")
        threads = [threading.Thread(target=jobs.job.send, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        threading.Timer(0.4, foreign.execute, ["ROLLBACK"]).start()
        child = os.fork()
        if child == 0:
            jobs.job.send("child")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive()
        """
    )

    assert place.waiting() == 5


def test_a_fork_of_a_process_that_works_does_not_give_its_job_away(place):
    place.send("forks_and_goes_on", 1)
    place.worker()
    place.wait_until(lambda: place.notes("forks", 1), "the job forks")
    place.worker()
    place.send("job", 2, delay=2200)  # When this one runs, another worker had time to take over.
    place.wait_until(lambda: place.notes("ran", 2), "a worker works")
    (place.folder / "release").touch()
    place.drained()

    assert place.runs("forks") == place.runs("forked") == {"1": 1}


def test_a_process_forked_from_a_worker_does_not_work_and_does_not_keep_claims_alive(place):
    tree = place.script(
        """
        import os, threading
        import dramalite
        import jobs

        worker = dramalite.Worker(jobs.broker, worker_threads=2)
        worker.start()
        jobs.job.send("before")
        jobs.until(lambda: jobs.noted("ran") == 1)
        child = os.fork()
        if child == 0:
            jobs.job.send("child")
            os._exit(threading.active_count() != 1)
        assert os.waitpid(child, 0)[1] == 0
        jobs.until(lambda: jobs.noted("ran") == 2)
        worker.stop()
        print(os.getpid())
        """
    )

    assert place.runs("ran") == {"before": 1, "child": 1}
    assert {note[2] for note in place.notes("ran")} == {tree.output().split()[-1]}
    assert place.waiting() == 0


@pytest.mark.parametrize("call", ["stop", "pause", "join"])
def test_a_call_of_a_workers_method_in_a_forked_child_leaves_the_parents_job_alone(place, call):
    place.script(
        """
        import sys
        import dramalite
        import jobs

        worker = dramalite.Worker(jobs.broker, worker_threads=3)
        worker.start()
        jobs.held.send(1)
        jobs.until(lambda: jobs.noted("held") == 1)
        jobs.in_child(getattr(worker, sys.argv[1]))
        jobs.job.send(2)
        jobs.until(lambda: jobs.noted("ran") == 1)
        (jobs.HERE / "release").touch()
        jobs.broker.join("default", timeout=100_000)
        worker.stop()
        """,
        call,
    )

    assert place.runs("held") == place.runs("ended") == {"1": 1}


def test_a_forked_child_that_leaves_the_block_of_a_worker_leaves_the_parents_job_alone(place):
    place.script(
        """
        import sys
        import dramalite
        import jobs

        def work():
            with dramalite.Worker(jobs.broker, worker_threads=3):
                jobs.held.send(1)
                jobs.until(lambda: jobs.noted("held") == 1)
                if jobs.os.fork() == 0:
                    sys.exit(0)
                jobs.os.wait()
                jobs.job.send(2)
                jobs.until(lambda: jobs.noted("ran") == 1)
                (jobs.HERE / "release").touch()
                jobs.broker.join("default", timeout=100_000)

        work()
        """
    )

    assert place.runs("held") == place.runs("ended") == {"1": 1}


def test_a_consumer_that_is_closed_in_a_forked_child_keeps_its_messages_in_the_parent(place):
    place.script(
        """
        import jobs

        jobs.job.send(1)
        consumer = jobs.broker.consume("default", prefetch=1, timeout=10)
        held = next(consumer)
        jobs.in_child(consumer.close)
        other = jobs.broker.consume("default", prefetch=1, timeout=50)
        print("other:", next(other))
        other.close()
        consumer.ack(held)
        consumer.close()
        """
    )

    assert "other: None" in place.trees[-1].output()
    assert place.waiting() == 0


def test_a_worker_can_be_started_in_a_forked_child_whose_parent_has_one(place):
    place.script(
        """
        import os
        import dramalite
        import jobs

        with dramalite.Worker(jobs.broker, worker_threads=1):
            jobs.job.send(1)
            jobs.until(lambda: jobs.noted("ran") == 1)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    with dramalite.Worker(jobs.broker, worker_threads=1):
                        jobs.job.send(2)
                        jobs.until(lambda: jobs.noted("ran") == 2)
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
            jobs.job.send(3)
            jobs.until(lambda: jobs.noted("ran") == 3)
        """
    )

    assert place.runs("ran") == {"1": 1, "2": 1, "3": 1}
    assert place.waiting() == 0


def test_a_worker_in_a_forked_child_does_not_watch_the_time_limits_of_the_parents_jobs(place):
    place.script(
        """
        import threading
        import dramalite
        import jobs

        def work():
            with dramalite.Worker(jobs.broker, worker_threads=1):
                before = threading.active_count()
                jobs.job.send_with_options(args=(2,), time_limit=60_000)
                jobs.until(lambda: jobs.noted("ran") == 1)
                jobs.until(lambda: threading.active_count() == before)  # Nobody watches any more.

        with dramalite.Worker(jobs.broker, worker_threads=1):
            jobs.held.send(1)
            jobs.until(lambda: jobs.noted("held") == 1)
            jobs.in_child(work)
            (jobs.HERE / "release").touch()
            jobs.broker.join("default", timeout=100_000)
        """
    )

    assert place.runs("ran") == {"2": 1}


def test_a_worker_that_stops_in_a_forked_child_notifies_nobody_in_place_of_the_parents_jobs(place):
    # The child's threads get the identities of the parent's, which are not there.
    place.script(
        """
        import dramalite
        import jobs

        class Releases(dramalite.Middleware):
            def before_worker_shutdown(self, broker, worker):
                (jobs.HERE / "release").touch()

        def work():
            jobs.broker.add_middleware(Releases())  # After that which notifies.
            with dramalite.Worker(jobs.broker, worker_threads=4, queues=["default"]):
                for number in range(4):
                    jobs.held.send(f"child-{number}")
                jobs.until(lambda: jobs.noted("held") == 8)

        with dramalite.Worker(jobs.broker, worker_threads=4, queues=["told"]):
            for number in range(4):
                jobs.told.send(f"parent-{number}")
            jobs.until(lambda: jobs.noted("held") == 4)
            jobs.in_child(work)
            jobs.broker.join("told", timeout=100_000)
        """
    )

    assert sorted(place.runs("ended")) == [f"{who}-{number}" for who in ("child", "parent") for number in range(4)]


def test_a_forked_child_can_simulate_a_broker_on_which_its_parent_has_a_worker(place):
    place.script(
        """
        import dramalite
        import jobs

        def simulate():
            jobs.job.send(2)
            with dramalite.simulate(jobs.broker) as sim:
                sim.run_until_idle()
            jobs.note("simulated", *(event.outcome for event in sim.events))

        with dramalite.Worker(jobs.broker, worker_threads=1) as worker:
            jobs.job.send(1)
            jobs.broker.join("default", timeout=100_000)
            worker.pause()
            jobs.in_child(simulate)
        """
    )

    assert place.runs("ran") == {"1": 1, "2": 1}
    assert place.notes("simulated") == [["simulated", "done"]]


def test_a_child_that_a_coroutine_forks_ends_where_it_returns(place):
    place.send("forks_in_a_coroutine", 1)
    tree = place.worker(threads=2)
    place.wait_until(lambda: place.notes("forked", 1), "the coroutine comes back in the parent")
    place.drained()

    place.wait_until(lambda: len(tree.pids()) == 2, "no process but the supervisor and its worker stays")


@pytest.mark.parametrize("ending", ["returns", "raises", "exits", "closes"])
def test_a_job_that_forks_runs_once_however_its_child_ends(place, ending):
    place.send("forks", 1, ending)
    tree = place.worker(threads=2)
    place.wait_until(lambda: place.notes("forked", 1), "the job comes back from its child")
    place.drained()
    for number in range(20):
        place.send("job", number)
    place.drained()

    assert place.runs("forks") == place.runs("forked") == {"1": 1}
    assert place.runs("ran") == {str(number): 1 for number in range(20)}
    assert place.dead() == 0
    place.wait_until(lambda: len(tree.pids()) == 2, "no process but the supervisor and its worker stays")


def test_a_process_that_a_job_forks_can_be_terminated(place):
    place.send("terminates", 1)
    place.worker()
    place.drained()

    assert place.notes("terminated") == [["terminated", "1", str(-signal.SIGTERM)]]


def test_a_job_may_use_a_pool_of_forked_processes(place):
    place.send("uses_a_pool", 1)
    place.worker()
    place.drained()

    assert place.notes("pooled") == [["pooled", "1", "1", "2"]]


def test_children_are_forked_and_end_though_other_threads_of_the_program_are_inside_sqlite(place):
    tree = place.script(
        """
        import os, sqlite3, threading, time
        import jobs

        def use_sqlite():
            while not is_over.is_set():
                connection = sqlite3.connect(":memory:")
                connection.execute("CREATE TABLE numbers (number)")
                connection.executemany("INSERT INTO numbers VALUES (?)", [(number,) for number in range(50)])
                connection.close()

        jobs.job.send(0)
        is_over = threading.Event()
        threads = [threading.Thread(target=use_sqlite) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            child = os.fork()
            if child == 0:
                os._exit(0)
            deadline = time.monotonic() + 25
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    print("a child hangs", flush=True)
                    os.kill(child, 9)
                    os._exit(1)
                time.sleep(0.001)
        is_over.set()
        for thread in threads:
            thread.join()
        jobs.job.send(1)
        """
    )

    assert "hangs" not in tree.output()
    assert place.waiting() == 2


def test_what_a_child_sends_is_kept_though_its_parent_and_others_close_the_database(place):
    # The one that closes it last, as SQLite sees it, deletes the log.
    place.script(
        """
        import os, sqlite3, sys
        import jobs

        jobs.job.send("parent")
        child = os.fork()
        if child == 0:
            jobs.job.send("child")
        else:
            jobs.broker.close()
            os.waitpid(child, 0)
            sys.exit()
        for number in range(3):
            other = sqlite3.connect(jobs.broker.path)
            other.close()
            if os.fork() == 0:
                jobs.job.send(number)
                jobs.broker.close()
                os._exit(0)
            os.wait()
            jobs.job.send(f"child {number}")
        os._exit(0)
        """
    )

    assert place.waiting() == 8
    assert place.sound()


@pytest.mark.torture
@pytest.mark.skipif(sys.platform != "linux", reason="Open files are known as Linux has them.")
def test_no_child_inherits_a_connection_though_threads_move_the_log(place):
    tree = place.script(
        """
        import itertools, os, threading
        import jobs

        def send():
            while not is_over.is_set():
                jobs.job.send("x" * 3000)

        is_over = threading.Event()
        threads = [threading.Thread(target=send) for _ in range(2)]
        for thread in threads:
            thread.start()
        inherited = 0
        for _ in range(1500):
            child = os.fork()
            if child == 0:
                open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
                os._exit(any("-shm" in name for name in open_files))
            inherited += os.waitpid(child, 0)[1] != 0
        is_over.set()
        for thread in threads:
            thread.join()
        print("inherited", inherited)
        """,
        seconds=150,
    )

    assert "inherited 0" in tree.output()
