"""The job behind ``maskmill show``; the page itself is tested beside the module that makes it."""

from __future__ import annotations

import io
from pathlib import Path

import fsspec
import pytest
from rich.console import Console

from jobs.show import Show
from models.errors import MaskMillError
from tests.pipeline.report.test_gallery import make_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("show"))


def show(table: object, **options: object) -> str:
    said = io.StringIO()
    assert Show(table=str(table), **options).run(Console(file=said)) == 0  # type: ignore[arg-type]
    return said.getvalue()


def test_the_page_is_beside_a_local_table(table: Path) -> None:
    assert (table / "gallery.html").as_uri() in show(table)
    assert "scene 0.png" in (table / "gallery.html").read_text()


def test_the_page_of_a_remote_table_is_here(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    remote = fsspec.filesystem("memory")
    remote.put(str(table), "/shown/table", recursive=True)
    try:
        assert (tmp_path / "gallery.html").as_uri() in show("memory://shown/table", limit=2, order="worst")
    finally:
        remote.rm("/shown", recursive=True)
    page = (tmp_path / "gallery.html").read_text()
    assert "scene 7.png" in page and "scene 0.png" not in page  # the worst two of the table
    assert [path.name for path in tmp_path.iterdir()] == ["gallery.html"]


def test_a_page_is_a_local_file(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaskMillError) as caught:
        show(table, output=Path("s3://bucket/page.html"))
    assert caught.value.code == "wrong_use" and not list(tmp_path.iterdir())
