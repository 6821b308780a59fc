"""Faults: kills, restarts, contention, poison, full disks, bad files, forks, odd endings, hostile data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import harness  # noqa: E402


def pytest_collection_modifyitems(items):
    if not sys.platform.startswith("linux"):
        for item in items:
            if HERE in Path(item.path).parents:
                item.add_marker(pytest.mark.skip(reason="finds processes through /proc"))


@pytest.fixture
def place(tmp_path):
    with harness.new_place(tmp_path) as place:
        yield place
