"""The benchmark runs and prints figures; how good they are is not a matter of tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("bench.py")

CHEAP = (
    "sends", "threads", "bulk", "drain", "results", "coroutines", "memory-brokers", "latency", "simulation",
    "import",
)  # fmt: skip


@pytest.mark.torture
def test_the_benchmark_prints_a_figure_for_each_cheap_scenario(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH), *CHEAP]
    command += ["--quick", "--repeat", "1", "--json", str(report)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = json.loads(report.read_text())
    assert found["failures"] == {}
    assert len(found["figures"]) == 25
    assert all(figure["median"] > 0 for figure in found["figures"])
    assert all(figure["name"] in done.stdout for figure in found["figures"])


def test_the_benchmark_refuses_a_name_it_does_not_have() -> None:
    done = subprocess.run([sys.executable, BENCH, "nonesuch"], capture_output=True, text=True)

    assert done.returncode == 2
    assert "nonesuch" in done.stderr
