"""Jobs on a cluster without a shared disk: files stay on the driver's node, and models run on the others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.faults.clusters import Cluster, running_cluster
from benchmarks.faults.disks import NoDisk, refuse_without_mounts
from pipeline.toyworld import scenes as toyworld
from tests.pipeline.trained.test_student import toy_student

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SUBSET = ROOT.parent / "shared" / "data" / "voc2012_subset"


@dataclass(frozen=True)
class Apart:
    """A head without CPUs, where jobs run, and a worker that has an empty disk in place of ``folder``."""

    cluster: Cluster
    folder: Path
    workers: tuple[int, ...]
    command: Callable[..., subprocess.CompletedProcess[str]]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command, as a job on the cluster: with the address in its environment."""
        return self.command(*arguments, RAY_ADDRESS=self.cluster.address)

    def expect_nothing_elsewhere(self) -> None:
        for number in self.workers:
            seen = self.cluster.seen_by(number, self.folder)
            assert seen.is_dir() and not any(seen.iterdir())


def with_blind_workers(cluster: Cluster, folders: Sequence[Path], count: int) -> tuple[int, ...]:
    """Add workers that have empty disks in place of folders; skips the test where that cannot be."""
    try:
        refuse_without_mounts()
    except NoDisk as reason:
        pytest.skip(f"no disk can be mounted here: {reason}")
    return tuple(cluster.add_worker(cpus=2, blind=folders) for _ in range(count))


@pytest.fixture(scope="module")
def apart(
    maskmill_environment: dict[str, str], maskmill_here, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Apart]:
    folder = tmp_path_factory.mktemp("disk")
    made = toyworld.generate(33, 12, 64)
    for name, arrays in (("images", made.images), ("truth", made.labels)):
        (folder / name).mkdir()
        for index, array in enumerate(arrays):
            Image.fromarray(array).save(folder / name / f"s{index:02d}.png")
    with running_cluster(maskmill_environment) as cluster:
        yield Apart(cluster, folder, with_blind_workers(cluster, [folder], 1), maskmill_here)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with random weights."""
    folder = tmp_path_factory.mktemp("trained") / "student"
    toy_student(folder)
    return folder


def label(output: Path, images: Path) -> list[object]:
    return ["label", "--images", images, "--ontology", "toyworld", "--recipe", "toy", "--output", output]


def rows(table: Path) -> list[dict[str, object]]:
    """All rows of a table, in the order of their ids."""
    parts = [pq.read_table(part) for part in sorted((table / "labels").glob("*.parquet"))]
    return sorted(pa.concat_tables(parts).to_pylist(), key=lambda row: row["id"])


@pytest.fixture(scope="module")
def table(apart: Apart) -> Path:
    """Labelled on the cluster."""
    output = apart.folder / "table"
    done = apart.run(*label(output, apart.folder / "images"))
    assert done.returncode == 0, done.stderr
    assert "images are read on this node alone: 1 [" in done.stderr
    assert "labels are written on this node alone: 1 [" in done.stderr
    apart.expect_nothing_elsewhere()
    return output


def test_labels_are_those_of_one_machine(apart: Apart, table: Path, maskmill_joined) -> None:
    here = apart.folder / "here"
    assert maskmill_joined(*label(here, apart.folder / "images")).returncode == 0
    assert rows(table) == rows(here) and len(rows(table)) == 12
    assert {row["status"] for row in rows(table)} == {"ok"}


@pytest.mark.long
def test_an_evaluation_is_that_of_one_machine(apart: Apart, maskmill_joined) -> None:
    results = {}
    for name, run in (("apart", apart.run), ("here", maskmill_joined)):
        output = apart.folder / f"evaluated-{name}"
        done = run(
            "evaluate", "--recipe", "toy", "--images", apart.folder / "images",
            "--truth", apart.folder / "truth", "--ontology", "toyworld", "--output", output, "--workers", 2,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        # The labels, then the comparison with the truth.
        assert ("files are read and written on this node alone" in done.stderr) == (name == "apart")
        results[name] = json.loads((output / "evaluation.json").read_text())
    assert results["apart"]["images"]["evaluated"] == 12
    for part in ("confusion", "metrics", "classes", "dataset"):
        assert results["apart"][part] == results["here"][part]
    apart.expect_nothing_elsewhere()


def test_a_table_is_verified_and_exported_where_it_is(apart: Apart, table: Path, maskmill_joined) -> None:
    done = apart.run("verify", table, "--hashes", "--workers", 2)
    assert done.returncode == 0 and "Nothing is wrong." in done.stdout, done.stderr
    copies = []
    for name, run in (("apart", apart.run), ("here", maskmill_joined)):
        output = apart.folder / f"exported-{name}"
        done = run("export", table, "--format", "png", "--output", output, "--with-images", "--workers", 2)
        assert done.returncode == 0, done.stderr
        copies.append({path.name: path.read_bytes() for path in output.rglob("*.png")})
    assert copies[0] == copies[1] and len(copies[0]) >= 12
    apart.expect_nothing_elsewhere()


def test_what_needs_a_shared_disk_is_refused_before_work(
    apart: Apart, table: Path, student_folder: Path
) -> None:
    output = apart.folder / "student"
    done = apart.run("train", "maskclip-plus", "--labels", table, "--recipe", "toy", "--output", output)
    assert done.returncode == 2 and "[disk_not_shared]" in done.stderr, done.stderr
    assert "The training data is on the disk of this machine" in done.stderr
    assert not (output / "checkpoints").exists()

    model = apart.folder / "model"
    shutil.copytree(student_folder, model)
    output = apart.folder / "by-student"
    done = apart.run("label", "--images", apart.folder / "images", "--model", model, "--output", output)
    assert done.returncode == 2 and "[disk_not_shared]" in done.stderr, done.stderr
    assert "The weights of the model are on the disk of this machine" in done.stderr
    assert not (output / "labels").exists()
    apart.expect_nothing_elsewhere()


@pytest.mark.long
@pytest.mark.skipif(not SUBSET.is_dir(), reason="the VOC subset is not on this machine (shared/data)")
def test_a_benchmark_is_that_of_one_machine(
    maskmill_environment: dict[str, str], maskmill_here, maskmill_joined, tmp_path: Path
) -> None:
    figures = []
    with running_cluster(maskmill_environment) as cluster:
        there = Apart(cluster, tmp_path, with_blind_workers(cluster, [tmp_path, SUBSET], 1), maskmill_here)
        for name, run in (("apart", there.run), ("here", maskmill_joined)):
            output = tmp_path / name
            done = run(
                "benchmark", "maskclip", "--root", f"voc20={SUBSET}", "--dataset", "voc20", "--limit", 2,
                "--row", "MaskCLIP (ViT-B/16)", "--set", "pretrained=random:0", "--output", output,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            (evaluation,) = output.glob("rows/*/evaluation.json")
            figures.append(json.loads(evaluation.read_text())["confusion"])
        there.expect_nothing_elsewhere()
    assert figures[0] == figures[1]


@pytest.mark.long
def test_a_node_without_the_disk_that_joins_later_gets_no_files(
    maskmill_environment: dict[str, str], maskmill_here, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    (disk / "images").mkdir(parents=True)
    for index, scene in enumerate(toyworld.generate(11, 100, 64).images):
        Image.fromarray(scene).save(disk / "images" / f"s{index:03d}.png")
    with running_cluster(maskmill_environment) as cluster:
        with_blind_workers(cluster, [disk], 0)
        cluster.add_worker(cpus=3)
        command = label(disk / "table", disk / "images")
        with (tmp_path / "log.txt").open("w+") as log:
            job = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *map(str, command), "--set", "scale=[1024, 384]"],
                cwd=ROOT,
                env=cluster.environment | {"RAY_ADDRESS": cluster.address},
                stdout=log,
                stderr=log,
            )
            deadline = time.monotonic() + 200
            while len(list((disk / "table/labels").glob("*.parquet"))) < 2:
                assert job.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.1)
            (number,) = with_blind_workers(cluster, [disk], 1)
            status = job.wait(400)
        said = (tmp_path / "log.txt").read_text()
        assert status == 0, said
        assert "images are read on any node" in said
        assert "another node does not see local files as they were" in said
        assert len(rows(disk / "table")) == len({row["id"] for row in rows(disk / "table")}) == 100
        assert {row["status"] for row in rows(disk / "table")} == {"ok"}
        Apart(cluster, disk, (number,), maskmill_here).expect_nothing_elsewhere()
