"""The border of the commands: what stops one is told with its place and a remedy, never as a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.border import TRACEBACK, tell

Run = Callable[..., subprocess.CompletedProcess[str]]


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_fault_of_ours_is_called_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = raised(TypeError("no such thing as https://h/x?sig=hunter2"))
    assert tell(error) == 1
    text = capsys.readouterr().err
    assert "This is a fault of MaskMill: TypeError" in text and "Traceback" not in text
    assert TRACEBACK in text and "[internal]" in text and "hunter2" not in text
    tell(error, detailed=True)
    assert "Traceback" in (shown := capsys.readouterr().err) and "hunter2" not in shown
    monkeypatch.setenv(TRACEBACK, "1")
    tell(error)
    assert "Traceback" in capsys.readouterr().err


def test_what_can_be_mended_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(raised(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/labels/part"))) == 1
    text = capsys.readouterr().err
    assert "/out/labels/part" in text and "Make room" in text and "[disk_full]" in text


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("file", "file"),
        ("file/below", "file"),
        ("n" * 300, "n" * 300),
        ("itself", "itself"),
        ("itself/below", "itself"),
        ("http://127.0.0.1:9/x", "http://127.0.0.1:9/x"),
    ],
)
def test_an_output_that_cannot_be(
    maskmill_here: Run, tmp_path: Path, toy_images: Path, output: str, words: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "itself").symlink_to("itself")
    place = output if "://" in output else tmp_path / output
    done = maskmill_here(
        "label", "--images", toy_images, "--ontology", "toyworld", "--recipe", "toy", "--output", place
    )
    assert done.returncode in (1, 2), done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr and "fault of MaskMill" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ("label", "--images", "{p}/latin.txt", "--output", "{p}/out", "--classes", "cat"),
        ("label", "--images", "{p}/folder.txt", "--output", "{p}/out", "--classes", "cat"),
        ("label", "--images", "{p}/latin.csv", "--output", "{p}/out", "--classes", "cat"),
        ("label", "--images", "{p}/images", "--output", "{p}/out", "--ontology", "{p}/latin.yaml"),
        ("label", "--images", "{p}/images", "--output", "{p}/out", "--ontology", "{p}/folder.yaml"),
        ("label", "--images", "{p}/images", "--output", "{p}/out", "--ontology", "{p}/deep.yaml"),
        ("label", "--images", "{p}/images", "--output", "{p}/out", "--classes", "a",
         "--recipe", "{p}/latin.yaml"),
        ("label", "--images", "{p}/images", "--output", "{p}/out", "--classes", "a",
         "--recipe", "{p}/deep.yaml"),
        ("label", "--images", "{p}/images", "--output", "{p}/out", "--classes", "a",
         "--recipe", "{p}/folder.yaml"),
        ("label", "--images", "{p}/images", "--output", "{p}/out", "--classes", "a",
         "--set", "head={deep}"),
        ("label", "--images", "{p}/a\0b", "--output", "{p}/out", "--classes", "cat"),
        ("show", "{p}/latin.txt"),
        ("report", "{p}/latin.txt"),
        ("export", "{p}/latin.txt"),
    ],
)  # fmt: skip
def test_files_of_users_that_are_not_what_they_should_be(
    maskmill_here: Run, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    for name in ("latin.txt", "latin.csv", "latin.yaml"):
        (tmp_path / name).write_bytes(b"uri\ncaf\xe9.jpg\n")
    for name in ("folder.txt", "folder.yaml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.md").write_text("x")
    deep = "[" * 20_000
    (tmp_path / "deep.yaml").write_text(deep)
    done = maskmill_here(*(word.replace("{p}", str(tmp_path)).replace("{deep}", deep) for word in arguments))
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr and "fault of MaskMill" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
