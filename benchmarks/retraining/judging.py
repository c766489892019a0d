"""What a tick has left, compared with what it should have left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.faults.world import rows_of
from benchmarks.retraining.results import MODEL, TICK, Result, result_of
from benchmarks.retraining.world import NAME, World
from pipeline.corpus.manifest import build_manifest
from pipeline.files.storage import open_storage
from pipeline.retraining.ledger import Ledger
from pipeline.retraining.registry import PREFIX
from pipeline.retraining.state import tick_folder

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass
class Cost:
    """What a case has cost; see the package."""

    promoted: int = 0
    doubled: int = 0
    lost: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, count: int, note: str) -> None:
        """Count something, unless the count is 0."""
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            self.notes.append(f"{count} {kind}: {note}")

    def count(self, what: str, found: int, expected: int) -> None:
        """Something that should be there so often: less is lost, more is doubled."""
        self.add("lost", max(0, expected - found), what)
        self.add("doubled", max(0, found - expected), what)


def judge(
    world: World,
    *,
    champion: str | None,
    allowed: Collection[str] = (),
    stopped: Sequence[str] = (),
    entries: Sequence[str] | None = None,
    reference: Result | None = None,
    same_weights: bool = True,
    run: str = TICK,
) -> Cost:
    """Look at everything that a finished tick has left.

    Args:
        world: with its server running.
        champion: that there should be.
        allowed: other versions that were rightly made champion since the first.
        stopped: the steps that were stopped, once for each time: so often they may begin again.
        entries: kinds of the entries of the tick in the ledger; default: those of its verdict.
        reference: what an undisturbed tick has come to.
        same_weights: the weights must be those of the reference, too.
        run: the tick.
    """
    cost = Cost()
    flush = world.run("track", "--flush", environment={"MLFLOW_TRACKING_URI": world.server.uri})
    cost.add("wrong", flush.wait() != 0, f"maskmill track --flush: {flush.said[-500:]}")
    tick, result = world.at(run), result_of(world.storage, run)
    promotes = result.decision["verdict"] == "promote"
    cost.add("wrong", tick.outcome != ("promoted" if promotes else "refused"), f"outcome {tick.outcome}")
    for step in tick.steps:
        cost.add("wrong", step.state != "done", f"step {step.name} is {step.state}")
        again = step.attempts - 1 - stopped.count(step.name)
        cost.add("doubled", max(0, again), f"step {step.name} was begun {step.attempts} times")
    if reference is not None:
        same = result.verdict == reference.verdict
        cost.add("wrong", not same, f"the verdict is {result.verdict}, not {reference.verdict}")
        differ = same_weights and result.weights != reference.weights
        cost.add("wrong", differ, "the weights differ")
    _count_files(world, run, cost, tick.step(f"train {MODEL}").outputs["steps"])
    version = _count_versions(world, run, cost)
    _count_runs(world, run, cost, tick.step(f"evaluate {MODEL}").outputs["champion"])
    _count_entries(world, run, cost, entries or (["promoting", "promoted"] if promotes else ["refused"]))
    moves = Counter(world.moves())
    cost.count("moves of challenger", moves["challenger", version], 1)
    if promotes and entries is None:
        cost.count("moves of champion", moves["champion", version], 1)
    right = {"1", *allowed} | ({champion} if champion else set())
    bad = [found for alias, found in moves.elements() if alias == "champion" and found not in right]
    bad += [str(world.champion)] if world.champion != champion else []
    cost.add("promoted", len(set(bad)), f"champion is version {world.champion}; moves {world.moves()}")
    return cost


def _count_files(world: World, run: str, cost: Cost, steps: int) -> None:
    place = world.storage.child(tick_folder(run))
    lines = place.read_bytes(f"{MODEL}/metrics.jsonl").decode().splitlines()
    found = Counter(json.loads(line)["step"] for line in lines)
    cost.add("lost", len(set(range(1, steps + 1)) - set(found)), "steps of the training without a line")
    cost.add("doubled", found.total() - len(found), "steps of the training with several lines")
    rows = Counter(row["id"] for row in rows_of(open_storage(world.at(run).step("label").outputs["table"])))
    arrived = set(build_manifest(world.images)["id"].to_pylist())
    cost.add("lost", len(arrived - set(rows)), "images without a row")
    cost.add("doubled", rows.total() - len(rows), "ids with several rows")
    leases = [name for name in world.storage.list(recursive=True) if name.endswith("lease.json")]
    cost.add("wrong", len(leases), f"left over: {leases}")


def _count_versions(world: World, run: str, cost: Cost) -> str:
    """Count the versions of a tick; returns the number of the first."""
    key = f"{NAME}/{run}/{MODEL}"
    found = world.client.search_model_versions(f"name='{NAME}'", max_results=1000)
    numbers = [int(one.version) for one in found if one.tags.get(f"{PREFIX}key") == key]
    cost.count(f"versions with the key {key}", len(numbers), 1)
    return str(min(numbers, default=0))


def _count_runs(world: World, run: str, cost: Cost, champion: dict[str, Any] | None) -> None:
    """Finished runs in MLflow: of the tick, its training, its evaluations."""
    measured = champion is not None and not champion["reused"]
    finished = Counter(map(_kind, _finished(world, run)))
    for kind, expected in (("retrain", 1), ("train", 1), ("candidate", 1), ("champion", int(measured))):
        cost.count(f"finished runs in MLflow: {kind}", finished[kind], expected)


def _finished(world: World, run: str) -> list[Run]:
    names = [f"maskmill-{kind}" for kind in ("retrain", "train", "evaluate")]
    found = [world.client.get_experiment_by_name(name) for name in names]
    return list(
        world.client.search_runs(
            [one.experiment_id for one in found if one is not None],
            f"tags.`{PREFIX}tick` = '{run}' and attributes.status = 'FINISHED'",
        )
    )


def _kind(run: Run) -> str:
    return str(run.data.tags.get(f"{PREFIX}measured") or run.data.tags.get(f"{PREFIX}kind"))


def _count_entries(world: World, run: str, cost: Cost, expected: Sequence[str]) -> None:
    found = Counter(str(entry.kind) for entry in Ledger(world.storage).entries() if entry.run == run)
    for kind in {*found, *expected}:
        cost.count(f"entries {kind} of the ledger", found[kind], expected.count(kind))
