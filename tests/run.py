"""Runs pytest in two processes at once: half of the time, tests wait for processes that they started.

Arguments are passed on to both: `python tests/run.py --durations=10`.  The second one's output comes
when it has ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent

#: What starts most of the processes, and takes as long as all the rest.
STARTERS = ("faults", "test_command_line.py", "test_supervisor.py")

NO_TESTS = 5  # pytest's exit code where the arguments leave none in a share.


def main(arguments: list[str]) -> int:
    starters = [str(TESTS / name) for name in STARTERS]
    rest = [str(TESTS), *(f"--ignore={path}" for path in starters)]
    pytest = [sys.executable, "-m", "pytest", *arguments]
    with tempfile.TemporaryFile() as output:
        second = subprocess.Popen([*pytest, *rest], stdout=output, stderr=subprocess.STDOUT)
        try:
            first = subprocess.run([*pytest, *starters])
        finally:
            second.wait()
        output.seek(0)
        print(output.read().decode(errors="replace"), end="", flush=True)
    codes = {first.returncode, second.returncode}
    return max(codes - {NO_TESTS}, default=NO_TESTS, key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
