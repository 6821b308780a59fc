"""The examples, each run as a newcomer runs it: as a script, in a process of its own.

A bare clone is imitated: the scripts run without site-packages, in a temporary folder, with the
temporary folder of the system moved into it.
"""

import collections
import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import harness  # noqa: E402
from helpers import wait_until  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
#: Seconds that an example may take on a busy machine; then it is killed and its test fails.
LIMIT_S = 120
WORDS = "able baker charlie delta echo foxtrot golf hotel india juliett kilo lima mike".split()

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
proc_only = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs /proc to find the processes of a run"
)


@pytest.fixture
def environment(tmp_path):
    """Environment of the examples: no queue set, and the temporary folder is the test's."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "DRAMALITE_DB"}
    return environment | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}


def command(script, *arguments):
    """The command that runs an example without site-packages, every warning being an error."""
    return [sys.executable, "-S", "-W", "error", str(script), *map(str, arguments)]


def run(script, *arguments, cwd, environment):
    """Run an example to its end; return its output."""
    ended = subprocess.run(
        command(script, *arguments),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=LIMIT_S,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


# ------------------------------------------------------------------------------------------
# The quickstart
# ------------------------------------------------------------------------------------------
@pytest.fixture
def start(tmp_path, environment):
    """Start the quickstart in the background; whatever is left of it is killed afterwards."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            command(EXAMPLES / "quickstart.py", *arguments),
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            kill([process.pid, *descendants(process.pid)])
        process.wait()
        process.stdout.close()
        process.stderr.close()


def write_files(folder, *, count, words):
    """Write text files of random words; return how often each word is in them."""
    chance = random.Random(count)
    folder.mkdir(parents=True)
    total = collections.Counter()
    for number in range(count):
        text = chance.choices(WORDS, weights=range(1, len(WORDS) + 1), k=words)
        total.update(text)
        (folder / f"file {number}.txt").write_text("\n".join(text), encoding="utf-8")
    return total


def report(output):
    """What a quickstart found: ((files, words, different words), [(word, times), ...])."""
    totals = re.search(r"^(\d+) files with (\d+) words, (\d+) different", output, re.MULTILINE)
    top = re.findall(r"^ +(\d+)  (\S+)$", output, re.MULTILINE)
    return tuple(map(int, totals.groups())), [(word, int(times)) for times, word in top]


def expected_report(count, words):
    top = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:10]
    return (count, words.total(), len(words)), top


def sent(output):
    return int(re.search(r"sent (\d+) messages", output).group(1))


def descendants(pid):
    """The processes that a process has started, and those that they have started."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # It has ended meanwhile.
            continue
        if state != "Z":
            parents[int(entry.parent.name)] = int(parent)
    found = [pid]
    for known in found:
        found.extend(child for child, parent in parents.items() if parent == known)
    return found[1:]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_the_quickstart_counts_each_text_file_once(tmp_path, environment):
    words = write_files(tmp_path / "texts", count=20, words=200)
    write_files(tmp_path / "texts" / ".git", count=3, words=10)
    write_files(tmp_path / "texts" / "__pycache__", count=3, words=10)
    inner = tmp_path / "texts" / "ünder a folder"
    inner.mkdir()
    (inner / "empty").touch()
    (inner / "picture.png").write_bytes(b"\x89PNG able able \0\0 able able")
    (inner / "latin-1.txt").write_bytes("Able ABLE\nca\xe7a Stra\xdfe xy".encode("latin-1"))
    words.update({"able": 2, "stra": 1})  # What is not UTF-8 parts words; "xy" is too short.
    (inner / "umlauts.md").write_text("Straße Straße, naïve_straße 42", encoding="utf-8")
    words.update({"straße": 3, "naïve": 1})
    if hasattr(os, "mkfifo"):
        os.mkfifo(inner / "pipe")

    output = run(EXAMPLES / "quickstart.py", "texts", cwd=tmp_path, environment=environment)

    assert report(output) == expected_report(23, words)
    assert sent(output) == 23
    assert "[########################################] 23 of 23 files" in output


def test_the_quickstart_leaves_its_own_files_out_where_they_lie_among_the_texts(tmp_path, environment):
    # To open a database by hand would drop SQLite's locks on it.
    words = write_files(tmp_path / "texts", count=20, words=10)
    output = run(
        EXAMPLES / "quickstart.py", "texts", "--state", "texts/state", cwd=tmp_path, environment=environment
    )
    assert report(output) == expected_report(20, words)

    output = run(EXAMPLES / "quickstart.py", "texts", "--state", "texts", cwd=tmp_path, environment=environment)
    assert report(output)[0][0] == 21  # The log of the first run's worker is text like any other.


def test_the_quickstart_counts_the_repository_by_default(tmp_path, environment):
    clone = tmp_path / "clone"
    (clone / "examples").mkdir(parents=True)
    harness.copy_module(clone)
    shutil.copy(EXAMPLES / "quickstart.py", clone / "examples")
    texts = [path.read_text(encoding="utf-8").lower() for path in clone.rglob("*.py")]
    words = collections.Counter(word for text in texts for word in re.findall(r"[^\W\d_]{3,}", text))

    output = run(clone / "examples" / "quickstart.py", cwd=tmp_path, environment=environment)

    assert report(output) == expected_report(2, words)
    assert {path.name for path in clone.rglob("*")} - {"__pycache__"} <= {
        "dramalite.py", "examples", "quickstart.py", *(path.name for path in clone.rglob("*.pyc"))
    }, "The quickstart left something in the clone."


def test_a_finished_quickstart_starts_afresh(tmp_path, environment):
    write_files(tmp_path / "texts", count=5, words=20)
    run(EXAMPLES / "quickstart.py", "texts", cwd=tmp_path, environment=environment)
    shutil.rmtree(tmp_path / "texts")
    words = write_files(tmp_path / "texts", count=4, words=20)

    output = run(EXAMPLES / "quickstart.py", "texts", cwd=tmp_path, environment=environment)

    assert report(output) == expected_report(4, words)
    assert sent(output) == 4


def test_the_quickstart_refuses_a_path_that_is_not_there(tmp_path, start):
    process = start("nowhere")
    _, errors = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 2
    assert f"{tmp_path / 'nowhere'} does not exist" in errors


@posix_only
def test_the_state_of_the_quickstart_is_for_its_owner_alone(tmp_path, environment):
    write_files(tmp_path / "texts", count=1, words=1)
    run(EXAMPLES / "quickstart.py", "texts", cwd=tmp_path, environment=environment)

    (state,) = Path(environment["TMPDIR"]).iterdir()

    assert state.stat().st_mode & 0o777 == 0o700


@contextlib.contextmanager
def held_half_way(process, state, *, column):
    """Stop a quickstart half way, by the lock of its index; yield how many files had got there.

    `column` says what to wait for: "path" for files sent, "words" for files counted.  While the
    lock is held, nothing is noted as sent and nothing is counted.
    """
    process.stdout.readline()  # Comes when the index is there.
    count = f"SELECT count({column}) FROM files"
    database = sqlite3.connect(state / "index.db", timeout=0, isolation_level=None)
    with contextlib.closing(database) as db:

        def held():
            try:
                return db.execute(count).fetchone()[0] > 0 and db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:  # Locked by the other side just now.
                return False

        wait_until(held, timeout=LIMIT_S)
        yield db.execute(count).fetchone()[0]


@posix_only
@proc_only
@pytest.mark.parametrize("victims", ["everything", "the program only"])
def test_a_quickstart_killed_half_way_goes_on(tmp_path, start, environment, victims):
    words = write_files(tmp_path / "texts", count=200, words=100)
    process = start("texts", "--state", "state")
    with held_half_way(process, tmp_path / "state", column="words") as done:
        started = descendants(process.pid)
        kill([process.pid, *started] if victims == "everything" else [process.pid])
        process.wait()

    output = run(
        EXAMPLES / "quickstart.py", "texts", "--state", "state", cwd=tmp_path, environment=environment
    )

    assert report(output) == expected_report(200, words)
    assert 0 < done < 200
    assert len(started) >= 2, "There was no worker to be killed."
    assert [pid for pid in started if alive(pid)] == []


@posix_only
@proc_only
def test_a_quickstart_killed_while_it_sends_goes_on(tmp_path, start, environment):
    words = write_files(tmp_path / "texts", count=800, words=3)
    process = start("texts", "--state", "state")
    with held_half_way(process, tmp_path / "state", column="path") as noted:
        kill([process.pid, *descendants(process.pid)])
        process.wait()

    output = run(
        EXAMPLES / "quickstart.py", "texts", "--state", "state", cwd=tmp_path, environment=environment
    )

    assert report(output) == expected_report(800, words)
    assert 0 < noted < 800
    # The hundred that were on their way are sent again, but for those that came to be done.
    assert 800 - noted - 100 <= sent(output) <= 800 - noted


@posix_only
@proc_only
def test_a_quickstart_stopped_by_ctrl_c_says_so_and_goes_on(tmp_path, start, environment):
    words = write_files(tmp_path / "texts", count=200, words=100)
    process = start("texts", "--state", "state")
    with held_half_way(process, tmp_path / "state", column="words") as done:
        started = descendants(process.pid)
        os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 1
    assert errors == "\nStopped half way. Start it again and it goes on from here.\n"
    assert 0 < done < 200
    assert [pid for pid in started if alive(pid)] == []

    output = run(
        EXAMPLES / "quickstart.py", "texts", "--state", "state", cwd=tmp_path, environment=environment
    )

    assert report(output) == expected_report(200, words)


# ------------------------------------------------------------------------------------------
# The short ones
# ------------------------------------------------------------------------------------------
def test_class_based(tmp_path, environment):
    output = run(EXAMPLES / "class_based.py", cwd=tmp_path, environment=environment)

    assert output.splitlines() == [
        "phone: Ada, your password was changed.",  # The lower priority number goes first.
        "mail: Welcome, Ada!",
        "mail: Welcome, Grace!",
        "78 characters sent by Welcome and PasswordChanged",
    ]


def test_pipeline(tmp_path, environment):
    output = run(EXAMPLES / "pipeline.py", cwd=tmp_path, environment=environment)

    names = ["class_based.py", "pipeline.py", "retries.py"]
    expected = []
    for name in names:
        counts = collections.Counter((EXAMPLES / name).read_text(encoding="utf-8").split())
        top = [f"{word} {times} times" for word, times in counts.most_common(3)]
        expected.append(f"{name}: {', '.join(top)}")
    assert output.splitlines() == expected


def test_my_retries(tmp_path, environment):
    shutil.copy(EXAMPLES / "test_my_retries.py", tmp_path)
    (tmp_path / "conftest.py").write_text(  # As many examples as the properties here have, in any time.
        "from hypothesis import HealthCheck, settings\n"
        f"settings.register_profile('here', max_examples={settings().max_examples}, deadline=None,"
        " suppress_health_check=[HealthCheck.too_slow])\n"
        "settings.load_profile('here')\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_retries.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )

    assert "2 passed" in result.stdout
    assert result.returncode == 0


def test_retries(tmp_path, environment):
    output = run(EXAMPLES / "retries.py", cwd=tmp_path, environment=environment)

    lines = output.splitlines()
    assert [line for line in lines if line.startswith("fetch")] == [
        "fetch: try 1 of example.org failed",
        "fetch: try 2 of example.org failed",
        "fetch: example.org came with try 3",
    ]
    assert sorted(line for line in lines if not line.startswith("fetch")) == [
        "dead letter: parse of 'twelve': ValueError: invalid literal for int() with base 10: 'twelve'",
        "give_up: parse of 'twelve' after 0 retries",
        "note: parse of 'twelve' failed with ValueError",
        "parse: 12",
    ]


# ------------------------------------------------------------------------------------------
# The window
# ------------------------------------------------------------------------------------------
@pytest.fixture
def display(environment):
    """The environment with a display that nobody sees."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter", exc_type=ImportError)
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed")
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "640x480x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        with open(reading) as pipe:
            number = pipe.readline().strip()  # Comes when the server is ready; at its end, "".
        assert number, "Xvfb did not start."
        yield environment | {"DISPLAY": f":{number}"}
    finally:
        server.terminate()
        server.wait()


def test_the_window_shows_the_work_and_stays_alive(tmp_path, display):
    output = run(EXAMPLES / "desktop.py", "--auto", cwd=tmp_path, environment=display)

    done, total, looks = map(int, re.findall(r"\d+", output))
    assert (done, total) == (60, 60)
    assert looks > 10, "The window was frozen while the worker worked."
    assert list(Path(display["TMPDIR"]).iterdir()) == [], "It left its database behind."


def test_a_window_closed_half_way_ends_the_program(tmp_path, display):
    """The program is run by a script that closes the window as soon as something is done."""
    script = tmp_path / "close_early.py"
    script.write_text(
        f"""
import runpy, sys, tkinter.ttk
def close_when_moving(bar, name, value, original=tkinter.ttk.Progressbar.__setitem__):
    original(bar, name, value)
    if 0 < value < 60:
        bar.after_idle(bar.winfo_toplevel().destroy)
tkinter.ttk.Progressbar.__setitem__ = close_when_moving
sys.argv = ["desktop.py", "--auto"]
runpy.run_path({str(EXAMPLES / "desktop.py")!r}, run_name="__main__")
""",
        encoding="utf-8",
    )

    output = run(script, cwd=tmp_path, environment=display)

    done, total, _ = map(int, re.findall(r"\d+", output))
    assert 0 < done < total
    assert list(Path(display["TMPDIR"]).iterdir()) == [], "It left its database behind."
