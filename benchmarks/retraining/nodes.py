"""A retraining on a cluster of three nodes loses one of those that work."""

from __future__ import annotations

import random
import time

from benchmarks.faults.processes import TARGETS
from benchmarks.faults.runs import Unexpected
from benchmarks.retraining.judging import Cost, judge
from benchmarks.retraining.killed import TRIES
from benchmarks.retraining.results import step_name
from benchmarks.retraining.world import Worlds

_WORKS = {"label": "actor", "train": "trainer"}


def lost(worlds: Worlds, rng: random.Random, step: str) -> Cost:
    """A node is lost in the middle of ``label`` or ``train``, and replaced at once."""
    three, world = worlds.nodes
    reference, name = world.reference, step_name(step)
    title = TARGETS[_WORKS[step]][0]
    for _ in range(TRIES):
        world.begin()
        command = world.tick()
        world.wait_for(command, name)
        while command.runs and not three.working(title):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        if three.lose(title, rng):
            break
        command.expect(0)
    else:
        raise Unexpected(f"no node could be lost in {name}")
    three.replace()
    status = command.expect(0, 1)
    stopped = [name] * (status == 1)
    if status:
        world.finish(world.tick, 0)
    return judge(world, champion="2", stopped=stopped, reference=reference)
