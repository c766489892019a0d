"""Outputs that cannot be made are told before anything is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import MaskMillError
from pipeline.files.outputs import check_output_file, check_output_folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@pytest.mark.parametrize("name", ["new", "new/below", "folder", "folder/new", "link", "link/new", "new/.."])
def test_folders_that_can_be_made(name: str, place: Path) -> None:
    check_output_folder(place / name)
    assert not (place / "new").exists()


@pytest.mark.parametrize("name", ["new.html", "file", "folder/new.html", "new/new.html", "link/new.html"])
def test_files_that_can_be_made(name: str, place: Path) -> None:
    check_output_file(place / name)


@pytest.mark.parametrize(
    ("check", "name", "says"),
    [
        (check_output_folder, "file", "file is a file"),
        (check_output_folder, "fifo", "fifo is a file"),
        (check_output_folder, "nowhere", "nowhere is a file"),
        (check_output_folder, "loop/below", "loop"),
        (check_output_folder, "file/below/it", "file, which is a file"),
        (check_output_folder, "x" * 300, "name too long"),
        (check_output_file, "folder", "is a folder, and the output is a file"),
        (check_output_file, "link", "is a folder, and the output is a file"),
        (check_output_file, "file/page.html", "file, which is a file"),
    ],
)
def test_what_is_refused(check: Callable[[Path], None], name: str, says: str, place: Path) -> None:
    with pytest.raises(MaskMillError, match=f"(?i){says}") as caught:
        check(place / name)
    assert caught.value.code == "output_not_ours" and caught.value.exit_status == 2


def test_remote_places_are_not_contacted() -> None:
    check_output_folder("s3://no-such-bucket/labels")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(place: Path) -> None:
    (place / "folder").chmod(0o500)
    with pytest.raises(MaskMillError, match="no permission"):
        check_output_folder(place / "folder" / "new")
