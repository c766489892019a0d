"""The driver is killed in each step of a tick, or MLflow's server before and in the promotion."""

from __future__ import annotations

import random
import time

from benchmarks.faults.runs import Command, Unexpected
from benchmarks.retraining.judging import Cost, judge
from benchmarks.retraining.results import step_name
from benchmarks.retraining.world import World

TRIES = 8
"""How often a case begins anew because the kill came when the step was over."""


def driver(world: World, rng: random.Random, step: str) -> Cost:
    """SIGKILL when a step begins, and again at a random moment of it; then the same command again."""
    reference, name = world.reference, step_name(step)
    for attempt in range(TRIES):
        world.begin(name)
        stopped = world.attempts()
        command = world.tick()
        _wait_within(world, command, name, rng, attempt)
        command.kill()
        if name in world.attempts():
            break
    else:
        raise Unexpected(f"{TRIES} kills all came after {name}")
    stopped.append(name)
    world.finish(world.tick, 0)
    return judge(world, champion="2", stopped=stopped, reference=reference)


def server(world: World, rng: random.Random, step: str) -> Cost:
    """MLflow's server is killed at a random moment of a step, and is back before the next run."""
    reference, name = world.reference, step_name(step)
    for attempt in range(TRIES):
        world.begin(name)
        stopped = world.attempts()
        command = world.tick()
        _wait_within(world, command, name, rng, attempt)
        world.server.kill()
        if command.expect(0, 1):
            break
    else:
        raise Unexpected(f"{TRIES} kills all came after {name}")
    stopped += world.attempts()
    said = command.said
    world.server.start()
    world.finish(world.tick, 0)
    cost = judge(world, champion="2", stopped=stopped, reference=reference)
    told = "tracking_unreachable" in said
    cost.add("wrong", not told, f"of a server that is gone it is said: {said[-500:]}")
    return cost


def _wait_within(world: World, command: Command, name: str, rng: random.Random, attempt: int) -> None:
    """Wait until a random moment of a step; sooner if earlier attempts came too late."""
    if not world.wait_for(command, name):
        raise Unexpected(f"the tick ended before {name}: {command.said[-1500:]}")
    time.sleep(rng.uniform(0, 0.8) * world.reference.seconds[name] * 0.4**attempt)
