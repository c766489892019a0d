from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.interfaces import ExecutionResources

from pipeline.cluster.alone import FixedCluster, alone
from pipeline.cluster.session import ray_session

SERVICES = {"AutoscalingCoordinator", "datasets_stats_actor"}
"""Named actors that Ray Data starts for clusters."""


def started() -> set[str]:
    return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}


@pytest.mark.slow
def test_flows_run_without_the_services_of_clusters(tmp_path: Path) -> None:
    before = vars(streaming_executor).copy()

    def flow(folder: Path) -> list[int]:
        ray.data.range(5).map(lambda row: {"id": row["id"] * 2}).write_parquet(str(folder))
        return sorted(pq.read_table(folder)["id"].to_pylist())

    with ray_session("test", address=None, verbose=False):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        with alone():
            assert flow(tmp_path / "alone") == [0, 2, 4, 6, 8]
            total = FixedCluster().get_total_resources()
        assert not {name for name in started() if name in SERVICES}, "started all the same"
        for name in ("create_cluster_autoscaler", "_StatsManager"):
            assert vars(streaming_executor)[name] is before[name]
        assert total.cpu == ray.cluster_resources()["CPU"]
        assert total.add(ExecutionResources(cpu=1)).cpu == total.cpu + 1

        # This Ray does start them otherwise, by these names: else the test above shows nothing.
        assert flow(tmp_path / "usual") == [0, 2, 4, 6, 8]
        assert started() >= SERVICES
