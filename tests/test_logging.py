"""Logging: the names of loggers, whatever name the module has, and the form of lines on the command line."""

from __future__ import annotations

import logging
import re
import shutil

import pytest

import dramalite

from helpers import DEADLINE

PATIENCE = DEADLINE * 1000


class Some:
    """A class to name a logger after."""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("my.module",), "my.module"), (("my.module", "name"), "my.module.name"), (("my.module", Some), "my.module.Some")],
)
def test_a_logger_is_named_after_a_module_and_a_name_or_class(arguments, name):
    logger = dramalite.get_logger(*arguments)

    assert isinstance(logger, logging.Logger)
    assert logger.name == name
    assert logger is logging.getLogger(name)


def test_all_loggers_of_ours_are_under_one_name(broker, worker, caplog):
    caplog.set_level(logging.DEBUG)
    names = {item.logger.name for item in broker.middleware if hasattr(item, "logger")} | {broker.logger.name}

    def fail():
        raise ValueError("no")

    dramalite.actor(fail, max_retries=1, min_backoff=0).send()
    worker(broker).stop()
    names |= {record.name for record in caplog.records if not record.name.startswith(__name__)}

    assert len(names) > 5
    assert [name for name in names if not name.startswith("dramalite.")] == []


def test_loggers_of_the_middleware_are_called_as_in_dramatiq(broker):
    names = {item.logger.name.removeprefix("dramalite.") for item in broker.middleware if hasattr(item, "logger")}

    assert names >= {
        "middleware.age_limit.AgeLimit",
        "middleware.time_limit.TimeLimit",
        "middleware.shutdown.ShutdownNotifications",
        "middleware.callbacks.Callbacks",
        "middleware.pipelines.Pipelines",
        "middleware.retries.Retries",
        "results.middleware.Results",
    }
    assert broker.logger.name == f"dramalite.broker.{type(broker).__name__}"


def test_a_vendored_copy_logs_under_the_same_name(run_python, tmp_path):
    package = tmp_path / "app" / "vendor"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    shutil.copy(dramalite.__file__, package / "dramalite.py")
    result = run_python(
        "from app.vendor import dramalite as d; print(d.StubBroker().logger.name, d.Retries().logger.name)",
        PYTHONPATH=str(tmp_path),
    )

    assert result.stdout == "dramalite.broker.StubBroker dramalite.middleware.retries.Retries\n", result.stderr


def test_importing_sets_up_no_logging(run_python):
    result = run_python(
        "import logging, dramalite; print(logging.getLogger().handlers, logging.getLogger('dramalite').handlers, "
        "logging.getLogger('dramalite').level)"
    )

    assert result.stdout == "[] [] 0\n", result.stderr


def test_lines_of_a_worker_have_dramatiqs_form(run_python, tmp_path):
    (tmp_path / "jobs.py").write_text("import dramalite\n")
    result = run_python("import sys, dramalite; sys.exit(dramalite.main(['worker', 'jobs', '-p', '0']))")

    assert re.match(
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[PID \d+\] \[MainThread\] \[dramalite\.MainProcess\] \[INFO\] "
        r"dramalite \S+ is booting up\.\n",
        result.stderr,
    ), result.stderr


def test_a_handler_that_was_there_before_keeps_its_own_form(run_python, tmp_path):
    (tmp_path / "jobs.py").write_text("import dramalite\n")
    result = run_python(
        "import logging, sys, dramalite\n"
        "logging.basicConfig(format='MINE %(message)s', level='INFO', stream=sys.stdout)\n"
        "sys.exit(dramalite.main(['worker', 'jobs', '-p', '0']))"
    )

    assert re.match(r"MINE dramalite \S+ is booting up\.\n", result.stdout), result.stdout + result.stderr
    assert result.stderr == ""
