from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from jobs.runs import Runs
from models.errors import MaskMillError
from pipeline.tracking.runs import choose_runs, differences, list_runs
from pipeline.tracking.tracker import TrackedDataset, open_tracker


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three runs: two evaluations that differ in one setting, and a labelling run that failed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKMILL_CACHE", str(folder / "cache"))
        patch.setattr("sys.argv", ["maskmill", "x", "--images", "photos/" * 60])
        patch.chdir(folder)
        uri = f"sqlite:///{folder}/mlruns.db"
        for name, head, miou in (("plain", "plain", 0.13), ("ours", "maskclip", 0.4412)):
            with open_tracker(uri, say=lambda _: None) as tracker:
                tracker.start(
                    "evaluate",
                    name,
                    params={"recipe": {"head": head, "window": 0}},
                    dataset=TrackedDataset("toyworld", "f" * 64),
                )
                tracker.log_metrics({"miou": miou, "ece": 0.1, "iou/cat": miou / 2})
        tracker = open_tracker(uri, say=lambda _: None)
        tracker.start("label", "photos")
        tracker.log_metrics({"images_done": 1200, "images_failed": 3}, 1200)
        tracker.close("FAILED")
    return uri


def _output(*, terminal: bool = False, width: int = 150, **arguments: object) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width)
    assert Runs(**arguments).run(console) == 0  # type: ignore[arg-type]
    return text.getvalue()


def test_the_list_is_plain_columns_where_there_is_no_terminal(uri: str) -> None:
    head, *rows = [line.split("\t") for line in _output(tracking=uri).splitlines()]
    assert head == ["id", "kind", "name", "dataset", "key metrics", "status", "age", "command"]
    assert [(row[1], row[2], row[3], row[4], row[5]) for row in rows] == [
        ("label", "photos", "", "images_done 1,200, images_failed 3", "FAILED"),
        ("evaluate", "ours", "toyworld", "miou 44.1 %, ece 10.0 %", "FINISHED"),
        ("evaluate", "plain", "toyworld", "miou 13.0 %, ece 10.0 %", "FINISHED"),
    ]
    assert all(len(row[0]) == 32 and row[6].endswith(" s") and row[7] for row in rows)


def test_the_list_is_a_table_on_a_terminal(uri: str) -> None:
    lines = [
        Text.from_ansi(line).plain for line in _output(tracking=uri, terminal=True, limit=2).splitlines()
    ]
    assert all(len(line) <= 150 for line in lines)
    first = next(line for line in lines if "photos" in line)
    assert "FAILED" in first and "images_done 1,200" in first and first.rstrip().endswith("…")
    assert sum("evaluate" in line for line in lines) == 1
    narrow = _output(tracking=uri, terminal=True, width=80)
    assert "command" not in narrow and "photos" in narrow


@pytest.mark.parametrize("experiment", ["evaluate", "maskmill-evaluate"])
def test_one_experiment(uri: str, experiment: str) -> None:
    assert [entry.name for entry in list_runs(uri, experiment=experiment)] == ["ours", "plain"]
    with pytest.raises(MaskMillError, match="no experiment") as caught:
        list_runs(uri, experiment="other")
    assert caught.value.code == "name_unknown"


def test_compare_shows_what_differs_and_nothing_else(uri: str) -> None:
    first = list_runs(uri, experiment="evaluate")[1].id
    lines = [line.split("\t") for line in _output(tracking=uri, compare=(first[:8], "ours")).splitlines()]
    assert lines[0][0] == "run" and lines[0][1] == f"plain ({first[:8]})"
    assert [line for line in lines[1:-1]] == [
        ["recipe.head", "plain", "maskclip", ""],
        ["miou", "13.0 %", "44.1 %", "+31.1 points"],
        ["iou/cat", "6.5 %", "22.1 %", "+15.6 points"],
    ]
    assert lines[-1] == ["Different: 1 of 5 parameters, 2 of 3 metrics."]


def test_compare_three(uri: str) -> None:
    lines = [
        line.split("\t") for line in _output(tracking=uri, compare=("plain", "ours", "photos")).splitlines()
    ]
    assert ["kind", "evaluate", "evaluate", "label"] in lines
    assert ["images_done", "-", "-", "1,200"] in lines


@pytest.mark.parametrize(
    ("wanted", "code"), [(["nothing"], "name_unknown"), (["abc"], "name_unknown"), (["our"], "name_unknown")]
)
def test_unknown_runs(uri: str, wanted: list[str], code: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        choose_runs(wanted, uri)
    assert caught.value.code == code


def test_one_run_cannot_be_compared(uri: str) -> None:
    with pytest.raises(MaskMillError, match="One run"):
        Runs(tracking=uri, compare=("plain",)).run()


def test_looking_makes_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert _output() == "No runs in sqlite:///mlruns.db yet.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_is_an_error_of_use() -> None:
    with pytest.raises(MaskMillError, match="connection refused") as caught:
        list_runs("http://127.0.0.1:9")
    assert caught.value.code == "tracking_unreachable"


def test_differences_of_nothing() -> None:
    assert differences([{}, {}]) == {}
