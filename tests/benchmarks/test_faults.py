from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.faults.__main__ import inject
from benchmarks.faults.ledger import Entry, Ledger, table
from benchmarks.faults.world import Verdict, World
from pipeline.table.committed import part_name


def entry(first: int, times: int, lost: int = 0) -> Entry:
    return Entry("actor", 1, first, times, lost, 0, 0, 0, 8.0)


def test_what_was_counted_outlives_a_kill(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "faults.jsonl", Entry)
    assert ledger.entries() == []
    ledger.add(entry(0, 3))
    file = tmp_path / "new" / "faults.jsonl"
    file.write_text(file.read_text() + '{"kind": "actor", "se')
    ledger.add(entry(3, 1, lost=2))
    assert ledger.entries() == [entry(0, 3), entry(3, 1, lost=2)]
    assert table(ledger.entries(), ["actor"]).splitlines()[2:] == [
        "| actor | 4 | 2 | 0 | 0 | 0 | 4.0 |",
        "| **all** | **4** | **2** | **0** | **0** | **0** | **4.0** |",
    ]


@pytest.mark.cluster
def test_a_fault_is_injected_and_the_comparison_finds_what_it_could_have_cost(
    tmp_path: Path, maskmill_joined: Callable[..., subprocess.CompletedProcess[str]], shared_ray: str
) -> None:
    world = World(tmp_path, (shared_ray, psutil.Process()))
    labelled = maskmill_joined(
        "label", "--images", world.everything, "--ontology", "toyworld", "--recipe", "toy",
        "--output", tmp_path / "table", "--max-failure-rate", "1",
    )  # fmt: skip
    assert labelled.returncode == 0, labelled.stderr
    world.adopt(tmp_path / "table")
    found = inject(world, "manifest_edited", 3, 0, 1)
    assert (found.times, found.lost, found.doubled, found.wrong, found.hung) == (1, 0, 0, 0, 0), found.notes

    worse = world.copy_of_reference()
    assert world.judge_copy(worse) == Verdict()
    parts = {path: pq.read_table(path) for path in sorted((worse / "labels").iterdir())}
    whole = [path for path, rows in parts.items() if set(rows["status"].to_pylist()) == {"ok"}]
    lost, copied, changed = random.Random(1).sample(whole, 3)
    lost.unlink()
    shutil.copy(copied, copied.with_name("copy.parquet"))
    rows = parts[changed].to_pylist()
    rows[0]["mask"] = rows[0]["confidence"]
    pq.write_table(pa.Table.from_pylist(rows, parts[changed].schema), changed)
    assert changed.name == part_name(parts[changed]["id"].to_numpy())
    verdict = world.judge_copy(worse)
    assert (verdict.lost, verdict.doubled) == (parts[lost].num_rows, parts[copied].num_rows)
    assert verdict.wrong == 1 + (verdict.lost != verdict.doubled), verdict.notes
