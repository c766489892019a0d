"""The command line of ``python -m benchmarks.faults``."""

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
from pathlib import Path

import benchmarks.faults
from benchmarks.faults.disks import NoDisk
from benchmarks.faults.kinds import KINDS
from benchmarks.faults.ledger import Entry, Ledger, table
from benchmarks.faults.runs import Hung, Unexpected
from benchmarks.faults.world import World
from benchmarks.label_job import processor, versions


def main(argv: Sequence[str] | None = None) -> int:
    """Inject until each kind has its number or the time is over; 1 if anything was lost or went wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=benchmarks.faults.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=8, help="injections of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
                        help=f"of {', '.join(KINDS)}")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="begin nothing new after this time")
    parser.add_argument(
        "--output", type=Path, default=Path("results/faults.jsonl"), help="file of what was counted"
    )
    arguments = parser.parse_args(given)
    ledger = Ledger(arguments.output, Entry)
    with tempfile.TemporaryDirectory(prefix="maskmill-faults-", ignore_cleanup_errors=True) as scratch:
        world = World(Path(scratch))
        try:
            impossible = _inject(world, ledger, arguments)
        finally:
            world.close()
    entries = [entry for entry in ledger.entries() if entry.seed == arguments.seed]
    print(table(entries, arguments.kinds))
    for entry in entries:
        for note in entry.notes:
            print(f"{entry.kind} {entry.first}: {note}")
    for kind, reason in impossible.items():
        print(f"{kind} cannot be injected here: {reason}")
    print(f"{processor()}, {os.cpu_count()} cores, {versions()}")
    print(f"command: python -m benchmarks.faults {shlex.join(given)}")
    bad = any(entry.lost or entry.doubled or entry.wrong or entry.hung for entry in entries)
    return int(bad or bool(impossible))


def _inject(world: World, ledger: Ledger[Entry], arguments: argparse.Namespace) -> dict[str, str]:
    """Inject what is missing, in turns; returns why kinds cannot be injected here."""
    began = time.monotonic()
    impossible: dict[str, str] = {}
    counts = dict.fromkeys(arguments.kinds, 0)
    for entry in ledger.entries():
        if entry.seed == arguments.seed and entry.kind in counts:
            counts[entry.kind] += entry.times
    world.reference  # noqa: B018  made here, so that no kind is charged for it
    while True:
        open_kinds = [kind for kind in counts if counts[kind] < arguments.times and kind not in impossible]
        over = arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes
        if not open_kinds or over:
            return impossible
        kind = min(open_kinds, key=counts.__getitem__)
        try:
            entry = inject(world, kind, arguments.seed, counts[kind], arguments.times - counts[kind])
        except NoDisk as reason:
            impossible[kind] = str(reason)
            continue
        ledger.add(entry)
        counts[kind] += entry.times
        bad = f", {entry.lost} lost, {entry.doubled} doubled, {entry.wrong} wrong, {entry.hung} hung"
        print(f"{kind}: {entry.times} in {entry.seconds:.0f} s{bad}", flush=True)
        for note in entry.notes:
            print(f"  {note}", flush=True)


def inject(world: World, kind: str, seed: int, first: int, most: int) -> Entry:
    """Inject between one and ``most`` faults of a kind, beginning with number ``first``."""
    began = time.monotonic()
    rng = random.Random(f"{seed}/{kind}/{first}")
    times, lost, doubled, wrong, hung = 1, 0, 0, 0, 0
    notes: list[str] = []
    try:
        injected = KINDS[kind](world, rng, most)
        times, verdict = injected.times, injected.verdict
        lost, doubled, wrong, notes = verdict.lost, verdict.doubled, verdict.wrong, verdict.notes
    except Hung as error:
        hung, notes = 1, [str(error)]
    except Unexpected as error:
        wrong, notes = 1, [str(error)]
    except NoDisk:
        raise
    except Exception:  # a fault of the benchmark, or a table that cannot even be read
        wrong, notes = 1, [traceback.format_exc()[-3000:]]
    seconds = round(time.monotonic() - began, 2)
    return Entry(kind, seed, first, times, lost, doubled, wrong, hung, seconds, notes)


if __name__ == "__main__":
    sys.exit(main())
