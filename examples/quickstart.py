"""Count the words of a folder of text files: one message per file, one worker, one SQLite file.

    python3 examples/quickstart.py [PATHS...] [--state FOLDER]

Kill it half way, with Ctrl+C or kill -9, and start it again: it goes on where it was, loses no
file and counts none twice.  A message whose worker died is delivered again (at least once), so
what the actor does can be repeated without harm: it replaces the row of its file.
"""

import argparse, hashlib, json, os, re, signal, socket
import sqlite3, subprocess, sys, tempfile, threading, time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Finds dramalite.py in a bare clone; needless once it is installed.
import dramalite

SKIP = re.compile(r"\..*|__pycache__|node_modules|venv|build|dist|.*\.egg-info")  # Folders.
OWN = ("queue.db", "index.db", "worker.log")  # Opened by hand, databases would lose SQLite's locks.
WORD = re.compile(r"[^\W\d_]{3,}")  # Three letters or more, of any alphabet.


@dramalite.actor(max_retries=2, min_backoff=100)
def count_words(path, index):
    """Count the words of one file, and write them to its row of the index in one transaction."""
    with open(path, encoding="utf-8", errors="replace") as file:
        words = Counter(word for line in file for word in WORD.findall(line.lower()))
    with closing(sqlite3.connect(index, timeout=30)) as db, db:
        db.execute("REPLACE INTO files VALUES (?, ?)", (path, json.dumps(words)))


class LeaveWithStarter(dramalite.Middleware):
    """Stops the worker when the program that started it is gone, even by kill -9."""

    def after_process_boot(self, broker):
        threading.Thread(target=self.watch, args=[os.getppid()], daemon=True).start()

    def watch(self, worker):
        starter = ("127.0.0.1", int(os.environ["QUICKSTART_PORT"]))
        with suppress(OSError), socket.create_connection(starter) as link:
            link.recv(1)  # Nothing is ever sent: this ends when the other side does.
        with suppress(OSError):  # It may be gone by now as well.
            if os.getppid() == worker:
                os.kill(worker, signal.SIGTERM)


dramalite.get_broker().add_middleware(LeaveWithStarter())  # The worker's broker: DRAMALITE_DB below.


def text_files(paths, state):
    """Find the files that look like text, in a steady order, leaving out caches and the like."""
    for top in paths:
        for folder, folders, names in os.walk(top) if top.is_dir() else [(top.parent, [], [top.name])]:
            folders[:] = sorted(name for name in folders if not SKIP.fullmatch(name))
            names = [name for name in sorted(names) if not (name.startswith(OWN) and Path(folder) == state)]
            for path in filter(os.path.isfile, (os.path.join(folder, name) for name in names)):
                with suppress(OSError, UnicodeEncodeError), open(path, "rb") as file:
                    if path.encode() and b"\0" not in file.read(8192):  # The name must be text, too.
                        yield path


def open_index(paths, folder):
    """Open the index in its folder: a row (path, words as JSON or NULL if not done) per file sent."""
    key = hashlib.sha256(repr(paths).encode()).hexdigest()[:12]
    folder = folder or Path(tempfile.gettempdir(), f"dramalite-quickstart-{key}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and folder.lstat().st_uid != os.getuid():
        sys.exit(f"{folder} belongs to somebody else; choose another folder with --state.")
    db = sqlite3.connect(folder / "index.db", timeout=30)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, words TEXT)")
    if db.execute("PRAGMA user_version").fetchone() == (1,):  # Left by a run that came to its end.
        db.executescript("BEGIN IMMEDIATE; DELETE FROM files; PRAGMA user_version = 0; COMMIT")
    return db, folder.resolve()


def send_unsent(paths, db, index):
    """Send a message for each file that has none yet."""
    sent = {path for path, in db.execute("SELECT path FROM files")}
    unsent = [path for path in text_files(paths, Path(index).parent) if path not in sent]
    for start in range(0, len(unsent), 100):
        some = unsent[start : start + 100]
        dramalite.get_broker().enqueue_many([count_words.message(path, index) for path in some])
        with db:  # They are on disk.  Killed just here, the next start sends them again: no harm.
            db.executemany("INSERT OR IGNORE INTO files (path) VALUES (?)", [(path,) for path in some])
    print(f"  sent {len(unsent)} messages" + (f", {len(sent)} were sent before" if sent else ""))


def wait_until_done(worker, db):
    """Wait until the queue is empty, and show how far the work is."""
    waiting = True
    while waiting:
        try:
            dramalite.get_broker().join("default", timeout=200)
            waiting = False
        except dramalite.QueueJoinTimeout:
            if worker.poll() is not None:
                sys.exit(f"\nThe worker ended with exit code {worker.returncode}; worker.log says why.")
        done, total = db.execute("SELECT count(words), count(*) FROM files").fetchone()
        line = f"  [{'#' * (40 * done // max(total, 1)):.<40}] {done} of {total} files"
        print(line, end="\r" if waiting and sys.stdout.isatty() else "\n", flush=True)


def report(db, seconds):
    """Print what the index holds, and mark it as finished: the next run starts afresh."""
    files, counts = 0, Counter()
    for path, words in db.execute("SELECT path, words FROM files"):
        if words is None:
            print(f"  could not be counted: {path}")
        else:
            files += 1
            counts.update(json.loads(words))
    db.execute("PRAGMA user_version = 1")
    print(f"{files} files with {counts.total()} words, {len(counts)} different ones, in {seconds:.1f} s")
    print("The ten most common (three letters or more):")
    for word, times in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]:
        print(f"  {times:>8}  {word}")


def main():
    parser = argparse.ArgumentParser(description="Count the words of text files.")
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT], help="files and folders (this repository)")
    parser.add_argument("--state", type=Path, help="folder of the queue and the index (a temporary one)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # A word or a path that the terminal cannot show.
    started = time.perf_counter()
    paths = [path.resolve() for path in args.paths]
    for path in paths:
        if not path.exists():
            parser.error(f"{path} does not exist.")
    try:
        db, state = open_index(paths, args.state)
    except (OSError, sqlite3.Error) as error:
        parser.error(f"There can be no index in this folder: {error}; give another one by --state.")
    dramalite.set_broker(dramalite.SQLiteBroker(state / "queue.db"))
    print(f"Counting words in {', '.join(map(str, paths))}\n  queue, index and log: {state}", flush=True)
    with closing(db), socket.create_server(("127.0.0.1", 0)) as starter:
        settings = {"DRAMALITE_DB": str(state / "queue.db"), "QUICKSTART_PORT": str(starter.getsockname()[1])}
        worker = subprocess.Popen(
            [sys.executable, "-m", "dramalite", "worker", "quickstart", "--path", ROOT / "examples",
             "--processes", "1", "--threads", "2", "--log-file", state / "worker.log"],
            cwd=ROOT, env=os.environ | settings, start_new_session=True,  # Ctrl+C comes to us, who stop it.
        )
        try:
            send_unsent(paths, db, str(state / "index.db"))
            wait_until_done(worker, db)
        finally:
            worker.terminate()
            worker.wait()
        report(db, time.perf_counter() - started)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped half way. Start it again and it goes on from here.")
