"""What huey's consumer imports: the same no-op on SqliteHuey with its default options."""

from __future__ import annotations

import os

from huey import SqliteHuey

huey = SqliteHuey(filename=os.environ["BENCH_DB"])


@huey.task()
def noop() -> None:
    """Do nothing."""
