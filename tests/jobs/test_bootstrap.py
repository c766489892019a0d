"""The set-up script: real environments of a tiny project, and refusals by interpreters that lack things."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from jobs import bootstrap

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")
# A build backend inside the project: the editable install works without any index.
BACKEND = """
import os, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "tiny-0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as wheel:
        wheel.writestr("tiny.pth", os.getcwd())
        wheel.writestr("tiny-0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 0\\n")
        tags = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr("tiny-0.dist-info/WHEEL", tags)
        wheel.writestr("tiny-0.dist-info/RECORD", "")
    return name

build_wheel = build_editable
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tiny"
version = "0"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of the same layout that needs one package, which lies beside it as a wheel."""
    root = tmp_path / "project with blank"
    (root / "jobs").mkdir(parents=True)
    shutil.copy(ROOT / "jobs" / "bootstrap.py", root / "jobs")
    shutil.copy(ROOT / "Makefile", root)
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "requirements.txt").write_text("pinned==1.0\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        with zipfile.ZipFile(wheels / f"pinned-{version}-py3-none-any.whl", "w") as wheel:
            info = f"pinned-{version}.dist-info"
            wheel.writestr("pinned.py", f"version = {version!r}")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: pinned\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return root


def make(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A make above this one would hand its flags down.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def interpreter(path: Path, before: str) -> str:
    """An interpreter that runs ``before`` ahead of whatever script it is given."""
    code = (
        textwrap.dedent(before)
        + "\nimport runpy, sys; sys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    path.write_text(f'#!/bin/sh\n[ "$1" = -I ] && shift\nexec "{sys.executable}" -I -c "{code}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Names this interpreter to ``make``, on a disk with room: these packages are small, whatever is free."""
    roomy = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1e11)"
    return f"PYTHON={interpreter(tmp_path / 'roomy', roomy)}"


def test_it_parses_on_old_pythons() -> None:
    ast.parse((ROOT / "jobs" / "bootstrap.py").read_text(), feature_version=(3, 6))


def test_first_call_installs_second_does_nothing_and_changes_are_taken_up(project: Path, python: str) -> None:
    first = make(project, "setup", python)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Ready" in first.stdout
    venv = project / ".venv"
    pinned = [str(venv / "bin" / "python"), "-c", "import pinned; print(pinned.version)"]
    assert subprocess.check_output(pinned, text=True) == "1.0\n"
    # The project itself is importable from anywhere.
    imported = [str(venv / "bin" / "python"), "-c", "import jobs.bootstrap as b; print(b.__file__)"]
    assert str(project) in subprocess.check_output(imported, text=True, cwd="/")

    files = {path: path.stat().st_mtime_ns for path in venv.rglob("*")}
    second = make(project, "setup", python)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert {path: path.stat().st_mtime_ns for path in venv.rglob("*")} == files

    (project / "requirements.txt").write_text("pinned==2.0\n")
    third = make(project, "setup", python)
    assert third.returncode == 0 and "Making the environment" not in third.stdout
    assert subprocess.check_output(pinned, text=True) == "2.0\n"

    # Another interpreter of the same machine, as far as the stamp can tell: made anew.
    stamp = json.loads((venv / bootstrap.STAMP).read_text())
    stamp["interpreter"] = "/opt/python-that-was-removed"
    (venv / bootstrap.STAMP).write_text(json.dumps(stamp))
    (venv / "left-over").touch()
    fourth = make(project, "setup", python)
    assert fourth.returncode == 0 and "Making the environment" in fourth.stdout
    assert not (venv / "left-over").exists()


def test_a_run_that_was_cut_short_goes_on(project: Path, python: str) -> None:
    requirements = project / "requirements.txt"
    requirements.write_text("pinned==1.0\nabsent==3.1\n")
    failed = make(project, "setup", python)
    assert failed.returncode != 0
    assert "has no absent==3.1 for Python" in failed.stderr
    requirements.write_text("pinned==1.0\n")
    mended = make(project, "setup", python)
    assert mended.returncode == 0
    assert "Making the environment" not in mended.stdout  # the environment of the first run was good


@pytest.mark.parametrize(
    ("name", "before", "words"),
    [
        ("old", "import sys; sys.version_info = (3, 9, 18)", ["3.10 to 3.13", "3.9.18", "make PYTHON="]),
        ("new", "import sys; sys.version_info = (3, 14, 0)", ["3.10 to 3.13", "3.14.0", "make PYTHON="]),
        ("split", "import sys; sys.modules['ensurepip'] = None", ["ensurepip", "apt install python3."]),
        (
            "novenv",
            "import sys; sys.modules['venv'] = None",
            ["virtual environments", "apt install python3."],
        ),
        (
            "full",
            "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1.25e9)",
            ["disk space", "1.2 GB free", "make VENV="],
        ),
        (
            "intel",
            "import sys, platform; sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'",
            ["Intel"],
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    project: Path, tmp_path: Path, name: str, before: str, words: list[str]
) -> None:
    python = interpreter(tmp_path / name, before)
    result = make(project, "setup", f"PYTHON={python}")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and lines[0].startswith("setup: "), result.stderr
    for word in words:
        assert word in lines[0]
    assert not (project / ".venv").exists()


def test_no_python_at_all(project: Path) -> None:
    result = make(project, "setup", "PYTHON=python3-of-nowhere")
    assert result.returncode != 0
    assert "there is no python3-of-nowhere here" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_supported_python_of_the_machine_is_named() -> None:
    with pytest.raises(bootstrap.SetupError, match=r"This machine has python3\.12: make PYTHON=python3\.12"):
        bootstrap.check_python((3, 8, 1), "/usr/bin/python3", starts=lambda name: name <= "python3.12")
    with pytest.raises(bootstrap.SetupError, match="Install one and name it"):
        bootstrap.check_python((3, 8, 1), "/usr/bin/python3", starts=lambda name: False)


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_supported_pythons(minor: int) -> None:
    bootstrap.check_python((3, minor, 0), "python3")


def test_space_is_looked_for_where_the_environment_goes(tmp_path: Path) -> None:
    asked = []

    def usage(path: str) -> Usage:
        asked.append(path)
        return Usage(0, 0, 9e9)

    bootstrap.check_space(str(tmp_path / "not" / "there" / "yet"), usage)
    assert asked[0] == str(tmp_path)
    with pytest.raises(bootstrap.SetupError, match="temporary files"):
        bootstrap.check_space(str(tmp_path), lambda path: Usage(0, 0, 9e9 if path == str(tmp_path) else 1e9))


def test_no_index(project: Path, python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    result = make(project, "setup", python)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and "cannot reach a package index" in lines[0]


def test_files_of_others_are_left_alone(project: Path, python: str) -> None:
    (project / "photos").mkdir()
    (project / "photos" / "one.jpg").touch()
    result = make(project, "setup", python, "VENV=photos")
    assert result.returncode != 0 and "no virtual environment" in result.stderr
    assert (project / "photos" / "one.jpg").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"ERROR: Could not install: [Errno {errno.ENOSPC}] No space left on device", "disk became full"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]')) Retrying", "PIP_CERT"),
        ("ERROR: something new\n", "pip failed: something new"),
        ("killed", "it gave no reason"),
    ],
)
def test_reasons_of_pip(text: str, words: str) -> None:
    assert words in bootstrap.explain_pip(text, "log")


def test_requirements_name_no_host_and_no_path() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        requirement = line.partition(";")[0]
        assert "==" in requirement
        assert not set("/@\\") & set(line) and not line.startswith("-"), line
