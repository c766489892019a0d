"""Set-up: real environments of a tiny project, and interpreters that lack something."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
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
    """A project of the same layout: one package to run, one to test it, both in a folder of wheels."""
    root = tmp_path / "project with blank"
    (root / "jobs").mkdir(parents=True)
    shutil.copy(ROOT / "jobs" / "bootstrap.py", root / "jobs")
    shutil.copy(ROOT / "Makefile", root)
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "requirements.txt").write_text("pinned==1.0\n")
    (root / "requirements-dev.txt").write_text("-r requirements.txt\ntested==1.0\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version in (("pinned", "1.0"), ("pinned", "2.0"), ("tested", "1.0")):
        with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            wheel.writestr(f"{name}.py", f"version = {version!r}")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    # A make above this one would hand its flags down, and pip's settings would bring an index.
    for name in [name for name in os.environ if name.startswith(("PIP_", "MAKE", "MFLAGS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return root


def make(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=project, capture_output=True, text=True, check=False)


def interpreter(path: Path, before: str) -> str:
    """An interpreter that runs ``before`` ahead of the script it is given, as an argument of make."""
    code = f"{before}; import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    path.write_text(f'#!/bin/sh\n[ "$1" = -I ] && shift\nexec "{sys.executable}" -I -c "{code}" "$@"\n')
    path.chmod(0o755)
    return f"PYTHON={path}"


@pytest.fixture
def python(tmp_path: Path) -> str:
    """This interpreter on a large disk: the packages of these tests are small, however little is free."""
    roomy = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1e11)"
    return interpreter(tmp_path / "roomy", roomy)


def version(project: Path, package: str) -> str:
    """Of a package in the project's environment, or why it cannot be imported."""
    command = [project / ".venv/bin/python", "-c", f"import {package}; print({package}.version)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).splitlines()[-1]


def test_it_parses_on_old_pythons() -> None:
    ast.parse((ROOT / "jobs" / "bootstrap.py").read_text(), feature_version=(3, 6))


@pytest.mark.slow
def test_running_is_installed_first_then_testing_and_a_second_call_is_a_no_op(
    project: Path, python: str
) -> None:
    first = make(project, "setup", python)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Ready" in first.stdout
    assert version(project, "pinned") == "1.0" and "No module named" in version(project, "tested")
    # The project is importable from anywhere.
    imported = [project / ".venv/bin/python", "-c", "import jobs.bootstrap as b; print(b.__file__)"]
    assert str(project) in subprocess.check_output(imported, text=True, cwd="/")

    tests = make(project, "setup-dev", python)
    assert tests.returncode == 0 and "Making the environment" not in tests.stdout
    assert version(project, "tested") == "1.0"

    files = {path: path.stat().st_mtime_ns for path in (project / ".venv").rglob("*")}
    for target in ("setup", "setup-dev"):
        again = make(project, target, python)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert {path: path.stat().st_mtime_ns for path in (project / ".venv").rglob("*")} == files

    (project / "requirements.txt").write_text("pinned==2.0\n")
    updated = make(project, "setup", python)
    assert updated.returncode == 0 and "Making the environment" not in updated.stdout
    assert version(project, "pinned") == "2.0"


@pytest.mark.slow
def test_an_environment_of_another_place_is_made_anew_and_an_interrupted_setup_continues(
    project: Path, python: str
) -> None:
    venv = project / ".venv"
    venv.mkdir()
    (venv / "pyvenv.cfg").touch()
    (venv / "maskmill-setup.json").write_text('{"home": ["3.11", "/usr/bin/python3", "/before/it/moved"]}')
    requirements = project / "requirements.txt"
    requirements.write_text("pinned==1.0\nabsent==3.1\n")
    failed = make(project, "setup", python)
    assert failed.returncode != 0 and "Making the environment" in failed.stdout
    # pip's own reason, then what to do about it.
    assert "No matching distribution found for absent==3.1" in failed.stderr
    assert "setup: pip failed" in failed.stderr and "PIP_INDEX_URL" in failed.stderr
    assert "Traceback" not in failed.stderr
    requirements.write_text("pinned==1.0\n")
    mended = make(project, "setup", python)
    assert mended.returncode == 0 and "Making the environment" not in mended.stdout
    assert version(project, "pinned") == "1.0"


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("import sys; sys.version_info = (3, 9, 18)", ["3.10 to 3.13", "3.9.18", "make PYTHON="]),
        ("import sys; sys.version_info = (3, 14, 0)", ["3.10 to 3.13", "3.14.0", "make PYTHON="]),
        ("import sys; sys.modules['ensurepip'] = None", ["virtual environments", "apt install python3."]),
        ("import sys; sys.modules['venv'] = None", ["virtual environments", "apt install python3."]),
        (
            "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1.25e9)",
            ["8 GB of disk", "has 1.2 GB", "make VENV="],
        ),
        (None, ["there is no python3-of-nowhere here", "make PYTHON="]),
    ],
    ids=["old", "new", "no ensurepip", "no venv", "full disk", "no python"],
)
def test_what_is_missing_is_said_in_one_line(
    project: Path, tmp_path: Path, before: str | None, words: list[str]
) -> None:
    python = interpreter(tmp_path / "python", before) if before else "PYTHON=python3-of-nowhere"
    result = make(project, "setup", python)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and lines[0].startswith("setup: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_a_folder_that_is_no_environment_is_left_alone(project: Path, python: str) -> None:
    (project / "photos").mkdir()
    (project / "photos" / "one.jpg").touch()
    result = make(project, "setup", python, "VENV=photos")
    assert result.returncode != 0 and "neither empty nor a virtual environment" in result.stderr
    assert (project / "photos" / "one.jpg").exists()


def test_requirements_are_pinned_and_name_no_host_and_no_path() -> None:
    pins = {}
    for name in REQUIREMENTS:
        lines = (ROOT / name).read_text().splitlines()
        if name == "requirements-dev.txt":
            assert lines.pop(0) == "-r requirements.txt"
        for line in lines:
            assert "==" in line.partition(";")[0]
            assert not set("/@\\") & set(line) and not line.startswith("-"), line
        pins[name] = {line.partition("==")[0] for line in lines}
    assert not pins["requirements.txt"] & pins["requirements-dev.txt"]
