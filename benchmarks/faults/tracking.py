"""The MLflow server is killed while a labelling run is tracked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.mlflow_server import Server
from benchmarks.faults.processes import MOST, take_some_away, wait_for_parts
from benchmarks.faults.world import COUNT, SPARE, Injected, Verdict, World, wrong


def mlflow(world: World, rng: random.Random, most: int) -> Injected:
    """Killed in mid-run and started again, then or later; what is missing is sent then, and nothing twice."""
    folder = world.folder("mlflow")
    folder.mkdir()
    server, verdict = Server(folder), Verdict()
    environment = {"MLFLOW_TRACKING_URI": server.uri, "MASKMILL_CACHE": str(folder / "cache")}
    outputs: list[Path] = []
    late = 0
    try:
        while len(outputs) - late < min(most, MOST):
            server.start()
            output = world.copy_of_reference()
            take_some_away(output, rng)
            outputs.append(output)
            command = world.label(output, images=world.everything, environment=environment)
            late += not wait_for_parts(command, output, rng.randint(1, 2))
            server.kill()
            if rng.random() < 0.5:
                server.start()
            command.expect(0)
            server.kill()
            verdict = verdict.plus(world.judge_copy(output))
        server.start()
        sent = world.run("track", "--flush", environment=environment)
        sent.expect(0)
        verdict = verdict.plus(_judge(server.uri, [str(output) for output in outputs]))
    finally:
        server.kill()
    left = list((folder / "cache" / "tracking").glob("*/journal.jsonl"))
    if left:
        verdict = verdict.plus(wrong(f"journals are left over: {sent.said}"))
    return Injected(len(outputs) - late, verdict)


def _judge(uri: str, outputs: Sequence[str]) -> Verdict:
    """Whether MLflow has each run once, finished, with its last figures."""
    from mlflow.tracking import MlflowClient

    client, verdict = MlflowClient(uri), Verdict()
    experiment = client.get_experiment_by_name("maskmill-label")
    found = [] if experiment is None else client.search_runs([experiment.experiment_id])
    for output in outputs:
        runs = [run for run in found if run.data.params.get("output") == output]
        if not runs:
            verdict = verdict.plus(Verdict(lost=1, notes=[f"MLflow has no run for {output}"]))
            continue
        verdict.doubled += len(runs) - 1
        status, images = runs[0].info.status, runs[0].data.metrics.get("images_in_table")
        if status != "FINISHED" or images != COUNT + SPARE + 1:
            verdict = verdict.plus(wrong(f"MLflow has a run that is {status} with {images} images"))
    return verdict
