"""The job behind ``maskmill report``; the page itself is tested beside the module that makes it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from jobs.report import Report
from models.errors import MaskMillError


def result(folder: Path, title: str) -> Path:
    record = {
        "schema_version": 1, "kind": "benchmark", "name": "toyworld", "title": title, "toy": True,
        "created": "2026-11-21T11:30:00Z", "command": "maskmill benchmark toyworld", "seconds": 1.5,
        "hardware": {"cpu": "x", "cores": 2, "gpu": None}, "claims": [], "pictures": [],
        "sections": [{"name": "a", "title": "A", "note": None, "metrics": ["miou"], "rows": []}],
    }  # fmt: skip
    folder.mkdir()
    (folder / "benchmark.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("given", [None, "page.html"])
def test_says_where_the_page_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = result(tmp_path / "one", "The first"), result(tmp_path / "two", "The second")
    for folders in ([one], [str(two), one]):
        said = io.StringIO()
        assert (
            Report(results=tuple(folders), output=Path(given) if given else None).run(Console(file=said)) == 0
        )
        page = tmp_path / given if given else Path(folders[0]) / "report.html"
        assert page.as_uri() in said.getvalue()
        assert [title in page.read_text() for title in ("The first", "The second")] == [
            True,
            len(folders) == 2,
        ]


def test_the_folder_may_not_be_there(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError) as caught:
        Report(results=(str(tmp_path / "gone"),)).run()
    assert caught.value.code == "input_missing" and not (tmp_path / "gone").exists()


def test_no_folder_at_all() -> None:
    with pytest.raises(MaskMillError) as caught:
        Report(results=()).run()
    assert caught.value.code == "wrong_use"
