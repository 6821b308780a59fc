"""The rules about the file itself that a machine can check: it is one file, it stands alone,
importing it does nothing, its contents are as listed, and a copy of it works anywhere."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import itertools
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import harness  # noqa: E402
from harness import MODULE, ROOT  # noqa: E402

TESTS = Path(__file__).resolve().parent
SOURCE = MODULE.read_text("utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
RULE = re.compile(r"# -{70,}$")

#: Modules that cost more than a script should pay before it uses them.
SLOW = """
    argparse asyncio concurrent.futures ctypes curses dataclasses difflib email http http.server html
    importlib.metadata multiprocessing pdb pickle pydoc socket socketserver sqlite3 ssl subprocess
    tempfile tkinter unittest urllib.request uuid webbrowser xml zipfile zoneinfo
""".split()


@pytest.fixture
def place(tmp_path):
    with harness.new_place(tmp_path) as place:
        yield place


def dramalite():
    return importlib.import_module("dramalite")


@functools.cache
def banners():
    """The titles of the sections with the numbers of their first lines (from 1), in order."""
    found, inside = [], False
    for number, line in enumerate(LINES, start=1):
        if RULE.match(line):
            if not inside:
                found.append((LINES[number].removeprefix("# ").strip(), number))
            inside = not inside
    return found


def section_of(line):
    """The title of the section that this line (from 1) belongs to; "" before the first."""
    return next((title for title, first in reversed(banners()) if first <= line), "")


def contents():
    """The titles that the module docstring lists under Contents, in order."""
    lines = ast.get_docstring(TREE).splitlines()
    listed = itertools.takewhile(lambda line: line.startswith(" "), lines[lines.index("Contents") + 1 :])
    return [line.strip() for line in listed]


def top_level(tree):
    """Statements at the top of a module, those in its `if` and `try` blocks included."""
    for node in tree.body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            for block in ("body", "orelse", "finalbody"):
                yield from top_level(ast.Module(getattr(node, block, []), []))
            for handler in getattr(node, "handlers", []):
                yield from top_level(ast.Module(handler.body, []))


def defined_names():
    """Names that the module defines at its top level; imports are not definitions."""
    names = set()
    for node in top_level(TREE):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                names |= {leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return names


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def python(*arguments, cwd, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


# It stands alone


def test_it_imports_the_standard_library_only():
    imported = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"Relative import in line {node.lineno}."
            imported.add(node.module.partition(".")[0])

    assert imported - sys.stdlib_module_names == set()


def test_it_runs_isolated_and_without_site_packages(tmp_path):
    result = python("-I", "-S", MODULE, "--version", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert dramalite().__version__ in result.stdout
    assert result.stderr == ""


def test_a_copy_alone_in_a_folder_is_complete(tmp_path):
    (tmp_path / "dramalite.py").write_text(SOURCE, "utf-8")
    script = "import dramalite; print(dramalite.__file__, len(dramalite.__all__) > 0)"
    result = python("-c", script, cwd=tmp_path)

    assert result.stdout.split() == [str(tmp_path / "dramalite.py"), "True"], result.stderr


def test_it_compiles_without_a_warning(tmp_path):
    script = f"import pathlib; compile(pathlib.Path({str(MODULE)!r}).read_text('utf-8'), 'dramalite.py', 'exec')"
    result = python("-W", "error", "-c", script, cwd=tmp_path)

    assert (result.returncode, result.stderr) == (0, "")


def test_the_licence_travels_with_the_file():
    tail = "\n".join(LINES[-40:])

    assert "MIT" in "\n".join(LINES[:60])
    assert "Permission is hereby granted, free of charge" in re.sub(r"\s*\n# ?", " ", tail)
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in re.sub(r"\s*\n# ?", " ", tail)


# Importing it does nothing

PROBE = textwrap.dedent("""
    import json, logging, os, random, signal, sys, threading, warnings

    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    seen = []

    def audit(event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
            seen.append("opened for writing: " + str(args[0]))
        elif event.partition(".")[0] in ("socket", "subprocess", "sqlite3", "shutil", "tempfile"):
            seen.append(event)
        elif event in ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.mkdir", "os.remove", "os.rename",
                       "os.chdir", "os.chmod", "os.putenv", "os.unsetenv", "os.kill", "fcntl.lockf", "signal.pthread_kill"):
            seen.append(event)

    def state():
        return {
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
            "root handlers": len(logging.getLogger().handlers),
            "root level": logging.getLogger().level,
            "environment": dict(os.environ),
            "folder": sorted(os.listdir(".")),
            "descriptors": sorted(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else [],
            "random": hash(random.getstate()),
            "hooks": [str(hook) for hook in (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.gettrace())],
            "warning filters": len(warnings.filters),
            "switch interval": sys.getswitchinterval(),
            "recursion limit": sys.getrecursionlimit(),
            "path": sys.path[:],
        }

    sys.path.insert(0, sys.argv[1])
    before = state()
    modules = set(sys.modules)
    sys.addaudithook(audit)
    import dramalite
    new_modules = sorted(set(sys.modules) - modules)
    seen_at_import = seen[:]
    after = state()
    loggers = [
        (name, [type(handler).__name__ for handler in logger.handlers], logger.level)
        for name, logger in logging.Logger.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and (logger.handlers or logger.level)
    ]
    changed = [key for key in before if before[key] != after[key]]
    print(json.dumps({"changed": changed, "loggers": loggers, "seen": seen_at_import, "modules": new_modules}))
""")


def imported_in_a_new_process(tmp_path):
    result = python("-B", "-c", PROBE, ROOT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_importing_it_changes_nothing_in_the_process(tmp_path):
    probe = imported_in_a_new_process(tmp_path)

    assert probe["changed"] == []
    assert probe["loggers"] == []


def test_importing_it_opens_starts_and_connects_nothing(tmp_path):
    assert imported_in_a_new_process(tmp_path)["seen"] == []


def test_importing_it_does_not_load_slow_modules(tmp_path):
    # Bare, so that modules which another import pulled in are not hidden.
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dramalite; print(*sys.modules)"
    loaded = python("-I", "-S", "-B", "-c", script, cwd=tmp_path).stdout.split()

    assert "dramalite" in loaded
    assert [name for name in SLOW if name in loaded] == []


def test_the_environment_is_not_read_at_import():
    readers = [
        node.lineno
        for statement in top_level(TREE)
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.If, ast.Try))
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]

    assert readers == []


def test_declaring_actors_on_the_default_broker_opens_no_file(tmp_path):
    script = "import dramalite\n@dramalite.actor\ndef add(x, y): return x + y\nprint(add(1, 2), add.message(1, 2))"
    result = python("-B", "-c", script, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})

    assert result.stdout.split() == ["3", "add(1,", "2)"], result.stderr
    assert list(tmp_path.iterdir()) == []


# Its contents


def test_contents_lists_the_sections_in_their_order():
    assert contents() == [title for title, _ in banners()]


def test_every_section_has_a_title_of_its_own():
    titles = [title for title, _ in banners()]

    assert len(titles) >= 15
    assert len(titles) == len(set(titles))
    assert [title for title in titles if not title or title.startswith("-")] == []


def test_no_stretch_of_code_goes_without_a_banner():
    starts = [first for _, first in banners()] + [len(LINES)]
    stretches = {section_of(first): next_ - first for first, next_ in zip(starts, starts[1:])}

    assert {title: length for title, length in stretches.items() if length > 450} == {}


def test_nothing_is_named_by_leftovers():
    leftovers = {"misc", "util", "utils", "utilities", "common", "helpers", "stuff", "various"}
    names = [title for title, _ in banners()] + sorted(defined_names())

    assert [name for name in names if leftovers & set(re.split(r"[\W_]+", name.lower()))] == []


def test_every_public_name_is_in_all_and_the_reverse():
    public = {name for name in defined_names() if not name.startswith("_")}
    listed = [name for name in dramalite().__all__ if not name.startswith("__")]

    assert public == set(listed)
    assert len(listed) == len(set(listed))


def test_every_name_in_all_exists_and_hides_no_builtin():
    module = dramalite()

    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert [name for name in module.__all__ if hasattr(builtins, name) and not name.startswith("__")] == []


def test_every_public_class_and_function_has_a_docstring():
    module = dramalite()
    described = {node.name: ast.get_docstring(node) for node in top_level(TREE) if hasattr(node, "name") and hasattr(node, "body")}

    assert [name for name in module.__all__ if name in described and not described[name]] == []


def test_every_function_is_annotated():
    bare = []
    for node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        if node.returns is None or any(argument.annotation is None for argument in arguments):
            bare.append(f"{node.name} (line {node.lineno})")

    assert bare == []


def test_no_debts_are_noted_in_the_file():
    assert [line for line in LINES if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line)] == []


def test_time_is_read_and_spent_in_the_clock_section_only():
    outside = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            outside.append(f"line {node.lineno}: from time import")
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, (ast.Name, ast.Attribute)):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
        reads_time = owner == "time" and isinstance(node.value, ast.Name)
        reads_date = owner in ("datetime", "date") and node.attr in ("now", "utcnow", "today")
        if (reads_time or reads_date) and section_of(node.lineno) != "Clock":
            outside.append(f"line {node.lineno}: {owner}.{node.attr}")

    assert outside == []


def test_no_handler_catches_everything_or_swallows_in_silence():
    bare = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler) and node.type is None]
    silent = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.ExceptHandler)
        and {leaf.id for leaf in ast.walk(node.type or node) if isinstance(leaf, ast.Name)} & {"Exception", "BaseException"}
        and all(isinstance(statement, ast.Pass) or is_constant(statement) for statement in node.body)
    ]

    assert (bare, silent) == ([], [])


def is_constant(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def test_zero_is_not_taken_for_absent():
    # `delay_ms or default`: a number that may be 0 needs `is None`.
    suspects = []
    for function in functions():
        numbers = {
            argument.arg
            for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            if argument.annotation is not None
            and re.fullmatch(r"(int|float)( \| None)?|None \| (int|float)|Optional\[(int|float)\]", ast.unparse(argument.annotation))
        }
        for node in ast.walk(function):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Return)) and isinstance(node.value, ast.BoolOp):
                first = node.value.values[0]
                if isinstance(node.value.op, ast.Or) and isinstance(first, ast.Name):
                    if first.id in numbers or re.search(r"_(ms|s|seconds)$", first.id):
                        suspects.append(f"line {node.lineno}: {ast.unparse(node.value)}")

    assert suspects == []


def test_an_assertion_names_the_test_that_shows_it():
    tests = "\n".join(path.read_text("utf-8") for path in TESTS.rglob("test_*.py"))
    unnamed = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.Assert):
            around = "\n".join(LINES[max(0, node.lineno - 3) : node.end_lineno])
            names = re.findall(r"\btest_\w+", around)
            if not any(re.search(rf"\b(def )?{name}\b", tests) for name in names):
                unnamed.append(node.lineno)

    assert unnamed == []


def test_sqlite_files_are_never_opened_as_plain_files():
    # Closing such a descriptor would drop SQLite's own locks; on the log, "-wal", it has none.
    opened = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("open", "io.open", "os.open")
        and re.search(r"-shm", ast.unparse(node))
    ]

    assert opened == []


def test_stored_data_is_never_unpickled_or_evaluated():
    pickling = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and ast.unparse(node) in ("pickle.loads", "pickle.load", "marshal.loads")]
    evaluating = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec")]

    assert evaluating == []
    assert [section_of(line) for line in pickling if section_of(line) != "Encoders"] == []


# Its version


def test_the_version_is_near_the_top_of_the_file():
    assert any(re.match(r'__version__ = "\d+\.\d+\.\d+', line) for line in LINES[:120])


def test_the_version_is_the_changelogs_newest():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[?v?(\d+\.\d+[\w.]*)", changelog, re.MULTILINE)

    assert dramalite().__version__ == versions[0]


def test_the_package_reads_its_version_from_the_file():
    project = (ROOT / "pyproject.toml").read_text("utf-8")

    assert re.search(r"^dynamic *=.*version", project, re.MULTILINE)
    assert not re.search(r"^version *= *[\"']", project, re.MULTILINE)
    assert not re.search(r"^dependencies *= *\[ *[\"']", project, re.MULTILINE)


# A copy works wherever it is put

TASKS = """
    import os, sys
    {imports}
    broker = dramalite.SQLiteBroker(os.environ["JOBS_DB"])
    dramalite.set_broker(broker)

    @dramalite.actor(max_retries=0)
    def ping(number):
        current = dramalite.CurrentMessage.get_current_message()
        twins = [
            name for name, module in list(sys.modules.items())
            if getattr(module, "__file__", None) and os.path.samefile(module.__file__, dramalite.__file__)
            and name not in ("__main__", "__mp_main__", dramalite.__name__)
        ]
        with open(os.environ["JOBS_JOURNAL"], "a") as journal:
            journal.write(f"ping {{number}} {{dramalite.__name__}} {{dramalite.get_broker() is broker}} {{len(twins)}}\\n")
"""


def run_one_job_and_stop(place, tree):
    place.send("ping", 1)
    place.wait_until(lambda: place.notes("ping"), "the worker of the copy runs a job")
    tree.signal(harness.signal.SIGTERM)
    assert tree.wait() == 0, tree.tail()
    return place.notes("ping")


def vendored(place):
    package = place.folder / "app"
    (package / "vendor").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "vendor" / "__init__.py").touch()
    (package / "tasks.py").write_text(textwrap.dedent(TASKS.format(imports="from app.vendor import dramalite")), "utf-8")
    return harness.copy_module(package / "vendor")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")
class TestACopy:
    def test_a_vendored_copy_shares_one_module_with_the_users_code(self, place):
        vendored(place)
        command = [sys.executable, "-m", "app.vendor.dramalite", "worker", "app.tasks", "--processes", "1", "--threads", "2"]
        tree = place.start(command, PYTHONPATH="")

        assert run_one_job_and_stop(place, tree) == [["ping", "1", "app.vendor.dramalite", "True", "0"]]

    def test_a_copy_run_by_its_path_shares_one_module_with_the_users_code(self, place):
        harness.copy_module(place.folder)
        (place.folder / "tasks.py").write_text(textwrap.dedent(TASKS.format(imports="import dramalite")), "utf-8")
        command = [sys.executable, "dramalite.py", "worker", "tasks", "--processes", "1", "--threads", "2"]
        tree = place.start(command, PYTHONPATH="")

        assert run_one_job_and_stop(place, tree) == [["ping", "1", "dramalite", "True", "0"]]

    def test_an_isolated_interpreter_finds_the_copy_it_was_given(self, place):
        (place.folder / "tasks.py").write_text(textwrap.dedent(TASKS.format(imports="import dramalite")), "utf-8")
        command = [sys.executable, "-I", str(MODULE), "worker", "tasks", "--processes", "1", "--path", str(place.folder)]
        tree = place.start(command)

        assert run_one_job_and_stop(place, tree) == [["ping", "1", "dramalite", "True", "0"]]

    def test_a_copy_inside_a_package_run_by_its_path_is_refused_with_the_right_command(self, place):
        copy = vendored(place)
        command = [sys.executable, str(copy), "worker", "app.tasks", "--processes", "1", "--path", str(place.folder)]
        tree = place.start(command, PYTHONPATH=str(place.folder))

        assert tree.wait() == 2, tree.tail()
        assert "-m app.vendor.dramalite" in tree.output()


# The tests themselves


@functools.cache
def modules_of_tests():
    """Each test module's path, and all that is in its tree."""
    return [(path, list(ast.walk(ast.parse(path.read_text("utf-8"))))) for path in sorted(TESTS.rglob("test_*.py"))]


def last_name(node):
    """The name that an expression ends with, if it does; to write it out takes far longer."""
    return getattr(node, "attr", None) or getattr(node, "id", "")


def sleeping_calls(path, nodes):
    """Calls of time.sleep() in a test module, but for those in actors, where they stand for work."""
    work = [
        node
        for node in nodes
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and any("actor" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    allowed = {call for function in work for call in ast.walk(function)}
    return [
        f"{path.relative_to(TESTS)}:{node.lineno}"
        for node in nodes
        if isinstance(node, ast.Call) and last_name(node.func) == "sleep"
        if ast.unparse(node.func) in ("time.sleep", "sleep") and node not in allowed
    ]


def test_no_test_waits_by_sleeping():
    assert [call for path, nodes in modules_of_tests() for call in sleeping_calls(path, nodes)] == []


def test_no_test_leans_on_a_private_name_of_the_module():
    private = [
        f"{path.relative_to(TESTS)}:{node.lineno}: {ast.unparse(node)}"
        for path, nodes in modules_of_tests()
        if path != Path(__file__).resolve()
        for node in nodes
        if (isinstance(node, ast.Attribute) and node.attr.startswith("_"))
        or (isinstance(node, ast.Call) and node.args and last_name(node.func) == "setattr")
        if re.match(r"(dramalite|dramatiq)\._[^_]|monkeypatch\.setattr\((dramalite|dramatiq), '_", ast.unparse(node))
    ]

    assert private == []
