"""Nodes of a cluster of three are lost: a head without work, and two workers."""

from __future__ import annotations

import functools
import random
import time

from benchmarks.faults.clusters import Cluster, running_cluster
from benchmarks.faults.processes import TARGETS, wait_for_parts
from benchmarks.faults.runs import Unexpected
from benchmarks.faults.training import finish, judge, train, undisturbed, wait_for_checkpoint
from benchmarks.faults.world import Injected, World

CPUS = 3
MOST = 2
"""Of a run: each is a wait of half a minute."""


class ThreeNodes:
    """A cluster whose workers are replaced when they are lost."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._workers = [cluster.add_worker(cpus=CPUS) for _ in range(2)]

    def working(self, title: str) -> list[int]:
        """Numbers of those that have a process with such a title."""
        return [number for number in self._workers if self.cluster.works(number, title)]

    def lose(self, title: str, rng: random.Random) -> bool:
        """Kill one that has a process with such a title; returns whether there was one."""
        working = self.working(title)
        if not working:
            return False
        lost = rng.choice(working)
        self._workers.remove(lost)
        self.cluster.kill(lost)
        return True

    def replace(self) -> None:
        """Start nodes in the place of those that were lost."""
        while len(self._workers) < 2:
            self._workers.append(self.cluster.add_worker(cpus=CPUS))


def _nodes(world: World) -> ThreeNodes:
    """The cluster of a world, started when it is first needed."""
    if world.nodes is None:
        environment = world.environment | {"FAULTS_PACE_S": "0.2"}
        cluster = world.open_until_the_end.enter_context(running_cluster(environment))
        world.nodes = ThreeNodes(cluster)
    return world.nodes


def node(world: World, rng: random.Random, most: int) -> Injected:
    """A labelling run loses a node, which is replaced at once or not before the end of the run."""
    three, output, times = _nodes(world), world.folder("nodes"), 0
    address = {**three.cluster.environment, "RAY_ADDRESS": three.cluster.address}
    command = world.label(output, environment=address)
    while times < min(most, MOST) and wait_for_parts(command, output, rng.randint(1, 3)):
        if not three.lose(TARGETS["actor"][0], rng):
            continue
        times += 1
        if rng.random() < 0.5:
            break
        time.sleep(rng.uniform(0, 3))
        three.replace()
    command.expect(0)
    three.replace()
    if not times:
        raise Unexpected("no node could be lost")
    return Injected(times, world.judge(output))


def train_node(world: World, rng: random.Random, most: int) -> Injected:
    """A training loses a node with a worker, and goes on when another one joins."""
    three, output = _nodes(world), world.folder("train")
    address = {**three.cluster.environment, "RAY_ADDRESS": three.cluster.address}
    reference = undisturbed(world, 2, address)
    start = functools.partial(train, world, output, "--workers", 2, environment=address)
    times, command = 0, start()
    while times < min(most, MOST) and wait_for_checkpoint(command, output, rng):
        if three.lose(TARGETS["trainer"][0], rng):
            times += 1
            three.replace()
    if command.expect(0, 1):
        finish(start)
    if not times:
        raise Unexpected("no node could be lost")
    return Injected(times, judge(output, reference))
