"""Runs all contenders in turn, in shuffled order in each round, and reports.

Standard library only, but for the picture. Each contender is a process in an environment of its own,
see worker.py; a measure is taken from all of them, one after the other, before the next measure.
Two processes of one contender differ by some percent for as long as they run, so all contenders are
started anew every few rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

ENVIRONMENTS = {
    "stock": "stock",
    "stock-orjson": "orjson",
    # With orjson, so that what differs from this kernel is not how JSON is written.
    "stock-curve": "orjson",
    "curve": "curve",
    "curve-unsigned": "curve",
    "curve-any": "curve",
    "bare": "curve",
}
# How many times in one round, so that one sample is long enough to be measured.
COUNTS = {"execute": 20, "input": 20, "complete": 10, "comm": 20, "spawn": 10, "client": 20}
ROUNDS_OF_A_PROCESS = 5
# In the last processes, after all rounds: in one kernel of each contender.
ONCE = {"churn": 1000}


class Worker:
    """A contender's process."""

    def __init__(self, name: str, python: Path, home: Path) -> None:
        self.name = name
        home.mkdir(mode=0o700)
        removed = ("JUPYTER_", "IPYTHON", "PYTHON", "JPY_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(removed)}
        self.log = (home / "log").open("w+")
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name("worker.py"), name],
            env={**env, "HOME": str(home)},
            cwd=home,  # not the repository, whose files would be imported instead of those installed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
        )
        self.measures: list[str] = []
        self.versions: dict[str, str] = {}

    def wait_until_ready(self) -> None:
        about = self._answer()
        self.measures, self.versions = about["measures"], about["versions"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"{self.name} ended:\n{self.log.read()[-5000:]}")
        return json.loads(line)

    def measure(self, measure: str, count: int) -> dict[str, float]:
        assert self._process.stdin is not None
        print(json.dumps({"measure": measure, "count": count}), file=self._process.stdin)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self.log.close()


@contextlib.contextmanager
def workers(environments: Path) -> Iterator[list[Worker]]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        started: list[Worker] = []
        try:
            for name, environment in ENVIRONMENTS.items():
                python = environments.absolute() / environment / "bin" / "python"
                started.append(Worker(name, python, Path(folder) / name))
            for one in started:
                one.wait_until_ready()
            yield started
        finally:
            for one in started:
                one.close()


Samples = dict[str, dict[str, list[dict[str, float]]]]


def take(samples: Samples, contenders: list[Worker], measure: str, count: int) -> None:
    """One sample of a measure from each contender that has it."""
    order = [one for one in contenders if measure in one.measures]
    random.shuffle(order)
    for one in order:
        samples.setdefault(measure, {}).setdefault(one.name, []).append(one.measure(measure, count))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    rounds = 3 if arguments.smoke else arguments.rounds
    counts = dict.fromkeys([*COUNTS, *ONCE], 2) if arguments.smoke else {**COUNTS, **ONCE}
    samples: Samples = {}
    for first in range(0, rounds, ROUNDS_OF_A_PROCESS):
        last = min(first + ROUNDS_OF_A_PROCESS, rounds)
        with workers(arguments.environments) as contenders:
            measures = list(dict.fromkeys(name for one in contenders for name in one.measures))
            chosen = arguments.only or measures
            if unknown := set(chosen) - set(measures):
                sys.exit(f"no such measure: {', '.join(unknown)}; there are {', '.join(measures)}")
            for number in range(first if arguments.smoke else first - 1, last):
                warm_up = number < first
                shown = "warm-up" if warm_up else f"round {number + 1} of {rounds}"
                seconds = time.monotonic() - start
                print(f"\r{shown}, {seconds:.0f} s ", end="", file=sys.stderr, flush=True)
                for name in chosen:
                    if name not in ONCE:
                        take({} if warm_up else samples, contenders, name, counts.get(name, 1))
            if last == rounds:
                for name in [name for name in chosen if name in ONCE]:
                    take(samples, contenders, name, counts[name])
            versions = {one.name: one.versions for one in contenders}
    print(file=sys.stderr)
    return {
        "rounds": rounds,
        "rounds_of_a_process": ROUNDS_OF_A_PROCESS,
        "seconds": round(time.monotonic() - start),
        "cores": os.cpu_count(),
        "clients_that_came_and_went": counts["churn"],
        "versions": versions,
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/run", description="This kernel beside stock.")
    parser.add_argument("--rounds", type=int, default=30, help="of each measure [30]")
    parser.add_argument("--only", action="append", metavar="MEASURE", help="may be given several times")
    parser.add_argument("--smoke", action="store_true", help="three short rounds, no goals")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="only report what was measured before"
    )
    parser.add_argument("--compare", type=Path, metavar="JSON", help="whether an earlier run agrees")
    parser.add_argument("--environments", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # So that the contenders are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results = json.loads(arguments.report.read_text()) if arguments.report else run(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(results) + "\n")
    table = report.table(results)
    (arguments.output / "table.md").write_text(table)
    report.picture(results, arguments.output / "benchmark.svg")
    print(table)
    if arguments.compare:
        print(report.comparison(results, json.loads(arguments.compare.read_text())))
    print(f"results.json, table.md and benchmark.svg are in {arguments.output}", file=sys.stderr)
    sys.exit(0 if arguments.smoke or arguments.only or report.all_met(results) else 1)


if __name__ == "__main__":
    main()
