"""The command line of ``python -m benchmarks.fuzz``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import benchmarks.fuzz
from benchmarks.fuzz.kind import KINDS, kind_of
from benchmarks.fuzz.worker import Result, Worker, random_of, serve

MOST_FAULTS = 50
"""Of a kind; more would say no more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run until the time is over; 1 if an input failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=benchmarks.fuzz.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to run, all kinds together")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, help="at most so many inputs of each kind")
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz-failures"), help="folder of failing inputs"
    )
    parser.add_argument("--module", help=argparse.SUPPRESS)  # in a subprocess, like the next two
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        serve(arguments.module, arguments.seed, arguments.worker, arguments.answers)
        return 0
    modules = [KINDS[name] for name in arguments.kinds]
    return run(modules, arguments)


def run(modules: Sequence[str], arguments: argparse.Namespace) -> int:
    """Try inputs of kinds, by their modules."""
    runs = [Run(module, arguments.seed, arguments.first, arguments.failures) for module in modules]
    last = None if arguments.count is None else arguments.first + arguments.count
    end = time.monotonic() + 60 * arguments.minutes
    try:
        while time.monotonic() < end:
            open_runs = [each for each in runs if not each.over(last)]
            if not open_runs:
                break
            min(open_runs, key=lambda each: each.spent).step()
    finally:
        for each in runs:
            each.close()
    for each in runs:
        print(each.summary)
    faults = sum(each.faults for each in runs)
    if faults:
        print(f"{faults} fault(s); the inputs are in {arguments.failures}")
    return int(bool(faults))


class Run:
    """The inputs of a kind.

    Args:
        module: of the kind.
        seed: of the inputs.
        first: number of the first input.
        failures: folder of the failing ones.

    Attributes:
        spent: seconds so far.
        faults: number of failing inputs.
    """

    def __init__(self, module: str, seed: int, first: int, failures: Path) -> None:
        self.spent = 0.0
        self.faults = 0
        self._module, self._seed, self._number, self._failures = module, seed, first, failures
        self._name = module.rpartition(".")[2]
        self._kind = kind_of(module)
        self._outcomes: Counter[str] = Counter()
        self._slowest = 0.0
        self._worker: Worker | None = None

    def over(self, last: int | None) -> bool:
        """Whether there is nothing more to try."""
        return self.faults >= MOST_FAULTS or (last is not None and self._number >= last)

    def step(self) -> None:
        """Try the next input."""
        began = time.monotonic()
        if self._worker is None:
            self._worker = Worker(self._module, self._seed)
        started = time.monotonic()
        result = self._worker.try_input(self._number, self._kind.seconds)
        self._slowest = max(self._slowest, time.monotonic() - started)
        if result.memory_mb > self._kind.memory_mb and not result.fault:
            result = Result("memory", f"{result.memory_mb:.0f} MB after {result.outcome}", result.memory_mb)
        self._outcomes[result.outcome] += 1
        if result.fault:
            self.faults += 1
            self._keep(result)
        # Resident memory never falls again, so a subprocess that is half full is replaced.
        if result.fault or not self._worker.alive or result.memory_mb > self._kind.memory_mb / 2:
            self.close()
        self._number += 1
        self.spent += time.monotonic() - began

    def _keep(self, result: Result) -> None:
        self._failures.mkdir(parents=True, exist_ok=True)
        base = self._failures / f"{self._name}-{self._seed}-{self._number}"
        base.with_suffix(".txt").write_text(f"{result.outcome}\n\n{result.fault}\n", encoding="utf-8")
        rng = random_of(self._seed, self._module, self._number)
        base.with_suffix(".bin").write_bytes(self._kind.make(rng))
        reason = result.fault.strip().splitlines()[-1][:200] if result.fault.strip() else ""
        print(f"{self._name} {self._number}: {result.outcome}: {reason}", flush=True)

    def close(self) -> None:
        """End the subprocess."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    @property
    def summary(self) -> str:
        """Counts by outcome."""
        counts = ", ".join(f"{times} {outcome}" for outcome, times in self._outcomes.most_common())
        total = sum(self._outcomes.values())
        faults = f"{self.faults} faults, slowest {self._slowest:.1f} s"
        return f"{self._name}: {total} inputs, {faults}; {counts or 'none'}"


if __name__ == "__main__":
    sys.exit(main())
