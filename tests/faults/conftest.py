"""Faults: kills, restarts, contention, poison, full disks, bad files, forks, odd endings, hostile data."""

from __future__ import annotations

import functools
import shutil
import subprocess
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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A function that makes a library to preload of a C file of this folder."""

    @functools.cache
    def compile(name):
        if shutil.which("gcc") is None:
            pytest.skip("Libraries to preload are compiled with gcc.")
        library = tmp_path_factory.mktemp("compiled") / f"{name}.so"
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(HERE / name), "-ldl"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return str(library)

    return compile
