"""Two runs at once on one output, runs that died elsewhere, and clocks that disagree."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import uuid
from pathlib import Path

from benchmarks.faults.processes import ENDS, kill_somewhere, take_some_away, wait_for_parts
from benchmarks.faults.runs import Command
from benchmarks.faults.world import OWN, Injected, Verdict, World, wrong

DAY_S = 86_400.0
REFUSED = "output_in_use"


def two_runs(world: World, rng: random.Random, most: int) -> Injected:
    """While a run works, others are refused; when it is killed, of two others one takes over."""
    output, verdict, times = world.folder("two-runs"), Verdict(), 0
    refusals = min(most - 1, 3)
    first = world.label(output, pace_s=0.4, environment=OWN)
    wait_for_parts(first, output, 1)
    others = []
    for _ in range(refusals):
        time.sleep(rng.uniform(0, 1))
        others.append(world.label(output, environment=OWN))
    for other in others:
        status = other.expect(0, 1)
        if REFUSED in other.said:
            times += 1
        elif first.runs:
            verdict = verdict.plus(wrong(f"a second run ended with {status}: {other.said[-500:]}"))
    if not first.runs:
        take_some_away(output, rng)
        first = world.label(output, pace_s=0.4, environment=OWN)
        wait_for_parts(first, output, 1)
    first.kill()
    heirs = [world.label(output, pace_s=0, environment=OWN) for _ in range(2)]
    statuses = [heir.expect(0, 1) for heir in heirs]
    if 0 not in statuses or any(
        status and REFUSED not in heir.said for heir, status in zip(heirs, statuses, strict=True)
    ):
        verdict = verdict.plus(wrong(f"of two heirs both failed: {[heir.said[-500:] for heir in heirs]}"))
    world.finish(output, environment=OWN)
    return Injected(times + 1, verdict.plus(world.judge(output)))


class _Elsewhere:
    """A run on a host that is out of sight, whose clock is wrong, and which may be alive."""

    def __init__(self, table: Path, skew_s: float, *, alive: bool) -> None:
        self._path, self._skew_s = table / "lease.json", skew_s
        self._holder = {"run_id": uuid.uuid4().hex, "host": "elsewhere", "pid": 4711, "cluster": False}
        self.beat()
        self._over = threading.Event()
        if alive:
            threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        while not self._over.wait(8):
            self.beat()

    def beat(self) -> None:
        now = time.time() + self._skew_s
        text = json.dumps(self._holder | {"started": now - 100, "heartbeat": now})
        # Put in place whole, as on any storage.
        temporary = self._path.with_name(f".{self._path.name}.elsewhere.tmp")
        temporary.write_text(text)
        temporary.rename(self._path)

    def end(self) -> None:
        self._over.set()


def stale_lease(world: World, rng: random.Random, most: int) -> Injected:
    """Runs elsewhere, dead or alive, by clocks that are hours or days off: the living are left alone."""
    times, verdict = min(most, 8), Verdict()
    tables = [world.copy_of_reference() for _ in range(times)]
    alive = [rng.random() < 0.4 for _ in tables]
    take_some_away(tables[0], rng)
    alive[0] = False
    others = [
        _Elsewhere(table, rng.choice((-1, 1)) * rng.uniform(0, 2 * DAY_S), alive=lives)
        for table, lives in zip(tables, alive, strict=True)
    ]
    commands = [world.label(table, images=world.everything, pace_s=0) for table in tables]
    for command, lives in zip(commands, alive, strict=True):
        status = command.expect(0, 1)
        if (REFUSED in command.said) != lives or bool(status) != lives:
            living = "alive" if lives else "dead"
            verdict = verdict.plus(wrong(f"elsewhere a run is {living}: {status}, {command.said[-500:]}"))
    for other, table in zip(others, tables, strict=True):
        other.end()
        (table / "lease.json").unlink(missing_ok=True)
        verdict = verdict.plus(world.judge_copy(table))
    return Injected(times, verdict)


def clock_skew(world: World, rng: random.Random, most: int) -> Injected:
    """Each run's clock is hours away from that of the one before, which was killed."""
    times = min(most, 4)
    output = world.folder("skewed")
    skews = (rng.choice((-1, 1)) * rng.uniform(60, 2 * DAY_S) for _ in itertools.count())

    def start() -> Command:
        return world.label(output, environment={**OWN, "FAULTS_SKEW_S": f"{next(skews):.0f}"})

    left = times
    while left:
        command = start()
        if kill_somewhere(command, output, "driver", rng):
            left -= 1
        if command.expect(*ENDS) == 0:
            take_some_away(output, rng)
    start().expect(0)
    return Injected(times, world.judge(output))
