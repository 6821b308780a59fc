"""What dramalite does a second, and what it takes: `python tests/benchmarks/bench.py`.

Prints one line per figure: the median, the spread of the repeats (min..max), and the target
where there is one.  Names of scenarios restrict the run to them; --list shows the names.
"""

from __future__ import annotations

import argparse
import compileall
import datetime
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import bench_peers as peers  # noqa: E402
import bench_scenarios as scenarios  # noqa: E402
from bench_support import (  # noqa: E402
    FULL_SIZES,
    QUICK_SIZES,
    ROOT,
    TARGET_DUMPS_US,
    BenchError,
    Figure,
    Run,
    Skipped,
    dumps_us,
    percentile,
)

Scenario = Callable[[Run], Iterator[Figure]]

SCENARIOS: dict[str, Scenario] = {
    "sends": scenarios.sends,
    "threads": scenarios.sends_from_threads,
    "bulk": scenarios.sends_in_bulk,
    "drain": scenarios.drains,
    "results": scenarios.result_drains,
    "coroutines": scenarios.coroutines,
    "memory-brokers": scenarios.memory_drains,
    "production": scenarios.production,
    "latency": scenarios.latency,
    "lateness": scenarios.lateness,
    "urgency": scenarios.urgency,
    "simulation": scenarios.simulation,
    "idle": scenarios.idle,
    "memory": scenarios.memory,
    "import": scenarios.imports,
    "backlog": scenarios.backlogs,
    "dramatiq": peers.dramatiq_redis,
    "huey": peers.huey_sqlite,
}


def main(arguments: list[str]) -> int:
    """Run the scenarios asked for; 1 if one could not be measured, missed targets or not."""
    options = _parser().parse_args(arguments)
    if options.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:<16} {_title(scenario)}")
        return 0
    # Compiled beforehand: else each process would do it anew where bytecode isn't written.
    compileall.compile_file(ROOT / "dramalite.py", quiet=2)
    header = _header()
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    run = Run(QUICK_SIZES if options.quick else FULL_SIZES, options.repeat)
    started = time.monotonic()
    figures, failures = _measure(options.names or list(SCENARIOS), run)
    _print_summary(figures, failures, time.monotonic() - started)
    if options.json is not None:
        found = [figure.as_dict() for figure in figures]
        text = json.dumps({**header, "figures": found, "failures": failures}, indent=2)
        options.json.write_text(text + "\n")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", type=_scenario_name, metavar="NAME", help="scenarios to run"
    )
    parser.add_argument("--list", action="store_true", help="show the scenarios and leave")
    parser.add_argument("--repeat", type=_positive, default=3, metavar="N", help="default: 3")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def _scenario_name(text: str) -> str:
    if text not in SCENARIOS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of: {', '.join(SCENARIOS)}.")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more.")
    return number


def _header() -> dict[str, str]:
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": sqlite3.sqlite_version,
        "cores": f"{os.cpu_count()}{_load()}",
        "fsync": f"{_fsync_ms():.3f} ms (median, in {tempfile.gettempdir()})",
        "json.dumps": f"{dumps_us():.1f} us a message (how fast this interpreter is just now)",
        "command": " ".join(sys.orig_argv),
    }


def _load() -> str:
    """The load of the last minute, where the system tells."""
    return f" (load {os.getloadavg()[0]:.2f})" if hasattr(os, "getloadavg") else ""


def _fsync_ms() -> float:
    """Milliseconds of an fsync after a write of one page, where the databases will be."""
    taken = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for _ in range(50):
            file.write(bytes(4096))
            start = time.perf_counter()
            os.fsync(file.fileno())
            taken.append((time.perf_counter() - start) * 1000)
    return percentile(taken, 50)


def _measure(names: list[str], run: Run) -> tuple[list[Figure], dict[str, str]]:
    """Run scenarios, printing as they go; returns the figures, and why any failed."""
    figures: list[Figure] = []
    failures: dict[str, str] = {}
    for name in names:
        print(f"\n{name}: {_title(SCENARIOS[name])}", flush=True)
        before = _Busy.now()
        run.pace.read()
        try:
            for measured in SCENARIOS[name](run):
                figure = replace(measured, slowness=run.pace.slowness())
                print(figure.as_line(), flush=True)
                figures.append(figure)
        except Skipped as reason:
            print(f"  skipped: {reason}", flush=True)
        except Exception as error:  # Whatever a scenario meets, the others still run.
            failures[name] = f"{type(error).__name__}: {error}"
            print(f"  FAILED: {failures[name]}", flush=True)
            if not isinstance(error, BenchError):
                traceback.print_exc()
        _print_disturbance(before, _Busy.now())
    return figures, failures


@dataclass(frozen=True)
class _Busy:
    """Seconds so far: of time, of all cores' work, and of this process's and its children's."""

    time: float
    everybody: float
    own: float

    @classmethod
    def now(cls) -> _Busy:
        return cls(time.monotonic(), _busy_seconds(), sum(os.times()[:4]))


def _busy_seconds() -> float:
    """Seconds that all cores have worked since the start of the machine; 0 without /proc."""
    if not Path("/proc/stat").exists():
        return 0.0
    ticks = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
    idle_and_waiting = ticks[3] + ticks[4]
    return (sum(ticks) - idle_and_waiting) / os.sysconf("SC_CLK_TCK")


def _print_disturbance(before: _Busy, after: _Busy) -> None:
    """Say how much of the machine other programs took, if it was much."""
    others = (after.everybody - before.everybody) - (after.own - before.own)
    cores = others / (after.time - before.time)
    if cores > 0.1:
        print(f"  (meanwhile other programs kept {cores:.1f} cores busy)", flush=True)


def _title(scenario: Scenario) -> str:
    return (scenario.__doc__ or "").strip().splitlines()[0]


def _print_summary(figures: list[Figure], failures: dict[str, str], seconds: float) -> None:
    aimed = [figure for figure in figures if figure.target is not None]
    missed = [figure for figure in aimed if not figure.reached]
    print(f"\n{len(aimed) - len(missed)} of {len(aimed)} targets reached in {seconds:.0f} s.")
    really = sum(not figure.reached_at_target_pace for figure in aimed)
    print(f"{len(aimed) - really} at the pace of the targets: json.dumps in {TARGET_DUMPS_US} us a message.")
    for figure in missed:
        at_pace = " (not at the targets' pace)" if figure.reached_at_target_pace else ""
        print(f"  missed: {figure.name}{at_pace}")
    for name in failures:
        print(f"  failed: {name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
