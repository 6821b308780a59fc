"""What the worker processes of the benchmark import; the environment names the file to serve."""

from __future__ import annotations

import os

import bench_actors
import dramalite

broker = dramalite.SQLiteBroker(os.environ["BENCH_DB"])
dramalite.set_broker(broker)
actors = bench_actors.declare(broker)
