from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from jobs import benchmark
from jobs.benchmark import Benchmark, benchmarks
from models.errors import MaskMillError


def test_a_benchmark_without_data_prints_what_is_missing_and_fails(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    assert Benchmark(name="maskclip", output=str(tmp_path / "out"), tracking="off").run(console) == 1
    shown = console.export_text()
    assert "--root context59=DIR" in shown and "21.7" in shown
    record = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert record["name"] == "maskclip" and record["hardware"]["cores"] >= 1
    with pytest.raises(MaskMillError) as caught:
        Benchmark(name="maskclip", output=str(tmp_path / "out"), tracking="off").run(console)
    assert caught.value.code == "output_exists"


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Benchmark(name="nothing"), "name_unknown"),
        (Benchmark(name="toyworld", seeds=1), "wrong_use"),
        (Benchmark(name="toyworld", seeds=99), "wrong_use"),
        (Benchmark(name="toyworld", settings=("head=plain",)), "wrong_use"),
        (Benchmark(name="toyworld", rows=("nonsense",)), "wrong_use"),
        (Benchmark(name="toyworld", scenes=0), "wrong_use"),
        (Benchmark(name="maskclip", image_sizes=(224,)), "wrong_use"),
    ],
)
def test_wrong_use(job: Benchmark, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaskMillError) as caught:
        job.run(Console(quiet=True))
    assert caught.value.code == code


def test_every_benchmark_has_a_description() -> None:
    known = {"toyworld", "maskclip", "maskclip-robustness", "clipseg-generalised", "prompt-strategies"}
    assert known | {"concepts"} <= set(benchmarks())
    assert all(benchmarks().values())


@pytest.mark.slow
def test_the_toy_world_s_sections_and_claims(tmp_path: Path) -> None:
    # Two sections with few scenes: all of them take minutes and are run by hand (README).
    console = Console(record=True, width=160)
    rows, output = ("heads", "words"), str(tmp_path / "out")
    job = Benchmark(name="toyworld", seeds=3, scenes=6, rows=rows, output=output, tracking="off")
    assert job.run(console) == 0
    record = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert [section["name"] for section in record["sections"]] == ["heads", "words"]
    figures = {line["name"]: line["values"]["miou"] for line in record["sections"][0]["rows"]}
    value, plain = figures["MaskCLIP, value path alone"], figures["unmodified CLIP"]
    assert value["low"] > plain["high"]
    assert record["toy"] and len(record["claims"]) == 4
    assert benchmark.TOYWORLD in (tmp_path / "out/benchmark.json").read_text()
