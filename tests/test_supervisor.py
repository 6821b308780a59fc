"""What the supervisor of `python -m dramalite worker` does: reloads, fork functions, log files."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import harness  # noqa: E402
from harness import kill  # noqa: E402

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")

JOBS = """
    from pathlib import Path

    HERE = Path(JOURNAL).parent

    @dramalite.actor(max_retries=0)
    def work(number):
        note("work", number, os.getpid())

    @dramalite.actor(max_retries=0)
    def held(number):
        note("held", number, os.getpid())
        until(lambda: (HERE / "release").exists())
        note("end", number)

    @dramalite.actor(max_retries=0)
    async def awaiting(number, others):
        import asyncio

        note("awaiting", number)
        while noted("awaiting") < others:
            await asyncio.sleep(0.01)
        note("end", number)

    @dramalite.actor(max_retries=0)
    def meet(number, others):
        note("meet", number)
        until(lambda: noted("meet") == others)
        note("met", number)

    def forked():
        note("forked", os.getpid())
        threading.Event().wait()

    def short():
        note("short", os.getpid())
        return 0

    def failing():
        note("failing", os.getpid())
        return 7

    def failing_thrice():
        note("forked", os.getpid())
        if noted("forked") > 3:
            threading.Event().wait()
        return 7

    class Forks(dramalite.Middleware):
        @property
        def forks(self):
            return [forked]
"""

#: Has the worker note when it begins nothing any more, for it stops.
TELLS = """
    class Tells(dramalite.Middleware):
        def before_worker_shutdown(self, broker, worker):
            note("stopping")

    broker.add_middleware(Tells())
"""

FORKING_JOBS = JOBS + "\n    dramalite.get_broker().add_middleware(Forks())\n"


@pytest.fixture
def place(tmp_path):
    with harness.new_place(tmp_path) as place:
        place.jobs("import threading\n" + textwrap.dedent(JOBS))
        yield place


def pids(place, word):
    """The processes that noted a word, in the order of their notes."""
    return [int(note[-1]) for note in place.notes(word)]


def worked_by(place, number):
    """Have a job done; the process that did it."""
    place.send("work", number)
    return int(place.wait_until(lambda: place.notes("work", number), f"job {number} runs")[0][2])


def reloaded(tree):
    return tree.output().count("Worker process is ready for action.")


# Reloading


def test_sighup_starts_worker_processes_anew_under_the_same_supervisor(place, tmp_path):
    pid_file = tmp_path / "worker.pid"
    tree = place.ready_worker("--pid-file", str(pid_file))
    before = worked_by(place, 1)
    tree.signal(signal.SIGHUP)
    place.wait_until(lambda: reloaded(tree) == 2, "another worker process is ready")
    after = worked_by(place, 2)

    assert after != before
    assert int(pid_file.read_text()) == tree.pid
    assert tree.alive()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()
    assert not pid_file.exists()


def test_a_reload_finishes_running_work_and_runs_new_code(place):
    place.jobs("import threading\n" + textwrap.dedent(JOBS + TELLS))
    tree = place.ready_worker(threads=1)
    place.send("held", 1)
    place.wait_until(lambda: place.notes("held", 1), "the job runs")
    place.send("work", 2)
    place.jobs("""
        @dramalite.actor(max_retries=0)
        def work(number):
            note("renewed", number)
    """)
    tree.signal(signal.SIGHUP)
    place.wait_until(lambda: place.notes("stopping"), "the worker knows")
    (place.folder / "release").touch()
    place.wait_until(lambda: place.notes("renewed", 2), "the new code runs what waited")

    assert place.runs("end") == {"1": 1}
    assert place.runs("held") == {"1": 1}


def test_a_reload_opens_log_files_that_were_moved_away_anew(place, tmp_path):
    log, moved = tmp_path / "worker.log", tmp_path / "worker.log.1"
    tree = place.worker("--log-file", str(log))
    place.wait_until(lambda: log.exists() and "ready" in log.read_text(), "the worker is ready")
    log.rename(moved)
    tree.signal(signal.SIGHUP)
    place.wait_until(lambda: log.exists() and "ready" in log.read_text(), "the new file has its lines")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0
    assert "Bye" in log.read_text()
    assert "Bye" not in moved.read_text()


def test_a_process_that_still_imports_is_not_given_the_time_of_running_messages(place):
    place.jobs("note('importing')\nimport time\ntime.sleep(600)")
    tree = place.worker(processes=1)
    place.wait_until(lambda: place.notes("importing"), "the process imports its module")
    tree.signal(signal.SIGTERM)

    tree.wait()
    assert tree.pids() == []


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Threads can't be signalled here.")
def test_a_signal_that_another_thread_of_the_supervisor_gets_stops_it_too(place):
    tree = place.start_script("""
        import os, signal, sys, threading

        import dramalite

        def stop():
            while not os.path.exists("ready"):
                threading.Event().wait(0.05)
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        threading.Thread(target=stop, daemon=True).start()
        sys.exit(dramalite.main(["worker", "jobs", "-p", "1"]))
    """)
    place.wait_until(lambda: "ready for action" in tree.output(), "the worker is ready")
    (place.folder / "ready").touch()

    assert tree.wait() == 0, tree.tail()


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Signals can't be blocked here.")
def test_a_supervisor_that_was_started_with_its_signals_blocked_can_be_stopped(place):
    tree = place.start_script(
        """
        import os, signal, sys

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        os.execv(sys.executable, [sys.executable, "-m", "dramalite", "worker", "jobs", "-p", "1", "-t", "1"])
        """
    )
    place.send("ping", 1)
    place.wait_until(lambda: place.notes("ping", 1), "the worker runs a message")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()


def test_broken_code_at_a_reload_ends_the_worker_with_2(place):
    tree = place.ready_worker()
    place.put("jobs.py", "raise ValueError('broken')\n")
    tree.signal(signal.SIGHUP)

    assert tree.wait() == 2, tree.tail()
    assert "broken" in tree.output()


@pytest.mark.parametrize("watch", [False, True])
def test_code_that_breaks_while_a_process_imports_the_old_one_is_no_crash(place, watch):
    place.jobs("note('importing')\nuntil(lambda: os.path.exists('go'))")
    tree = place.worker(*(["--watch", str(place.folder)] if watch else []))
    place.wait_until(lambda: place.notes("importing"), "the process imports its module")
    place.put("jobs.py", "raise ValueError('broken')\n")
    if not watch:
        tree.signal(signal.SIGHUP)
    place.wait_until(lambda: "Reloading" in tree.output(), "the supervisor reloads")
    (place.folder / "go").touch()

    if watch:
        place.wait_until(lambda: "waits for the next change" in tree.output(), "the failure is reported")
    else:
        assert tree.wait() == 2, tree.tail()
    assert "died with" not in tree.output()


def test_a_supervisor_whose_log_nobody_reads_any_more_reloads_and_stops(place, tmp_path):
    log = tmp_path / "log"
    os.mkfifo(log)
    tree = place.worker("--log-file", str(log), "--skip-logging")
    os.close(os.open(log, os.O_RDONLY))  # As soon as it is there.
    place.send("ping", 1)
    place.wait_until(lambda: place.notes("ping", 1), "the worker runs a ping")
    tree.signal(signal.SIGHUP)
    tree.signal(signal.SIGTERM)

    tree.wait()


def test_a_log_file_that_cannot_be_opened_anew_costs_no_descriptors(place, tmp_path):
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    tree = place.worker(*(word for log in logs for word in ("--log-file", str(log))))
    place.wait_until(lambda: logs[0].exists() and "ready" in logs[0].read_text(), "the worker is ready")
    logs[1].unlink()
    logs[1].mkdir()
    counts = []
    for number in range(1, 4):
        tree.signal(signal.SIGHUP)
        place.wait_until(lambda number=number: logs[0].read_text().count("can't be opened anew") == number, "it is said")
        place.wait_until(lambda number=number: logs[0].read_text().count("ready") == number + 1, "it goes on")
        open_files = [os.readlink(path) for path in Path(f"/proc/{tree.pid}/fd").iterdir() if path.is_symlink()]
        counts.append(open_files.count(str(logs[0])))

    assert counts == [1, 1, 1]


def test_a_reload_needs_no_notes_that_a_cleaner_of_old_files_left(place, tmp_path):
    notes = tmp_path / "tmp"
    notes.mkdir()
    tree = place.ready_worker("-f", "jobs:forked", TMPDIR=str(notes))
    place.wait_until(lambda: place.notes("forked"), "the fork function is called")
    [folder] = notes.iterdir()
    shutil.rmtree(folder)
    tree.signal(signal.SIGHUP)
    place.wait_until(lambda: len(pids(place, "forked")) == 2, "it is called again once a new worker process is ready")

    assert worked_by(place, 1) in tree.children()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()


# Watching


def test_a_changed_source_file_reloads(place):
    tree = place.ready_worker("--watch", str(place.folder))
    place.jobs("""
        @dramalite.actor(max_retries=0)
        def work(number):
            note("changed", number)
    """)
    place.wait_until(lambda: reloaded(tree) == 2, "the workers are started anew")
    place.send("work", 1)

    place.wait_until(lambda: place.notes("changed", 1), "the new code runs")
    assert "jobs.py" in tree.output()


def test_a_watched_module_that_breaks_is_waited_for(place):
    tree = place.ready_worker("--watch", str(place.folder))
    whole = (place.folder / "jobs.py").read_text()
    place.put("jobs.py", "raise ValueError('typo')\n")
    place.wait_until(lambda: "waits for the next change" in tree.output(), "the failure is reported")
    assert "ValueError: typo" in tree.output()
    place.put("jobs.py", whole + "\n")

    place.wait_until(lambda: reloaded(tree) == 2, "the mended module is loaded")
    assert worked_by(place, 1)
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()


def test_a_worker_that_waits_for_a_change_can_be_stopped(place):
    tree = place.ready_worker("--watch", str(place.folder))
    place.put("jobs.py", "raise ValueError('typo')\n")
    place.wait_until(lambda: "waits for the next change" in tree.output(), "the failure is reported")
    tree.signal(signal.SIGTERM)

    tree.wait()
    assert tree.pids() == []


# Fork functions


def test_a_fork_function_runs_in_one_process_of_its_own(place):
    tree = place.ready_worker("--fork-function", "jobs:forked", processes=2)
    pid = int(place.wait_until(lambda: place.notes("forked"), "the function is called")[0][1])

    assert pid in tree.children()
    assert len(tree.children()) == 3
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()
    assert pids(place, "forked") == [pid]


def test_a_fork_function_runs_once_a_worker_process_does_and_no_signal_is_blocked(place):
    place.jobs("""
        import pathlib

        note("imported")

        def forked():
            note("forked", len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
            return 0

        class Ready(dramalite.Middleware):
            def before_worker_boot(self, broker, worker):
                note("ready")

        broker.add_middleware(Ready())
    """)
    place.worker("--fork", "jobs:forked")
    place.wait_until(lambda: place.notes("forked"), "the function is called")
    words = [note[0] for note in place.notes()]

    assert words.index("ready") < words.index("forked")
    assert place.notes("forked") == [["forked", "0"]]


def test_a_fork_function_does_not_wait_longer_than_it_is_told(place):
    (place.folder / "side.py").write_text("def forked():\n    open('forked', 'w').close()\n    return 0\n")
    place.jobs("until(lambda: os.path.exists('forked'))")
    tree = place.worker("--fork-function", "side:forked", "--worker-fork-timeout", "100", processes=2)

    place.wait_until(lambda: (place.folder / "forked").exists(), "the function is called before a worker is ready")
    place.wait_until(lambda: reloaded(tree) == 2, "both worker processes are ready")


def test_a_fork_function_that_is_no_function_ends_the_start(place):
    place.jobs("forked = 3")
    tree = place.worker("--fork-function", "jobs:forked")

    assert tree.wait() == 2
    assert "'jobs:forked' is not a function: 3." in tree.output()


def test_a_fork_function_that_returns_0_has_ended(place):
    tree = place.ready_worker("-f", "jobs:short", "-f", "jobs:forked")
    place.wait_until(lambda: "jobs:short has ended" in tree.output(), "its end is reported")
    place.wait_until(lambda: place.notes("forked"), "the other function is called, too")
    worked_by(place, 1)

    assert len(pids(place, "short")) == 1
    assert len(tree.children()) == 2


def test_a_fork_function_that_dies_is_started_again(place):
    tree = place.ready_worker("-f", "jobs:forked")
    first = int(place.wait_until(lambda: place.notes("forked"), "the function is called")[0][1])
    kill(first)
    place.wait_until(lambda: len(pids(place, "forked")) == 2, "it is called again")

    assert re.search(r"jobs:forked.*died with SIGKILL", tree.output())


def test_a_fork_function_that_returns_another_number_is_started_again(place):
    tree = place.ready_worker("-f", "jobs:failing")

    place.wait_until(lambda: len(pids(place, "failing")) >= 2, "it is called again")
    assert "died with exit code 7" in tree.output()


@pytest.mark.parametrize("number", [150, -1])
def test_a_fork_function_that_returns_any_number_does_not_end_the_service(place, number):
    place.jobs(f"def leaving():\n    note('leaving')\n    return {number}\n")
    tree = place.worker("-f", "jobs:leaving")
    place.wait_until(lambda: not tree.alive() or len(place.notes("leaving")) >= 2, "it is called again")

    assert tree.alive() is True


def test_a_fork_function_that_exits_with_a_text_has_failed_for_that_reason(place):
    place.jobs("def leaving():\n    sys.exit('tired of this')\n")
    tree = place.worker("-f", "jobs:leaving")
    place.wait_until(lambda: re.search("jobs:leaving.*(died|has ended)", tree.output()), "its end is reported")

    assert "tired of this" in tree.output()
    assert "died with exit code 1" in tree.output()


def test_a_fork_function_that_cannot_be_found_ends_the_worker_with_2(place):
    tree = place.worker("-f", "jobs:nothing")

    assert tree.wait() == 2, tree.tail()
    assert "does not define a 'nothing' variable" in tree.output()


def test_the_forks_of_middleware_are_called_once_whatever_the_number_of_processes(place):
    place.jobs("import threading\n" + textwrap.dedent(FORKING_JOBS))
    tree = place.ready_worker(processes=2)
    place.wait_until(lambda: place.notes("forked"), "the function is called")
    place.wait_until(lambda: reloaded(tree) == 2, "both worker processes are ready")

    assert len(tree.children()) == 3
    assert len(pids(place, "forked")) == 1


def test_a_reload_calls_fork_functions_anew(place):
    tree = place.ready_worker("-f", "jobs:forked")
    first = int(place.wait_until(lambda: place.notes("forked"), "the function is called")[0][1])
    tree.signal(signal.SIGHUP)
    place.wait_until(lambda: len(pids(place, "forked")) == 2, "it is called again")
    place.wait_until(lambda: first not in tree.children(), "the first one is gone")

    assert pids(place, "forked")[1] in tree.children()


def test_fork_functions_leave_when_their_supervisor_is_killed(place):
    tree = place.ready_worker("-f", "jobs:forked")
    place.wait_until(lambda: place.notes("forked"), "the function is called")
    kill(tree.pid)

    place.wait_until(lambda: not tree.pids(), "nothing is left")


# Without a command line


@pytest.mark.parametrize("given", ['["worker", "jobs", "-p", "1", "-t", "3"]', "parsed"])
def test_a_program_of_its_own_can_be_the_supervisor(place, given):
    tree = place.start_script(
        f"""
        import sys
        import dramalite

        parsed = dramalite.make_argument_parser().parse_args(["jobs", "--processes", "1", "--threads", "3"])
        if __name__ == "__main__":
            sys.exit(dramalite.main({given}))
        """
    )
    for number in range(3):
        place.send("meet", number, 3)
    place.wait_until(lambda: len(place.notes("met")) == 3, "three threads of a worker process meet")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()


def test_a_program_has_its_signal_handlers_back_after_main(place):
    place.script(
        """
        import signal
        import dramalite

        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD]
        for number in numbers:
            signal.signal(number, lambda *_: None)
        before = [signal.getsignal(number) for number in numbers]
        assert dramalite.main(["worker", "jobs", "-p", "0"]) == 0
        assert [signal.getsignal(number) for number in numbers] == before
        """
    )


def test_a_supervisor_that_finds_no_thread_or_process_left_for_a_child_tries_again(place):
    tree = place.start_script(
        """
        import subprocess, sys, threading
        import dramalite

        def failing_once(function, error):
            def call(*args, **kwargs):
                if errors:
                    raise errors.pop()
                return function(*args, **kwargs)

            errors = [error]
            return call

        if __name__ == "__main__":
            dramalite._RESTART_DELAYS_S = (0.0,)  # It would wait for 30 s.
            threading.Thread.start = failing_once(threading.Thread.start, RuntimeError("no thread left"))
            subprocess.Popen = failing_once(subprocess.Popen, OSError("no process left"))
            sys.exit(dramalite.main(["worker", "jobs", "-p", "1", "-t", "1"]))
        """
    )

    assert worked_by(place, 1) in tree.children()
    assert re.search("no thread left.*\n.*no process left", tree.output())
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()


def test_children_are_told_apart_though_the_caller_ignored_their_ends(place):
    (place.folder / "broken.py").write_text("raise ValueError('broken')\n")
    tree = place.start_script(
        """
        import os, signal, sys

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, "-m", "dramalite", "worker", "broken", "-p", "1"])
        """
    )

    assert tree.wait() == 2, tree.tail()


# Logging


def test_several_log_files_get_the_same(place, tmp_path):
    logs = [tmp_path / name for name in ("a.log", "b.log", "c.log")]
    arguments = [word for log in logs for word in ("--log-file", str(log))]
    tree = place.worker(*arguments)
    place.wait_until(lambda: logs[0].exists() and "ready" in logs[0].read_text(), "the worker is ready")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0
    assert "Bye" in logs[0].read_text()
    assert logs[0].read_text() == logs[1].read_text() == logs[2].read_text()


def test_a_job_may_print_when_its_supervisor_and_with_it_the_log_is_gone(place, tmp_path):
    place.jobs("""
        class Stop(dramalite.Middleware):
            def before_worker_shutdown(self, broker, worker):
                note("stopping")

        broker.add_middleware(Stop())

        @dramalite.actor(max_retries=0)
        def talk():
            note("talking")
            until(lambda: noted("stopping"))
            print("Is anybody there?", flush=True)
            note("talked")
    """)
    place.send("talk")
    tree = place.worker("--log-file", str(tmp_path / "a.log"), "--log-file", str(tmp_path / "b.log"))
    place.wait_until(lambda: place.notes("talking"), "the job runs")
    kill(tree.pid)
    place.wait_until(lambda: not tree.pids(), "nothing is left")

    assert place.notes("talked")
    assert (place.waiting(), place.dead()) == (0, 0)


def test_a_log_file_serves_where_standard_error_is_closed(place, tmp_path):
    log = tmp_path / "worker.log"
    command = [sys.executable, "-m", "dramalite", "worker", "jobs", "-p", "1", "-t", "1", "--log-file", str(log)]
    tree = place.start(["sh", "-c", 'exec "$0" "$@" 2>&-', *command])

    assert worked_by(place, 1) in tree.children()
    assert "ready for action" in log.read_text()
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0
    assert "Bye" in log.read_text()


def test_a_log_file_that_cannot_be_opened_ends_with_2(place, tmp_path):
    tree = place.worker("--log-file", str(tmp_path / "none" / "a.log"))

    assert tree.wait() == 2
    assert "log file" in tree.output()


def test_long_entries_of_several_processes_stay_whole_in_a_pipe(place):
    place.jobs("""
        import logging

        @dramalite.actor
        def talk(letter):
            note("talk", letter)
            until(lambda: noted("talk") == 2)
            for _ in range(150):
                logging.getLogger("talk").info("<%s>", letter * 20_000)
            note("done", letter)
            until(lambda: noted("done") == 2)
            logging.getLogger("talk").info("over")
    """)
    for letter in "ab":
        place.send("talk", letter)
    command = [sys.executable, "-m", "dramalite", "worker", "jobs", "-p", "2", "-t", "1"]
    with subprocess.Popen(
        command, cwd=place.folder, env=place.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        ended = threading.Timer(harness.DEADLINE, process.kill)
        ended.start()
        said = []
        for line in process.stderr:
            said.append(line)
            if sum(line.endswith(" over\n") for line in said[-10:]) == 2:
                break
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        ended.cancel()
    entries = [line for line in said if "<" in line or ">" in line]

    assert len(entries) == 300
    assert [line[:200] for line in entries if not re.search(r" <(a+|b+)>\n$", line)] == []


def test_where_no_folder_for_notes_can_be_made_the_start_fails_with_the_reason(place):
    tree = place.start_script("""
        import sys, tempfile

        def fail(**_options):
            raise FileNotFoundError("No usable temporary directory found")

        tempfile.TemporaryDirectory = fail
        import dramalite

        sys.exit(dramalite.main(["worker", "jobs"]))
    """)

    assert tree.wait() == 2, tree.tail()
    assert "TMPDIR" in tree.output()
    assert "Traceback" not in tree.output()


def test_a_child_that_cannot_start_is_known_by_its_launcher_too(place):
    # As a virtual environment's python.exe on Windows is one, which runs Python as a child.
    launcher = place.folder / "launcher"
    launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n')
    launcher.chmod(0o700)
    tree = place.start_script(f"""
        import sys

        sys.executable = {str(launcher)!r}
        import dramalite

        sys.exit(dramalite.main(["worker", "nosuch", "-p", "1"]))
    """)

    assert tree.wait() == 2, tree.tail()
    assert "died with" not in tree.output()


def test_a_python_that_does_not_know_where_it_is_is_told_how_to_start(place):
    tree = place.start_script("""
        import sys

        sys.executable = ""
        import dramalite

        sys.exit(dramalite.main(["worker", "jobs"]))
    """)

    assert tree.wait() == 2, tree.tail()
    assert "start it by its path" in tree.output()


def test_a_programs_own_mistake_in_logging_is_told(place):
    place.jobs("""
        import logging

        @dramalite.actor
        def log():
            logging.getLogger("mine").info("100%y", 1)
            note("logged")
    """)
    tree = place.worker()
    place.send("log")
    place.wait_until(lambda: place.notes("logged"), "the job runs")

    place.wait_until(lambda: "--- Logging error ---" in tree.output(), "the mistake is told")


def test_skip_logging_leaves_the_log_to_the_modules(place):
    tree = place.worker("--skip-logging")
    worked_by(place, 1)
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0
    assert "ready for action" not in tree.output()
    assert "booting" not in tree.output()


# Other options


def test_async_concurrency_is_the_number_of_coroutines_at_once(place):
    tree = place.worker("--async-concurrency", "3", threads=1)
    for number in range(3):
        place.send("awaiting", number, 3)

    place.drained()
    assert place.runs("end") == {"0": 1, "1": 1, "2": 1}
    assert tree.alive()


def test_a_queue_filter_and_options_that_are_always_so_are_accepted(place):
    tree = place.ready_worker("--use-spawn", "--watch-use-polling", "--worker-fork-timeout", "500")

    assert worked_by(place, 1) in tree.children()


#: Arguments, and what the refusal names.
BAD_VALUES = {
    "--watch no-such-folder": "no-such-folder",
    "--watch jobs.py": "jobs.py",
    "--worker-fork-timeout 9": "10 ms",
    "--worker-fork-timeout 1800001": "30 minutes",
    "--worker-fork-timeout soon": "soon",
    "--fork-function jobs": "MODULE:FUNCTION",
    "--async-concurrency 0": "async-concurrency",
    "-t 0": "'0' is not a whole number from 1 on",
    "-p x": "'x' is not a whole number from 0 on",
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What comes of BAD_VALUES."""
    with harness.new_place(tmp_path_factory.mktemp("refusals")) as place:
        commands = [["worker", "jobs", "-p", "1", "-t", "2", *arguments.split()] for arguments in BAD_VALUES]
        return dict(zip(BAD_VALUES, place.endings(commands), strict=True))


@pytest.mark.parametrize("arguments", BAD_VALUES)
def test_bad_values_end_with_2_and_are_named(refusals, arguments):
    code, output = refusals[arguments]

    assert code == 2
    assert BAD_VALUES[arguments] in output
    assert "Traceback" not in output


def test_no_processes_end_with_0_at_once(place):
    tree = place.worker(processes=0)

    assert tree.wait() == 0, tree.tail()


def test_the_supervisor_leaves_no_files_behind(place, tmp_path):
    notes = tmp_path / "tmp"
    notes.mkdir()
    tree = place.ready_worker("-f", "jobs:forked", TMPDIR=str(notes))
    place.wait_until(lambda: place.notes("forked"), "the function is called")
    assert os.listdir(notes)
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0
    assert os.listdir(notes) == []


@pytest.mark.skipif(sys.platform == "win32", reason="kills")
def test_what_a_killed_supervisor_left_behind_is_removed_by_the_next_and_what_the_living_have_is_not(place, tmp_path):
    notes = tmp_path / "tmp"
    notes.mkdir()
    first = place.ready_worker(TMPDIR=str(notes))
    [left] = os.listdir(notes)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    place.wait_until(lambda: not first.pids(), "its children leave")
    for name in os.listdir(notes / left):
        os.utime(notes / left / name, (0, 0))
    place.ready_worker(TMPDIR=str(notes))
    [living] = os.listdir(notes)
    place.ready_worker(TMPDIR=str(notes))
    place.wait_until(lambda: len(os.listdir(notes)) == 2, "the second one has its folder too")

    assert left != living
    assert living in os.listdir(notes)


# Stops at odd moments


def test_a_stop_does_not_wait_for_what_is_to_be_started_again(place):
    tree = place.ready_worker("--fork-function", "jobs:failing_thrice")
    place.send("held", 1)
    place.wait_until(lambda: place.notes("held"), "a job runs that holds the worker process")
    place.wait_until(lambda: "starting another in 1.0 s" in tree.output(), "it is to be started a fourth time")
    tree.signal(signal.SIGTERM)
    place.wait_until(lambda: "SIGTERM" in tree.output(), "it stops")
    before = {*pids(place, "forked"), *tree.pids()}  # One may have been started before the signal came.
    harness.let_pass(1.5)  # After which it would be started once more.
    (place.folder / "release").touch()

    assert tree.wait() == 0
    assert {*pids(place, "forked")} <= before


def test_sigterm_for_all_while_they_start_is_a_stop(place):
    for moment in (0.0, 0.03, 0.08, 0.15):
        tree = place.worker(processes=2)
        place.wait_until(lambda tree=tree: "booting up" in tree.output(), "it starts")
        harness.let_pass(moment)
        os.killpg(tree.pid, signal.SIGTERM)
        assert tree.wait() == 0, tree.tail()


def test_a_worker_process_whose_worker_a_job_has_stopped_is_replaced(place):
    place.jobs("""
    class Keeps(dramalite.Middleware):
        def after_worker_boot(self, broker, worker):
            self.worker = worker

    keeps = Keeps()
    broker.add_middleware(keeps)

    @dramalite.actor(max_retries=0)
    def stop():
        note("stop")
        keeps.worker.stop()
    """)
    tree = place.ready_worker()
    place.send("stop")
    place.wait_until(lambda: place.notes("stop"), "the job has stopped the worker")
    place.send("ping", "after")
    place.wait_until(lambda: place.notes("ping", "after"), "another process works on")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0


HANGS = """
    class Hangs(dramalite.Middleware):
        def before_worker_shutdown(self, broker, worker):
            note("hangs")
            until(lambda: False, 300)

    broker.add_middleware(Hangs())
"""


def test_an_orphan_whose_hook_hangs_ends(place):
    place.jobs(HANGS)
    tree = place.ready_worker()
    kill(tree.pid)
    place.wait_until(lambda: place.notes("hangs"), "its worker process leaves")
    place.wait_until(lambda: not tree.pids(), "it ends all the same")


@pytest.mark.torture
def test_a_worker_process_whose_hook_hangs_is_killed_after_its_timeout(place):
    place.jobs(HANGS)
    tree = place.ready_worker("--worker-shutdown-timeout", "100")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 1
    assert tree.pids() == []
