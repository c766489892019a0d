from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.fuzz.__main__ import main, run
from benchmarks.fuzz.kind import KINDS, kind_of
from benchmarks.fuzz.worker import random_of
from tests.benchmarks.faulty import FAULTS


@pytest.mark.slow
def test_every_kind_of_fault_is_found_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = "tests.benchmarks.faulty"
    made = [kind_of(module).make(random_of(4, module, number)).decode() for number in range(14)]
    assert set(made) == set(FAULTS)
    arguments = argparse.Namespace(seed=4, first=0, count=14, minutes=2.0, failures=tmp_path)
    assert run([module], arguments) == 1
    expected = {
        "no words": "Fault", "exception": "KeyError", "crash": "crash SIGSEGV", "hang": "hang",
        "memory": "memory",
    }  # fmt: skip
    for number, name in enumerate(made):
        kept = tmp_path / f"faulty-4-{number}.txt"
        assert kept.exists() == (name in expected)
        if name in expected:
            assert kept.read_text().splitlines()[0] == expected[name]
            assert kept.with_suffix(".bin").read_bytes() == name.encode()
    counts = Counter(made)
    summary = capsys.readouterr().out.splitlines()[-2]
    assert f"{counts['ok']} read" in summary and f"{counts['refused']} WrongUse file_invalid" in summary


READERS = [name for name in KINDS if name != "http"]


@pytest.mark.parametrize("name", KINDS)
def test_inputs_depend_on_the_seed_alone(name: str) -> None:
    kind = kind_of(KINDS[name])
    first, again, other = (
        [kind.make(random_of(seed, KINDS[name], number)) for number in range(20)] for seed in (1, 1, 2)
    )
    assert first == again and first != other
    assert len(set(first)) > 10


@pytest.mark.slow
def test_a_few_inputs_of_each_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seed", "5", "--count", "60", "--minutes", "3", "--failures", str(tmp_path)]
    assert main([*arguments, "--kinds", *READERS]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == READERS
    assert all("60 inputs, 0 faults" in line for line in lines)


@pytest.mark.long
def test_a_few_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seed", "5", "--count", "60", "--minutes", "3", "--failures", str(tmp_path)]
    assert main([*arguments, "--kinds", "http"]) == 0, capsys.readouterr().out
