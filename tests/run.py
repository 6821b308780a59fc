"""Runs pytest in three processes at once: half of the time, tests wait for processes that they started.

Arguments are passed on to each: `python tests/run.py --durations=10`.  What the second and the third one
say comes when they have ended.  Their files are in memory where there is room for them, so that none of
their tests waits for the disk; what can go wrong with files and disks is met by the first one, on the disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent

#: What breaks files and kills who writes them; with the properties it takes about as long as each other share.
ON_DISK = ("faults", "properties")

#: What else starts most of the processes, and the simulations, so that the last share takes no longer.
STARTERS = (
    "test_command_line.py", "test_supervisor.py", "test_examples.py", "test_layout.py", "test_simulation.py", "wire"
)  # fmt: skip

#: A folder in memory, where the system has one, and how much there must be free.
MEMORY = Path("/dev/shm")
ROOM = 1 << 30

NO_TESTS = 5  # pytest's exit code where the arguments leave none in a share.


def folder_in_memory() -> str | None:
    """MEMORY if tests can write files and run programs there; None where they can't."""
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        return None
    forbids_programs = os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    return None if forbids_programs or shutil.disk_usage(MEMORY).free < ROOM else str(MEMORY)


def main(arguments: list[str]) -> int:
    on_disk, starters = ([str(TESTS / name) for name in names] for names in (ON_DISK, STARTERS))
    rest = [str(TESTS), *(f"--ignore={path}" for path in (*on_disk, *starters))]
    pytest = [sys.executable, "-m", "pytest", *arguments]
    with contextlib.ExitStack() as closing:
        others = []
        for share in (starters, rest):
            output = closing.enter_context(tempfile.TemporaryFile())
            folder = closing.enter_context(
                tempfile.TemporaryDirectory(
                    prefix="dramalite-tests-", dir=folder_in_memory(), ignore_cleanup_errors=True
                )
            )
            environment = {**os.environ, "TMPDIR": folder}
            command = [*pytest, *share]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            closing.callback(process.wait)
            others.append((process, output))
        codes = {subprocess.run([*pytest, *on_disk]).returncode}
        for process, output in others:
            codes.add(process.wait())
            output.seek(0)
            print(output.read().decode(errors="replace"), end="", flush=True)
    return max(codes - {NO_TESTS}, default=NO_TESTS, key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
