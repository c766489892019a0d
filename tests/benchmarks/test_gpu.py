"""The script for rare GPUs, at toy size: everything runs, and what fails loses nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command

QUICK = ["waits", "correctness", "labels", "forward", "clipseg"]


@pytest.mark.long
@pytest.mark.parametrize("items", [QUICK, ["training"], ["job"]], ids="-".join)
def test_toy(items: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found" / "toy.md"
    assert command.main(["--toy", "--output", str(output), "--only", *items]) == 0, capsys.readouterr()
    record = json.loads(output.with_suffix(".json").read_text())
    assert {row["item"] for row in record["rows"]} == set(items) and not record["faults"]
    assert {"hardware", "versions", "command", "date"} <= set(record)
    table = output.read_text()
    assert capsys.readouterr().out.rstrip().endswith(table.rstrip())
    for row in record["rows"]:
        assert f"| {row['item']} | {row['what']} | {row['value']} |" in table
        assert not row["value"].startswith(("left out", "TypeError", "RuntimeError"))


@pytest.mark.slow
def test_an_item_that_takes_too_long_loses_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SECONDS", {"forward": 0.25, "labels": 60})
    output = tmp_path / "toy.md"
    assert command.main(["--toy", "--output", str(output), "--only", "forward", "labels"]) == 1
    record = json.loads(output.with_suffix(".json").read_text())
    assert list(record["faults"]) == ["forward"] and "1.0 s" in record["faults"]["forward"]
    assert {row["item"] for row in record["rows"]} == {"labels"}
    assert "**forward took longer" in output.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--output", str(tmp_path / "x.md")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_limits_fit_into_ten_minutes() -> None:
    assert sum(command.SECONDS.values()) <= 600
