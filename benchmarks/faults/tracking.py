"""The MLflow server is killed while a labelling run is tracked."""

from __future__ import annotations

import os
import random
import time

from benchmarks.faults.mlflow_server import Server
from benchmarks.faults.processes import wait_for_parts
from benchmarks.faults.runs import Unexpected
from benchmarks.faults.world import COUNT, Injected, Verdict, World, wrong


def mlflow(world: World, rng: random.Random, most: int) -> Injected:
    """Killed and started again in mid-run; what is missing is sent later, and nothing twice."""
    folder = world.folder("mlflow")
    folder.mkdir()
    server = Server(folder)
    environment = {"MLFLOW_TRACKING_URI": server.uri, "MASKMILL_CACHE": str(folder / "cache")}
    output, times = world.folder("tracked"), 0
    server.start()
    try:
        command = world.label(output, environment=environment)
        while times < min(most, 3) and wait_for_parts(command, output, rng.randint(1, 3)):
            time.sleep(rng.uniform(0, 1))
            server.kill()
            times += 1
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 3))
                server.start()
            else:
                break
        command.expect(0)
        if not times:
            raise Unexpected("the run ended before the server could be killed")
        server.kill()
        server.start()
        sent = world.run("track", "--flush", environment=environment)
        sent.expect(0)
        verdict = _judge(server.uri, str(output))
    finally:
        server.kill()
    left = list((folder / "cache" / "tracking").glob("*/journal.jsonl"))
    if left:
        verdict = verdict.plus(wrong(f"journals are left over: {sent.said}"))
    return Injected(times, verdict.plus(world.judge(output)))


def _judge(uri: str, output: str) -> Verdict:
    """Whether MLflow has the run once, finished, with its last figures."""
    from mlflow.tracking import MlflowClient

    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("maskmill-label")
    runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
    runs = [run for run in runs if run.data.params.get("output") == output]
    if not runs:
        return Verdict(lost=1, notes=[f"MLflow has no run for {output}"])
    verdict = Verdict(doubled=len(runs) - 1)
    if runs[0].info.status != "FINISHED" or runs[0].data.metrics.get("images_in_table") != COUNT + 1:
        verdict = verdict.plus(wrong(f"MLflow has {runs[0].info.status}, {runs[0].data.metrics}"))
    return verdict
