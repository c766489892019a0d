"""The end of a training run, without training: finished runs, pages and MLflow."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from rich.console import Console

from jobs.train.run import (
    Prepared,
    TrainOptions,
    log_model,
    must_match,
    recipe_identity,
    run_training,
    write_pages,
)
from models.errors import MaskMillError
from models.settings import NEUTRAL, Settings
from pipeline.files.recipes import Recipe
from pipeline.files.storage import open_storage
from pipeline.report.training_page import PAGE
from pipeline.tracking.tracker import TrackedDataset
from pipeline.training.loop.checkpoints import CheckpointStore
from pipeline.training.loop.settings import LoopSettings

RESULT = "result.json"


def _no_page(folder: Path, lines: list[Mapping[str, Any]]) -> Sequence[str]:
    raise MaskMillError("image_invalid", "An image is gone.", "Restore it.")


def _page(folder: Path, lines: list[Mapping[str, Any]]) -> Sequence[str]:
    (folder / PAGE).write_text(f"{len(lines)} lines")
    return [str(folder / PAGE)]


def _prepared(make_pages: Any) -> Prepared:
    unused: Any = None
    return Prepared(
        make_task=unused, samples=unused, settings=LoopSettings(iterations=1, batch_size=1),
        identity={"data": "d"}, announcement="", params={}, dataset=TrackedDataset("d", "d"), finish=unused,
        write_pages=make_pages, commands={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("curves", "make_pages", "status", "says"),
    [
        ('{"step": 1}\n', _page, 0, "its page was missing"),
        ('{"step": 1}\n', _no_page, 1, "An image is gone."),
        (None, _page, 0, "its curves are gone with metrics.jsonl"),
    ],
)
def test_a_finished_run_without_its_page(
    tmp_path: Path, curves: str | None, make_pages: Any, status: int, says: str
) -> None:
    prepared, said = _prepared(make_pages), io.StringIO()
    CheckpointStore(open_storage(tmp_path)).claim(must_match(prepared))
    (tmp_path / RESULT).write_text("{}")
    if curves is not None:
        (tmp_path / "metrics.jsonl").write_text(curves)
    for _ in range(2 if curves is None else 1):  # lost curves stay lost, whatever is run again
        got = run_training(
            "test", TrainOptions(output=str(tmp_path), tracking="off"), lambda: prepared, result_file=RESULT,
            own_entries=(RESULT, PAGE), console=Console(file=said, width=200),
        )  # fmt: skip
        assert got == status and says in said.getvalue()
    assert (tmp_path / PAGE).exists() == (make_pages is _page and curves is not None)
    assert ("The same command writes it" in said.getvalue()) == (status == 1)


class _Augment(Settings):
    threads: Annotated[int, NEUTRAL] = 1
    crop: int = 64


class _Recipe(Recipe):
    augment: _Augment = _Augment()
    buffers: Annotated[int, NEUTRAL] = 2
    loop: LoopSettings = LoopSettings(iterations=1, batch_size=1)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"name": "mine", "buffers": 9}, None),
        ({"augment": _Augment(threads=4)}, None),
        ({"loop": LoopSettings(iterations=1, batch_size=1, keep=7)}, None),
        ({"augment": _Augment(crop=32, threads=4)}, "augment.crop: 64 there, 32 here"),
        ({"loop": LoopSettings(iterations=1, batch_size=2, keep=7)}, "batch_size: 1 there, 2 here"),
    ],
)
def test_only_what_changes_the_result_keeps_a_run_from_going_on(
    tmp_path: Path, changes: dict[str, Any], refused: str | None
) -> None:
    def must_match_of(recipe: _Recipe) -> dict[str, Any]:
        prepared = dataclasses.replace(
            _prepared(_page), settings=recipe.loop, identity=recipe_identity(recipe) | {"data": "d"}
        )
        return must_match(prepared)

    store = CheckpointStore(open_storage(tmp_path))
    settings = store.claim(must_match_of(_Recipe()))
    store.write(1, module={}, training={}, lines=[], fingerprint=settings, milestone=False)
    again = must_match_of(_Recipe().replace(**changes))
    if refused is None:
        assert store.claim(again) == settings
        return
    with pytest.raises(MaskMillError) as caught:
        store.claim(again)
    assert caught.value.code == "output_differs" and f"settings: {refused}." in caught.value.message


@pytest.mark.parametrize(
    ("overwritten", "command"),
    [(False, "The same command writes it"), (True, "The same command without --overwrite writes it")],
)
def test_which_command_writes_a_missing_page(tmp_path: Path, overwritten: bool, command: str) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    pages, messages = write_pages(_prepared(_no_page), open_storage(tmp_path), overwritten=overwritten)
    assert not pages and "An image is gone." in messages[0] and command in messages[1]


@pytest.mark.parametrize(
    ("error", "name", "says", "again"),
    [
        (MaskMillError("model_unsupported", "It is too odd.", "Leave it."), "n", "Leave it.", False),
        (MaskMillError("tracking_unreachable", "It is away.", "Start it."), "n", "It is away.", True),
        (OSError("no route"), "n", "OSError: no route", True),
    ],
)  # fmt: skip
def test_a_failed_log_to_mlflow_is_reported(error: Exception, name: str, says: str, again: bool) -> None:
    def fail(run_id: str, register_as: str) -> str:
        raise error

    tracker: Any = SimpleNamespace(wait_for_run=lambda _timeout: "run")
    (line,) = log_model(fail, tracker, name)
    assert line.startswith("  not in MLflow  ") and says in line
    assert ("the same command with --register n" in line) == again
