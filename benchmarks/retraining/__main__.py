"""The command line of ``python -m benchmarks.retraining``."""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import benchmarks.retraining
from benchmarks.faults.ledger import LOSSES, Entry, Ledger, table
from benchmarks.faults.runs import Hung, Unexpected
from benchmarks.label_job import processor, versions
from benchmarks.retraining.cases import CASES
from benchmarks.retraining.growing import draw, grow
from benchmarks.retraining.growing import table as growing_table
from benchmarks.retraining.judging import Cost
from benchmarks.retraining.luck import luck_table
from benchmarks.retraining.world import Worlds


@dataclass(frozen=True)
class Counted(Entry):
    """What one case has cost.

    Attributes:
        promoted: wrong promotions.
    """

    promoted: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run each case until it has its number or the time is over; 1 if anything went wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retraining",
        description=benchmarks.retraining.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=1, help="of each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME",
                        help=f"of {', '.join(CASES)}")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="begin nothing new after this time")
    parser.add_argument(
        "--output", type=Path, default=Path("results/retraining.jsonl"), help="file of what was counted"
    )
    parser.add_argument(
        "--scratch", type=Path, help="keep what the cases begin from here; default: it is made anew"
    )
    parser.add_argument("--luck", action="store_true", help="count how often luck is promoted")
    parser.add_argument("--growing", type=Path, metavar="PNG", help="three ticks; write a chart here")
    arguments = parser.parse_args(given)
    ledger = Ledger(arguments.output, Counted)
    with tempfile.TemporaryDirectory(prefix="retraining-", ignore_cleanup_errors=True) as scratch:
        worlds = Worlds(arguments.scratch or Path(scratch))
        try:
            if arguments.luck:
                print(luck_table(worlds.local, arguments.seed))
            if arguments.growing:
                grown = grow(worlds.growing)
                print(growing_table(grown))
                draw(grown, arguments.growing)
            if arguments.luck or arguments.growing:
                _print_origin(given)
                return 0
            run_cases(
                worlds,
                ledger,
                arguments.cases,
                seed=arguments.seed,
                times=arguments.times,
                minutes=arguments.minutes,
            )
        finally:
            worlds.close()
    entries = [entry for entry in ledger.entries() if entry.seed == arguments.seed]
    losses = ("promoted", *LOSSES)
    print(table(entries, arguments.cases, losses))
    for entry in entries:
        for note in entry.notes:
            print(f"{entry.kind} {entry.first}: {note}")
    _print_origin(given)
    return int(any(getattr(entry, loss) for entry in entries for loss in losses))


def _print_origin(given: Sequence[str]) -> None:
    print(f"{processor()}, {os.cpu_count()} cores, {versions()}")
    print(f"command: python -m benchmarks.retraining {shlex.join(given)}")


def run_cases(
    worlds: Worlds,
    ledger: Ledger[Counted],
    cases: Sequence[str],
    *,
    seed: int = 0,
    times: int = 1,
    minutes: float | None = None,
) -> None:
    """Run what the ledger lacks; arguments as on the command line."""
    began = time.monotonic()
    counts = dict.fromkeys(cases, 0)
    for entry in ledger.entries():
        if entry.seed == seed and entry.kind in counts:
            counts[entry.kind] += entry.times
    for number in range(times):
        for name in cases:
            if counts[name] > number:
                continue
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                return
            entry = run_case(worlds, name, seed, number)
            ledger.add(entry)
            losses = ", ".join(f"{getattr(entry, loss)} {loss}" for loss in ("promoted", *LOSSES))
            print(f"{name}: {entry.seconds:.0f} s, {losses}", flush=True)
            for note in entry.notes:
                print(f"  {note}", flush=True)


def run_case(worlds: Worlds, name: str, seed: int, number: int) -> Counted:
    """Run a case once."""
    began = time.monotonic()
    cost, hung = Cost(), 0
    try:
        cost = CASES[name](worlds, random.Random(f"{seed}/{name}/{number}"))
    except Hung as error:
        hung, cost.notes = 1, [str(error)]
    except Unexpected as error:
        cost.add("wrong", 1, str(error))
    except Exception:  # a fault of the benchmark, or an output that cannot even be read
        cost.add("wrong", 1, traceback.format_exc()[-3000:])
    seconds = round(time.monotonic() - began, 2)
    return Counted(
        name, seed, number, 1, cost.lost, cost.doubled, cost.wrong, hung, seconds, cost.notes, cost.promoted
    )


if __name__ == "__main__":
    sys.exit(main())
