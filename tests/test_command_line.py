"""`python -m dramalite worker`: options, exit codes, signals, and processes that die."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import harness  # noqa: E402
from harness import kill  # noqa: E402

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")

JOBS = """
    import asyncio
    import contextlib
    import logging
    from pathlib import Path

    HERE = Path(JOURNAL).parent

    @dramalite.actor(max_retries=0)
    def work(number, seconds):
        note("start", number, os.getpid(), time.monotonic())
        time.sleep(seconds)
        note("end", number)

    @dramalite.actor(max_retries=0)
    def held(number):
        note("start", number, os.getpid(), time.monotonic())
        until(lambda: (HERE / "release").exists())
        note("end", number)

    @dramalite.actor(max_retries=0)
    async def stubborn(number):
        note("start", number, os.getpid(), time.monotonic())
        while not (HERE / "release").exists():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.02)
        note("end", number)

    @dramalite.actor(max_retries=0, max_crashes=1)
    def fragile(number):
        note("start", number, os.getpid())
        until(lambda: (HERE / "release").exists())
        note("end", number)

    @dramalite.actor(max_retries=0, on_crash="fail")
    def once(number):
        fragile(number)

    @dramalite.actor(max_retries=0)
    def meet(number, others):
        note("met", number, os.getpid())
        until(lambda: noted("met") >= others)
        note("end", number)

    @dramalite.actor(max_retries=0, queue_name="mail")
    def mail(number):
        note("mail", number)

    @dramalite.actor(max_retries=0)
    def talk(words):
        print(f"on stdout: {words}", flush=True)  # In one write, so that nothing comes between.
        print(f"on stderr: {words}", file=sys.stderr, flush=True)
        logging.getLogger("jobs").info("in the log: %s", words)
        note("talked")
"""


#: Has the worker note when it begins nothing any more, for it stops.
TELLS = """
    class Tells(dramalite.Middleware):
        def before_worker_shutdown(self, broker, worker):
            note("stopping")

    broker.add_middleware(Tells())
"""


@pytest.fixture
def place(tmp_path):
    with harness.new_place(tmp_path) as place:
        place.jobs(JOBS)
        yield place


def dramalite(place, *arguments, **extra):
    """Run the command line to its end."""
    command = [sys.executable, "-m", "dramalite", *map(str, arguments)]
    return subprocess.run(
        command, cwd=place.folder, env=place.environment(**extra), capture_output=True, text=True, timeout=120
    )


def started(place, number):
    """Wait for the start of a job; the process that runs it."""
    note = place.wait_until(lambda: place.notes("start", number), f"job {number} starts")[0]
    return int(note[2])


# Arguments


@pytest.mark.parametrize("arguments", [["--version"], ["worker", "--version"]], ids=" ".join)
def test_the_version_goes_to_stdout(place, arguments):
    import dramalite as module

    result = dramalite(place, *arguments)

    assert (result.returncode, result.stderr) == (0, "")
    assert module.__version__ in result.stdout


def test_help_names_every_option(place):
    result = dramalite(place, "worker", "--help")

    assert result.returncode == 0
    options = (
        "--processes --threads --queues --path --pid-file --log-file --verbose --version --worker-shutdown-timeout "
        "--skip-logging --async-concurrency --fork-function --worker-fork-timeout --watch --watch-include "
        "--watch-exclude --watch-use-polling --use-spawn"
    )
    assert [option for option in options.split() if option not in result.stdout] == []


@pytest.mark.parametrize("arguments", [[], ["worker", "jobs.py"]], ids=lambda arguments: " ".join(arguments) or "nothing")
def test_bad_arguments_end_with_2_and_the_usage(place, arguments):
    tree = place.start([sys.executable, "-m", "dramalite", *arguments])

    assert tree.wait() == 2, tree.tail()
    assert "usage:" in tree.output().lower()
    assert "Traceback" not in tree.output()


BAD_ARGUMENTS = {
    " ".join(arguments): arguments
    for arguments in [
        ["wrok"],
        ["worker"],
        ["worker", "jobs", "--no-such-option"],
        ["worker", "jobs", "--processes", "many"],
        ["worker", "jobs", "--processes", "-1"],
        ["worker", "jobs", "--threads", "0"],
        ["worker", "jobs", "--threads", "-4"],
        ["worker", "jobs", "--threads", "1000"],
        ["worker", "./jobs"],
        ["worker", "__main__"],
        ["worker", "jobs", "--worker-shutdown-timeout", "soon"],
        ["worker", "jobs", "--worker-shutdown-timeout", "-5"],
    ]
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What comes of BAD_ARGUMENTS, by their names."""
    with harness.new_place(tmp_path_factory.mktemp("refusals")) as place:
        return dict(zip(BAD_ARGUMENTS, place.endings(list(BAD_ARGUMENTS.values())), strict=True))


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_all_bad_arguments_end_with_2_and_the_usage(refusals, name):
    code, output = refusals[name]

    assert code == 2, output
    assert "usage:" in output.lower()
    assert "Traceback" not in output


def test_the_worker_ends_with_0_when_stopped_while_idle(place):
    tree = place.ready_worker()
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()
    assert tree.pids() == []


# What is imported


def test_a_module_that_fails_is_reported_once_and_not_tried_again(place):
    place.jobs("note('imported')\nraise ValueError('-'.join(['no', 'way']))")
    tree = place.worker("--threads", "1")

    assert tree.wait() == 2, tree.tail()
    assert len(place.notes("imported")) == 1
    assert tree.output().count("no-way") == 1
    assert "jobs" in tree.output()


def test_several_processes_that_cannot_import_end_once_and_for_all(place):
    place.jobs("note('imported')\nraise ValueError('-'.join(['no', 'way']))")
    tree = place.worker(processes=3)

    assert tree.wait() == 2, tree.tail()
    assert 1 <= len(place.notes("imported")) <= 3
    assert tree.pids() == []


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("no_such_module", "There is no module 'no_such_module' in "),
        ("jobs:nothing", "Module 'jobs' does not define a 'nothing' variable."),
        ("jobs:JOURNAL", "'jobs:JOURNAL' is not a Broker."),
        ("broken", "broken"),
        ("leaves", "leaves"),
        ("cancelled", "CancelledError"),
        ("lacks", 'lacks.py", line 2'),
    ],
)
def test_what_cannot_be_imported_is_named(place, target, named):
    (place.folder / "lacks.py").write_text("import sys\nimport no_such_module\n")
    (place.folder / "broken.py").write_text("def (:\n")
    (place.folder / "leaves.py").write_text("import sys\nsys.exit('leaving')\n")
    (place.folder / "cancelled.py").write_text("import asyncio\nraise asyncio.CancelledError\n")
    tree = place.worker(module=target)

    assert tree.wait() == 2, tree.tail()
    assert named in tree.output()


@pytest.mark.parametrize("target", ["no_such_module", "jobs.no_such_module", "jobs:nothing", "jobs:JOURNAL"])
def test_a_mistake_in_the_command_is_told_without_a_traceback(place, target):
    tree = place.worker(module=target)

    assert tree.wait() == 2, tree.tail()
    assert "Traceback" not in tree.output()


def test_a_broker_can_be_named_by_its_attribute(place):
    place.jobs(
        """
        class Settings:
            second = dramalite.SQLiteBroker(os.path.join(os.path.dirname(JOURNAL), "second.db"))

        @dramalite.actor(broker=Settings.second, max_retries=0)
        def second(number):
            note("second", number)
        """
    )
    place.script("import jobs; jobs.second.send(1)")
    place.worker(module="jobs:Settings.second")

    place.wait_until(lambda: place.notes("second", 1), "the worker serves the named broker")


def test_a_callable_is_called_and_the_broker_it_sets_is_served(place):
    place.jobs("def set_up():\n    note('set', 'up')\n    dramalite.set_broker(broker)\n")
    place.ready_worker(module="jobs:set_up")

    assert place.notes("set", "up")


def test_further_modules_are_imported(place):
    (place.folder / "more.py").write_text("import jobs\n\n@jobs.dramalite.actor\ndef extra():\n    jobs.note('extra')\n")
    place.start([sys.executable, "-m", "dramalite", "worker", "jobs", "more", "--processes", "1", "--threads", "1"])
    place.send("extra")

    place.wait_until(lambda: place.notes("extra"), "the actor of the second module runs")


def test_modules_are_found_on_the_given_path(place, tmp_path):
    far = tmp_path / "far away"
    far.mkdir()
    (far / "distant.py").write_text("from jobs import *\n\n@dramalite.actor\ndef reach():\n    note('reached')\n")
    place.worker("--path", str(place.folder), str(far), module="distant")
    place.send("reach")

    place.wait_until(lambda: place.notes("reached"), "the actor of the distant module runs")


def test_a_broker_that_cannot_connect_ends_with_3(place):
    place.jobs("raise dramalite.ConnectionFailed('the line is dead')")
    tree = place.worker()

    assert tree.wait() == 3, tree.tail()
    assert "the line is dead" in tree.output()


def test_a_path_that_cannot_be_a_database_ends_with_3_and_is_named(place):
    place.db.mkdir()
    tree = place.worker()

    assert tree.wait() == 3, tree.tail()
    assert str(place.db) in tree.output()
    assert "sqlite3.OperationalError" not in tree.output().splitlines()[-1]


def test_of_several_paths_the_last_one_is_searched_first(place, tmp_path):
    for name in ("first", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who.py").write_text(f"import jobs\njobs.note('imported', {name!r})\n")
    place.worker("--path", str(place.folder), str(tmp_path / "first"), str(tmp_path / "last"), module="who")

    place.wait_until(lambda: place.notes("imported", "last"), "the module of the last folder is imported")


def test_a_program_may_run_the_command_itself(place):
    tree = place.start_script(
        "import sys, dramalite; sys.exit(dramalite.main(['worker', 'jobs', '-p', '1', '-t', '1']))"
    )
    place.send("ping", 1)
    place.wait_until(lambda: place.notes("ping", 1), "its worker process runs a job")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()


def test_the_processes_of_a_program_find_what_it_finds_beside_itself(place):
    program = place.folder / "program"
    program.mkdir()
    shutil.copy(harness.MODULE, program)
    (place.folder / "jobs.py").rename(program / "jobs.py")
    (program / "run.py").write_text("import dramalite\ndramalite.main(['worker', 'jobs', '-p', '1', '-t', '1'])\n")
    place.start([sys.executable, str(program / "run.py")], PYTHONPATH="")
    place.send("ping", 1)

    place.wait_until(lambda: place.notes("ping", 1), "its worker process runs a job")


COMMAND = ["worker", "jobs", "-p", "1", "-t", "1"]


@pytest.mark.parametrize(
    ("change", "call", "arguments"),
    [
        (f"sys.argv[1:] = {COMMAND}", "main()", ["of", "its", "own"]),
        ("os.chdir(os.path.join(os.path.dirname(__file__), 'elsewhere'))", "main()", COMMAND),
        ("os.chdir('elsewhere')", "main()", COMMAND),
        ("sys.frozen, sys.executable = True, os.path.abspath('program')", "main()", COMMAND),
        ("sys.frozen, sys.executable = True, os.path.abspath('program')", f"main({COMMAND})", ["of", "its", "own"]),
    ],
    ids=[
        "sets its arguments",
        "changes its folder",
        "changes to a folder beside",
        "frozen",
        "frozen, with arguments of its own",
    ],
)
def test_a_program_starts_workers_and_not_itself_again_and_again(place, change, call, arguments):
    (place.folder / "elsewhere").mkdir()
    (place.folder / "program.py").write_text(
        "import os, sys\n"
        "os.environ['DEPTH'] = str(int(os.environ.get('DEPTH', 0)) + 1)\n"
        "if int(os.environ['DEPTH']) > 3:\n"
        "    sys.exit('It starts itself again and again.')\n"
        "import dramalite\n"
        "if __name__ == '__main__':\n"
        f"    {change}\n"
        f"    sys.exit(dramalite.{call})\n"
    )
    program = place.folder / "program"  # What the executable of a frozen program is.
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' program.py \"$@\"\n")
    program.chmod(0o755)
    place.send("ping", 1)
    tree = place.start([sys.executable, "program.py", *arguments])
    place.wait_until(lambda: place.notes("ping", 1) or "died with" in tree.output(), "its worker process runs a job")

    assert len(place.notes("ping", 1)) == 1, tree.tail()
    assert sorted(tree.pids()) == sorted([tree.pid, int(place.notes("ping", 1)[0][2])])
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()


def test_a_module_that_starts_workers_when_it_is_imported_is_refused_with_what_to_do(place):
    place.jobs("sys.exit(dramalite.main(['worker', 'jobs', '-p', '1']))")
    tree = place.start([sys.executable, "jobs.py"])

    assert tree.wait() == 2, tree.tail()
    assert "if __name__ ==" in tree.output()
    assert tree.pids() == []


def test_the_workers_say_what_they_are_for(place):
    tree = place.ready_worker()

    assert f"At work on SQLiteBroker({str(place.db)!r})" in tree.output()
    assert "nothing to do" not in tree.output()
    assert "INFO" in tree.output()
    assert "DEBUG" not in tree.output()


def test_workers_without_actors_say_so(place):
    (place.folder / "empty.py").write_text("import dramalite\n")
    tree = place.worker("--queues", "mial", module="empty")
    place.wait_until(lambda: "ready for action" in tree.output(), "the worker runs")

    assert "No actor declares the queue 'mial' of --queues; declared are: none." in tree.output()


def test_workers_on_a_broker_in_memory_say_that_nobody_else_reaches_it(place):
    (place.folder / "alone.py").write_text("import dramalite\n\ndramalite.set_broker(dramalite.MemoryBroker())\n")
    tree = place.worker(module="alone")
    place.wait_until(lambda: "ready for action" in tree.output(), "the worker runs")

    assert "lives in each process alone" in tree.output()


CONFIGURES_LOGGING = """
import logging.config

logging.config.dictConfig({
    "version": 1,
    "handlers": {"own": {"class": "logging.StreamHandler"}},
    "root": {"level": "INFO", "handlers": ["own"]},
})
"""


def test_a_worker_goes_on_to_log_though_a_module_configures_logging(place):
    (place.folder / "empty.py").write_text("import dramalite\n" + CONFIGURES_LOGGING)
    tree = place.worker(module="empty")
    place.wait_until(lambda: "There is nothing to do" in tree.output(), "the worker says what it is for")


def test_a_worker_says_why_it_cannot_start_though_a_module_configures_logging(place):
    (place.folder / "broken.py").write_text(CONFIGURES_LOGGING + "raise LookupError('not today')\n")
    tree = place.worker(module="broken")

    assert tree.wait() == 2
    assert "LookupError: not today" in tree.output()


def test_workers_without_actors_name_another_copy_of_dramalite_that_may_have_them(place):
    vendored = place.folder / "vendored"
    vendored.mkdir()
    shutil.copy(harness.ROOT / "dramalite.py", vendored)
    (place.folder / "tasks.py").write_text("from vendored import dramalite\n\ndramalite.actor(print)\n")
    tree = place.worker(module="tasks")
    place.wait_until(lambda: "There is nothing to do" in tree.output(), "the worker says what it is for")

    assert "`python -m vendored.dramalite worker ...`" in tree.output()


def test_workers_of_an_empty_module_say_so(place):
    (place.folder / "empty.py").write_text("import dramalite\n")
    tree = place.worker(module="empty")
    place.wait_until(lambda: "ready for action" in tree.output(), "the worker runs")

    assert "There is nothing to do" in tree.output()


def test_an_actor_in_place_of_a_broker_is_refused_and_not_run(place):
    tree = place.worker(module="jobs:ping")

    assert tree.wait() == 2, tree.tail()
    assert "'jobs:ping' is an actor" in tree.output()
    assert place.notes("ping") == []


def test_a_module_may_forbid_the_import_of_others(place):
    place.jobs("sys.modules['forbidden'] = None")
    tree = place.worker()
    place.wait_until(lambda: "ready for action" in tree.output() or not tree.alive(), "the module is imported")

    assert tree.alive(), tree.tail()


def test_a_module_that_is_to_be_loaded_at_its_first_use_is_left_alone(place):
    (place.folder / "heavy.py").write_text("import jobs\njobs.note('loaded')\n")
    place.jobs(
        """
        import importlib.util

        spec = importlib.util.find_spec("heavy")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        heavy = sys.modules["heavy"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(heavy)

        @dramalite.actor(max_retries=0)
        def use():
            note("used", heavy.jobs is sys.modules[__name__])
        """
    )
    place.ready_worker()
    before = place.notes("loaded")
    place.send("use")
    place.wait_until(lambda: place.notes("used", True), "the module is used")

    assert before == []
    assert place.notes("loaded")


def test_the_broker_is_told_of_its_process_before_further_modules_are_imported(place):
    place.jobs(
        """
        class Boot(dramalite.Middleware):
            def after_process_boot(self, broker):
                note("boot", len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))

            def after_consumer_thread_boot(self, broker, thread):
                note("thread", len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))

        broker.add_middleware(Boot())
        """
    )
    (place.folder / "more.py").write_text("import jobs\njobs.note('more')\n")
    place.start([sys.executable, "-m", "dramalite", "worker", "jobs", "more", "-p", "1", "-t", "1"])
    place.wait_until(lambda: place.notes("thread"), "the worker starts its threads")

    assert [note[0] for note in place.notes()] == ["boot", "more", "thread"]
    assert place.notes("boot") + place.notes("thread") == [["boot", "0"], ["thread", "0"]]  # No signal is blocked.


# Which work is done, and by how many


def test_a_filter_without_queues_lets_all_through(place):
    place.send("mail", 1, queue="mail")
    place.send("ping", 1)
    place.start([sys.executable, "-m", "dramalite", "worker", "jobs", "-p", "1", "-t", "1", "-Q"])

    place.drained()
    assert place.notes("mail", 1) and place.notes("ping", 1)


def test_only_the_named_queues_are_served(place):
    place.send("mail", 1, queue="mail")
    place.send("ping", 1)
    place.worker("--queues", "mail")
    place.wait_until(lambda: place.notes("mail", 1), "the named queue is served")
    place.send("mail", 2, queue="mail")
    place.wait_until(lambda: place.notes("mail", 2), "the named queue is served again")

    assert place.notes("ping") == []
    place.wait_until(lambda: place.waiting() == 1, "what was done is acknowledged")


def test_options_of_several_values_may_come_before_the_modules(place):
    place.send("ping", 1)
    place.send("mail", 1, queue="mail")
    place.start([sys.executable, "-m", "dramalite", "worker", "-p", "1", "-t", "1", "--queues", "mail", "--", "jobs"])

    place.wait_until(lambda: place.notes("mail", 1), "the named queue is served")
    assert place.notes("ping") == []


def test_threads_of_one_process_work_at_the_same_time(place):
    place.worker(threads=3)
    for number in range(3):
        place.send("meet", number, 3)

    place.wait_until(lambda: len(place.notes("end")) == 3, "three jobs meet")
    assert len({note[2] for note in place.notes("met")}) == 1


def test_processes_work_at_the_same_time(place):
    tree = place.worker(processes=2, threads=1)
    for number in range(2):
        place.send("meet", number, 2)

    place.wait_until(lambda: len(place.notes("end")) == 2, "two jobs meet")
    pids = {int(note[2]) for note in place.notes("met")}
    assert len(pids) == 2
    assert tree.pid not in pids


# Log


def test_the_log_file_holds_what_workers_say_and_is_appended_to(place):
    log = place.folder / "worker.log"
    log.write_text("earlier\n")
    tree = place.worker("--log-file", str(log))
    place.send("talk", "grüße")
    place.wait_until(lambda: place.notes("talked"), "the job talks")
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0

    text = log.read_text("utf-8")
    assert text.startswith("earlier\n")
    for words in ("in the log: grüße", "on stdout: grüße", "on stderr: grüße"):
        assert words in text, text + tree.output()


def test_what_a_job_prints_is_in_the_log_at_once_also_when_its_process_dies(place):
    place.jobs(
        """
        @dramalite.actor(max_retries=0, max_crashes=1)
        def leave():
            print("first words")
            until(lambda: noted("heard"))
            print("last words")
            os._exit(7)
        """
    )
    place.send("leave")
    tree = place.worker(PYTHONUNBUFFERED="")
    place.wait_until(lambda: "first words\n" in tree.output(), "what was printed is in the log")
    place.journal.write_text("heard\n")
    place.wait_until(lambda: "died with exit code 7" in tree.output(), "the process dies")

    assert "last words\n" in tree.output()


def test_what_the_log_cannot_encode_is_printed_all_the_same(place):
    place.jobs(
        """
        @dramalite.actor(max_retries=0)
        def talk():
            print("é →")
            note("talked")
        """
    )
    place.send("talk")
    tree = place.worker(PYTHONIOENCODING="ascii")
    place.drained()

    assert place.notes("talked")
    assert "\\xe9 \\u2192" in tree.output()  # Its line's end may come after a line of the log.


def test_verbose_adds_detail(place):
    tree = place.ready_worker("-v")

    assert "INFO" in tree.output()
    assert "DEBUG" in tree.output()


def test_verbose_may_be_written_out():
    import dramalite as module

    short, long = (module.make_argument_parser().parse_args(["jobs", option]) for option in ("-v", "--verbose"))

    assert vars(short) == vars(long)


# The pid file


def test_the_pid_file_names_the_process_to_signal_and_goes_with_it(place):
    pid_file = place.folder / "worker.pid"
    tree = place.ready_worker("--pid-file", str(pid_file))

    assert int(pid_file.read_text()) == tree.pid
    assert pid_file.stat().st_mode & 0o777 == 0o644  # For everyone to read.
    kill(int(pid_file.read_text()), signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()
    assert not pid_file.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="There are no FIFOs here.")
def test_a_pid_file_that_is_no_regular_file_ends_with_4_and_stays(place):
    fifo = place.folder / "worker.pid"
    os.mkfifo(fifo)
    tree = place.worker("--pid-file", str(fifo))

    assert tree.wait() == 4, tree.tail()
    assert "not a regular file" in tree.output()
    assert fifo.is_fifo()


def test_a_pid_file_that_a_link_leads_to_goes_and_the_link_stays(place):
    link, target = place.folder / "worker.pid", place.folder / "target.pid"
    link.symlink_to(target)
    tree = place.ready_worker("--pid-file", str(link))
    pid = int(target.read_text())
    tree.signal(signal.SIGTERM)

    assert (pid, tree.wait()) == (tree.pid, 0), tree.tail()
    assert not target.exists()
    assert link.is_symlink()


def test_a_pid_file_of_a_dead_process_is_taken_over(place):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    pid_file = place.folder / "worker.pid"
    pid_file.write_text(str(gone.pid))
    tree = place.ready_worker("--pid-file", str(pid_file))

    assert int(pid_file.read_text()) == tree.pid


@pytest.mark.parametrize("text", ["99999999999999999999", ""])
def test_a_pid_file_without_the_id_of_a_process_that_can_be_is_taken_over(place, text):
    pid_file = place.folder / "worker.pid"
    pid_file.write_text(text)
    tree = place.worker("--pid-file", str(pid_file))
    place.wait_until(lambda: pid_file.read_text() == str(tree.pid) or not tree.alive(), "the file is taken over")

    assert tree.alive(), tree.tail()


def test_a_pid_file_of_another_users_process_is_not_taken_over(place):
    (place.folder / "worker.pid").write_text("12345")
    tree = place.start_script(
        """
        import os, sys, dramalite

        def not_permitted(pid, number):
            raise PermissionError

        os.kill = not_permitted
        sys.exit(dramalite.main(["worker", "jobs", "-p", "1", "--pid-file", "worker.pid"]))
        """
    )

    assert tree.wait() == 4, tree.tail()
    assert (place.folder / "worker.pid").read_text() == "12345"
    assert "12345" in tree.output()


@pytest.mark.parametrize("content", [str(os.getpid()), "not a number"], ids=["alive", "words"])
def test_a_pid_file_that_is_not_ours_ends_with_4_and_stays(place, content):
    pid_file = place.folder / "worker.pid"
    pid_file.write_text(content)
    tree = place.worker("--pid-file", str(pid_file))

    assert tree.wait() == 4, tree.tail()
    assert pid_file.read_text() == content
    assert str(pid_file) in tree.output()


@pytest.mark.parametrize("is_new", [True, False], ids=["another file", "the same file"])
def test_a_pid_file_that_is_another_processs_by_the_end_stays(place, is_new):
    pid_file = place.folder / "worker.pid"
    tree = place.ready_worker("--pid-file", str(pid_file))
    if is_new:
        pid_file.unlink()
    pid_file.write_text(str(os.getpid()))
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()
    assert pid_file.read_text() == str(os.getpid())


def test_of_two_supervisors_that_start_at_once_with_one_pid_file_one_ends_with_4(place):
    source = """
        import os, sys, time
        import dramalite

        def meet(event, arguments):
            # Both are about to write the file, having seen that there is none.
            if event == "open" and str(arguments[0]).endswith("worker.pid") and arguments[2] & os.O_CREAT:
                open(f"here-{os.getpid()}", "w").close()
                deadline = time.monotonic() + 60
                while sum(name.startswith("here-") for name in os.listdir()) < 2 and time.monotonic() < deadline:
                    time.sleep(0.001)

        if __name__ == "__main__":
            sys.addaudithook(meet)
            sys.exit(dramalite.main(["worker", "jobs", "-p", "1", "-t", "1", "--pid-file", "worker.pid"]))
    """
    trees = [place.start_script(source) for _ in range(2)]
    place.wait_until(lambda: not all(tree.alive() for tree in trees), "one gives way")
    loser, winner = sorted(trees, key=harness.Tree.alive)

    assert loser.wait() == 4, loser.tail()
    assert "worker.pid" in loser.output()
    place.wait_until(lambda: (place.folder / "worker.pid").read_text() == str(winner.pid), "the file is the other's")
    assert winner.alive(), winner.tail()


def test_a_signal_to_the_process_of_the_pid_file_is_never_too_early(place):
    pid_file = place.folder / "worker.pid"
    tree = place.start_script(
        """
        import os, signal, sys
        import dramalite

        chmod = os.chmod

        def chmod_and_signal(path, *arguments):
            chmod(path, *arguments)
            if os.path.basename(path) == "worker.pid":  # It has just been made.
                os.kill(os.getpid(), signal.SIGTERM)

        if __name__ == "__main__":
            os.chmod = chmod_and_signal
            sys.exit(dramalite.main(["worker", "jobs", "-p", "1", "-t", "1", "--pid-file", "worker.pid"]))
        """
    )

    assert tree.wait() == 0, tree.tail()
    assert "SIGTERM" in tree.output()
    assert not pid_file.exists()
    assert tree.pids() == []


def test_a_pid_file_that_cannot_be_written_ends_with_4(place):
    pid_file = place.folder / "missing" / "worker.pid"
    tree = place.worker("--pid-file", str(pid_file))

    assert tree.wait() == 4, tree.tail()
    assert str(pid_file) in tree.output()


def test_the_pid_file_goes_when_the_import_fails(place):
    pid_file = place.folder / "worker.pid"
    tree = place.worker("--pid-file", str(pid_file), module="no_such_module")

    assert tree.wait() == 2, tree.tail()
    assert not pid_file.exists()


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("whole_group", [False, True], ids=["to the parent", "to everyone"])
def test_a_graceful_stop_finishes_running_work_and_starts_no_more(place, number, whole_group):
    place.jobs(JOBS + TELLS)
    tree = place.worker(threads=1)
    place.send("held", 1)
    started(place, 1)
    place.send("work", 2, 0)
    if whole_group:
        os.killpg(tree.pid, number)  # What Ctrl+C in a terminal does.
    else:
        tree.signal(number)
    place.wait_until(lambda: place.notes("stopping"), "the worker knows")
    (place.folder / "release").touch()

    assert tree.wait() == 0, tree.tail()
    assert place.notes("end", 1)
    assert place.notes("start", 2) == []
    assert place.waiting() == 1
    assert tree.pids() == []


def test_what_a_graceful_stop_left_is_done_by_the_next_worker_once(place):
    tree = place.worker(threads=1)
    place.send("work", 1, 0.2)
    started(place, 1)
    for number in range(2, 8):
        place.send("work", number, 0)
    tree.signal(signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()
    place.ready_worker()
    place.drained()

    assert place.runs("start") == {str(number): 1 for number in range(1, 8)}
    assert place.runs("end") == place.runs("start")


def test_work_that_outlasts_the_shutdown_timeout_is_handed_back(place):
    tree = place.worker("--worker-shutdown-timeout", "300")
    place.send("held", 1)
    started(place, 1)
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()
    assert place.notes("end") == []
    assert (place.waiting(), place.dead()) == (1, 0)

    (place.folder / "release").touch()
    place.ready_worker()
    place.drained()
    assert place.runs("end") == {"1": 1}


def test_handing_back_is_no_crash(place):
    # An actor whose first crash is its last.
    place.script("import jobs; jobs.fragile.send(1)")
    for times in (1, 2):
        tree = place.worker("--worker-shutdown-timeout", "50")
        place.wait_until(lambda: len(place.notes("start", 1)) == times, "the job starts")
        tree.signal(signal.SIGTERM)
        assert tree.wait() == 0, tree.tail()

    assert (place.waiting(), place.dead()) == (1, 0)


def test_what_must_not_run_twice_and_outlasts_a_stop_becomes_a_dead_letter(place):
    place.script("import jobs; jobs.once.send(1)")
    tree = place.worker("--worker-shutdown-timeout", "50")
    place.wait_until(lambda: place.notes("start", 1), "the job starts")
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 0, tree.tail()
    assert (place.waiting(), place.dead()) == (0, 1)


@pytest.mark.parametrize("options", [{}, {"max_crashes": 1}], ids=["plain", "one crash would be its end"])
def test_a_second_signal_stops_at_once_and_loses_nothing(place, options):
    tree = place.worker()
    place.send("stubborn", 2, **options)  # What can't be cancelled is no reason to lose the other.
    place.send("held", 1, **options)
    started(place, 2)
    tree.signal(signal.SIGTERM)
    place.wait_until(lambda: "SIGTERM" in tree.output(), "the worker says why it stops")
    harness.let_pass(0.3)  # A second thought, not the echo of the first signal.
    tree.signal(signal.SIGTERM)

    assert tree.wait() == 1, tree.tail()
    assert tree.pids() == []
    assert (place.waiting(), place.dead()) == (2, 0)
    (place.folder / "release").touch()
    place.worker()
    place.drained()
    assert place.runs("end") == {"1": 1, "2": 1}
    assert place.dead() == 0


def test_a_signal_during_the_start_stops_the_worker(place):
    place.jobs("note('importing')\ntime.sleep(0.5)")
    tree = place.worker()
    place.wait_until(lambda: place.notes("importing"), "the import is under way")
    tree.signal(signal.SIGTERM)

    assert tree.wait() in (0, 1), tree.tail()
    assert tree.pids() == []


def test_a_stop_during_the_start_waits_no_longer_than_it_is_told(place):
    place.jobs("note('importing')\nuntil(lambda: noted('release'))")
    tree = place.worker("--worker-shutdown-timeout", "50")
    place.wait_until(lambda: place.notes("importing"), "the import is under way")
    tree.signal(signal.SIGTERM)

    assert tree.wait() in (0, 1), tree.tail()
    assert tree.pids() == []


def test_a_stop_may_have_any_time(place):
    tree = place.worker("--worker-shutdown-timeout", "10000000000000")
    place.send("held", 1)
    started(place, 1)
    tree.signal(signal.SIGTERM)
    place.wait_until(lambda: "Stopping worker process" in tree.output(), "the worker process knows")
    harness.let_pass(0.3)  # Whatever thread fails meanwhile says so.
    (place.folder / "release").touch()

    assert tree.wait() == 0, tree.tail()
    assert place.runs("end") == {"1": 1}
    assert place.waiting() == 0
    assert "Traceback" not in tree.output()


def test_a_child_that_is_killed_while_it_stops_is_told_of_by_the_exit_code(place):
    tree = place.worker()
    place.send("held", 1)
    child = started(place, 1)
    tree.signal(signal.SIGTERM)
    place.wait_until(lambda: "Stopping worker process" in tree.output(), "the child stops")
    kill(child)

    assert tree.wait() == 1, tree.tail()
    assert "killed by SIGKILL while it stopped" in tree.output()


def test_jobs_run_with_no_signal_blocked(place):
    place.jobs(
        """
        @dramalite.actor(max_retries=0)
        def look():
            note("blocked", len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        """
    )
    place.send("look")
    place.worker()
    place.wait_until(lambda: place.notes("blocked"), "the job looks at its signals")

    assert place.notes("blocked") == [["blocked", "0"]]


# Processes that die


def test_a_dead_child_is_replaced_and_the_others_are_not_disturbed(place):
    tree = place.worker(processes=2, threads=1)
    for number in range(2):
        place.send("held", number)
    victim, other = started(place, 0), started(place, 1)
    kill(victim)
    place.wait_until(lambda: len(place.notes("start", 0)) == 2, "the replacement repeats the lost job")
    (place.folder / "release").touch()
    place.drained()

    assert len(place.notes("start", 1)) == 1
    assert int(place.notes("start", 0)[1][2]) not in (victim, other)
    assert place.runs("end") == {"0": 1, "1": 1}
    assert tree.alive()
    assert re.search(r"SIGKILL|signal 9|-9|killed", tree.output())


@pytest.mark.parametrize("code", [2, 3, 102])
def test_a_job_that_ends_its_process_does_not_end_the_service_whatever_the_exit_code(place, code):
    place.jobs("""
        @dramalite.actor(max_retries=0)
        def leave(code):
            note("leave")
            if noted("leave") == 1:
                os._exit(code)
    """)
    tree = place.worker(processes=2)
    place.wait_until(lambda: tree.output().count("ready for action") == 2, "both processes are ready")
    place.send("leave", code)
    place.wait_until(lambda: tree.output().count("ready for action") == 3 or not tree.alive(), "another one is ready")

    assert f"died with exit code {code}" in tree.output()
    assert tree.alive(), tree.tail()
    place.drained()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_children_leave_within_two_seconds_when_their_parent_is_killed(place, busy):
    late_s = []
    while min(late_s, default=2.0) >= 2.0 and len(late_s) < 3:  # The best of three counts, for the machine may be busy.
        tree = place.worker(processes=2)
        place.wait_until(lambda tree=tree: tree.output().count("ready for action") == 2, "both processes are ready")
        if busy:
            place.send("held", len(late_s))
            started(place, len(late_s))
        assert len(tree.children()) == 2
        killed_at = time.monotonic()
        kill(tree.pid)
        place.wait_until(lambda tree=tree: not tree.pids(), "the orphans leave")
        late_s.append(time.monotonic() - killed_at)

    assert min(late_s) < 2.0


def test_a_child_that_stops_leaves_soon_when_its_parent_is_killed(place):
    tree = place.worker()
    place.send("held", 1)
    started(place, 1)
    tree.signal(signal.SIGTERM)
    place.wait_until(lambda: "Stopping worker process" in tree.output(), "the child stops")
    kill(tree.pid)
    place.wait_until(lambda: not tree.pids(), "the orphan leaves")

    with contextlib.closing(sqlite3.connect(place.db)) as connection:
        handed_back = connection.execute("SELECT state, crashes FROM dramalite_messages").fetchall()
    assert handed_back == [(0, 0)]


def test_a_child_that_still_imports_leaves_soon_when_its_parent_is_killed(place):
    place.jobs("note('importing')\nuntil(lambda: noted('release'))")
    tree = place.worker()
    place.wait_until(lambda: place.notes("importing"), "the import is under way")
    kill(tree.pid)

    place.wait_until(lambda: not tree.pids(), "the orphan leaves")


def test_a_process_that_finds_all_places_for_workers_taken_says_so_in_one_line_and_is_tried_again(place):
    import dramalite as module

    with contextlib.ExitStack() as taken:
        for workers in (64, 63):
            taken.enter_context(module.simulate(place.broker(), workers=workers))
        tree = place.worker()
        place.wait_until(lambda: " 127 worker slots" in tree.output(), "the worker says that all are taken")
    place.wait_until(lambda: "ready for action" in tree.output(), "another one has found a place")
    tree.signal(signal.SIGTERM)
    told = [line for line in tree.output().splitlines() if " 127 worker slots" in line]

    assert tree.wait() == 0, tree.tail()
    assert "CRITICAL" in told[0]
    assert "Traceback" not in tree.output()


def test_the_parent_stops_its_children_when_one_cannot_start_again(place):
    # The module breaks while the worker runs; the dead child's replacement cannot import it.
    tree = place.ready_worker(processes=1)
    (place.folder / "jobs.py").write_text("raise ValueError('-'.join(['no', 'way']))\n")
    kill(tree.children()[0])

    place.wait_until(lambda: "no-way" in tree.output(), "the failed replacement is reported")
    tree.signal(signal.SIGTERM)
    tree.wait()
    assert tree.pids() == []
