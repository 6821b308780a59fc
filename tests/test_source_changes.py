"""Which files `worker --watch` looks at, and what it takes for a change."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import harness  # noqa: E402

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")


@pytest.fixture
def place(tmp_path):
    with harness.new_place(tmp_path) as place:
        yield place


@pytest.fixture
def source(tmp_path):
    """The watched folder, apart from the one that the workers run in."""
    folder = tmp_path / "source"
    make(folder, "a.py", "page.html", "old/b.py", "old/notes.txt", "__pycache__/c.py")
    return folder


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


def changes(tree):
    """The changes that the worker was started anew for."""
    return re.findall(r"Reloading after a change of (\S+)\.\n", tree.output())


def change(path):
    """Change a file at once, so that nobody sees it half written, which would be a change of its own."""
    new = path.with_name(f"{path.name}.new")
    new.write_text("changed text")
    new.replace(path)


def change_unwatched_then(place, tree, unwatched, last):
    """Change what must go unnoticed, let the watch look, then change `last` and await that."""
    for path in unwatched:
        change(path)
    harness.let_pass(0.8)  # More than one look.
    change(last)
    place.wait_until(lambda: changes(tree), f"the change of {last} is seen")


def test_python_files_in_all_folders_are_watched_and_nothing_else(place, source):
    tree = place.ready_worker("--watch", str(source))
    unwatched = [source / "page.html", source / "old/notes.txt", source / "__pycache__/c.py"]
    (source / "a.py").read_text()
    change_unwatched_then(place, tree, unwatched, source / "old/b.py")

    assert changes(tree) == ["old/b.py"]


def test_patterns_add_to_the_watched_files_and_take_from_them(place, source):
    tree = place.ready_worker("--watch", str(source), "-i", "*.html", "-x", "old/*", "-x", "a*")
    change_unwatched_then(place, tree, [source / "a.py", source / "old/b.py"], source / "page.html")

    assert changes(tree) == ["page.html"]


def test_files_that_come_and_go_are_changes(place, source):
    tree = place.ready_worker("--watch", str(source))
    change(source / "new.py")
    place.wait_until(lambda: changes(tree) == ["new.py"], "the new file is seen")
    (source / "old/b.py").unlink()

    place.wait_until(lambda: changes(tree) == ["new.py", "old/b.py"], "the removal is seen")


def test_patterns_are_not_for_what_is_above_the_folder(place, source):
    home = source / "build" / "project"
    make(home, "a.py", "build/b.py")
    tree = place.ready_worker("--watch", str(home), "-x", "build/*", "-i", "project/*")
    make(home, "page.html")
    change_unwatched_then(place, tree, [home / "build/b.py"], home / "a.py")

    assert changes(tree) == ["a.py"]


def test_a_second_change_within_its_second_is_not_hidden_by_compiled_code(place, source):
    place.jobs("""
        import sys

        @dramalite.actor
        def tell():
            note("writes", not sys.dont_write_bytecode)
    """)
    place.ready_worker("--watch", str(source), PYTHONDONTWRITEBYTECODE="")
    place.send("tell")

    place.wait_until(lambda: place.notes("writes"), "the job runs")
    assert place.runs("writes") == {"False": 1}


@pytest.mark.parametrize("given", ["{source}", "./source", "source/"])
def test_patterns_may_begin_with_the_folders_path_as_it_is_given_or_whole(place, source, given):
    folder = given.format(source=source)
    page = f"{source}/*.html"
    tree = place.ready_worker("--watch", folder, "-x", f"{folder.rstrip('/')}/old/*", "-i", page)
    change_unwatched_then(place, tree, [source / "old/b.py"], source / "page.html")

    assert changes(tree) == ["page.html"]
