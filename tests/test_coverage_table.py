"""tests/README.md says which test shows what: each test that it names exists, each row names one."""

from __future__ import annotations

import functools
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
README = (TESTS / "README.md").read_text("utf-8")

#: `module`: `test_one`, `test_other`
NAMED = re.compile(r"`((?:\w+/)?test_\w+)`: (`test_\w+`(?:, `test_\w+`)*)")


def rows():
    """The rows of the tables, as (item, what, cell)."""
    cells = [
        tuple(cell.strip() for cell in line.strip("|").split(" | "))
        for line in README.splitlines()
        if line.startswith("|")
    ]
    return [row for row in cells if row[0] != "item" and not row[0].startswith("---")]


def named(cell):
    """The tests that a cell names, as (module, test)."""
    return [
        (module, test) for module, tests in NAMED.findall(cell) for test in re.findall(r"`(\w+)`", tests)
    ]


@functools.cache
def defined_in(module):
    """The tests of a module; none where there is no such module."""
    path = TESTS / f"{module}.py"
    if not path.exists():
        return set()
    return set(re.findall(r"^ *(?:async )?def (test_\w+)\(", path.read_text("utf-8"), re.MULTILINE))


def items(text):
    """The items of a row's first cell: "1.2.1, 1.2.2" and "1.2.1–1.2.3" are several."""
    found = []
    for part in text.split(", "):
        first, _, last = part.partition("–")
        found.append(first)
        if last:
            stem, _, number = first.rpartition(".")
            found += [f"{stem}.{n}" for n in range(int(number) + 1, int(last.rpartition(".")[2]) + 1)]
    return found


def test_each_test_that_the_tables_name_exists():
    tests = {module: defined_in(module) for _, _, cell in rows() for module, _ in named(cell)}
    missing = [
        f"{item}: {module}: {test}"
        for item, _, cell in rows()
        for module, test in named(cell)
        if test not in tests[module]
    ]

    assert missing == []


def test_each_row_names_a_test_and_nothing_else_or_says_why_there_is_none():
    wrong = []
    for item, _, cell in rows():
        if not (cell.startswith("none: ") and len(cell) > 40 or named(cell)):
            wrong.append(f"{item}: {cell}")
        elif named(cell) and re.sub(NAMED, "", cell).strip("; "):
            wrong.append(f"{item}: {re.sub(NAMED, '', cell)}")

    assert wrong == []


def test_each_row_has_an_item_and_says_what_it_is():
    assert len(rows()) > 100
    assert [row for row in rows() if len(row) != 3 or not row[1]] == []
    assert [row[0] for row in rows() if not re.fullmatch(r"K\d+|[\d.,– ]+", row[0])] == []


def test_the_known_problems_are_all_there():
    found = [int(row[0][1:]) for row in rows() if row[0].startswith("K")]

    assert found == [number for number in range(1, 49) if number != 41]


def test_the_items_come_in_their_order():
    numbers = [
        [tuple(map(int, part.split("."))) for part in items(row[0])] for row in rows() if not row[0].startswith("K")
    ]
    firsts = [row[0] for row in numbers]

    assert firsts == sorted(firsts)
