"""Make the project's virtual environment: what ``make setup`` runs before anything else.

Needs only the standard library, and has to *parse* on every Python 3 that a machine may offer (3.6 on), so
that an unsupported one is told so in a sentence. Hence no ``X | None``, no ``list[str]``, no dataclass here.

A stamp inside the environment records what it was made from; while nothing changed, a call does nothing.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

OLDEST, NEWEST = (3, 10), (3, 13)
STAMP = "maskmill-setup.json"
LOG = "maskmill-setup.log"
GIGABYTE = 10**9
# On Linux PyTorch asks for the CUDA packages: 2.5 GB to download, 7 GB unpacked. macOS has none.
SPACE_NEEDED = {"linux": 8 * GIGABYTE, "darwin": 3 * GIGABYTE}
SPACE_NEEDED_TEMPORARY = 2 * GIGABYTE

NO_SPACE = r"No space left on device|Errno 28|Disk quota exceeded|Errno 122"
NO_INDEX = (
    r"Retrying|NewConnectionError|Failed to establish|ConnectTimeout|Read timed out|ProxyError|"
    r"Temporary failure|Connection aborted|ConnectionError"
)


class SetupError(Exception):
    """The environment cannot be made; the text is a sentence or two that say what to do."""


def starts(python: str) -> bool:
    """Whether an interpreter can be started: its base may be gone, or it is a shim without a version."""
    try:
        result = subprocess.call([python, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        return False
    return result == 0


def check_python(version: tuple, executable: str, starts: Any = starts) -> None:
    """Raise unless ``version`` is supported; the message names a supported one if this machine has it."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return
    names = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    found = next((name for name in names if starts(name)), None)
    remedy = f"This machine has {found}" if found else "Install one and name it"
    raise SetupError(
        f"maskmill needs Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, and {executable} is "
        f"{'.'.join(str(part) for part in version[:3])}. {remedy}: make PYTHON={found or 'python3.12'}"
    )


def check_platform(system: str, machine: str) -> None:
    """Raise on systems for which PyTorch publishes no packages any more."""
    if system == "darwin" and machine == "x86_64":
        raise SetupError(
            "PyTorch has no packages for Macs with Intel processors any more. If this Mac has an Apple "
            "processor, use an arm64 Python: make PYTHON=/opt/homebrew/bin/python3"
        )


def check_venv_module(executable: str, version: tuple, find_spec: Any = importlib.util.find_spec) -> None:
    """Raise where the distribution has split ``venv`` or ``ensurepip`` off into a package of its own."""
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        raise SetupError(
            f"{executable} cannot make virtual environments (it has no ensurepip). Install the missing part "
            f"(Debian, Ubuntu: apt install python{version[0]}.{version[1]}-venv) or name another Python: "
            "make PYTHON=python3.12"
        )


def check_space(directory: str, disk_usage: Any = shutil.disk_usage) -> None:
    """Raise unless the disks that hold ``directory`` and the temporary files have room for the packages."""
    place = directory
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free, needed = disk_usage(place).free, SPACE_NEEDED.get(sys.platform, 8 * GIGABYTE)
    if free < needed:
        raise SetupError(
            f"Not enough disk space: the packages need {needed / GIGABYTE:.0f} GB and {place} has "
            f"{free / GIGABYTE:.1f} GB free. Make room, or use another disk: make VENV=/other/disk/venv"
        )
    temporary = tempfile.gettempdir()
    free = disk_usage(temporary).free
    if free < SPACE_NEEDED_TEMPORARY:
        raise SetupError(
            f"Not enough space for temporary files: pip needs {SPACE_NEEDED_TEMPORARY / GIGABYTE:.0f} GB and "
            f"{temporary} has {free / GIGABYTE:.1f} GB free. Make room, or use another disk: "
            "TMPDIR=/other/disk/tmp make setup"
        )


def explain_pip(text: str, log: str) -> str:
    """Say in a sentence why pip failed.

    Args:
        text: everything pip wrote.
        log: the file in which that is kept.
    """
    if re.search(NO_SPACE, text):
        return "The disk became full while pip was installing. Make room and run the same command again."
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            "The package index showed a certificate that this machine does not trust. "
            "If your network has its own, name it: PIP_CERT=/path/to/ca.pem make setup"
        )
    if re.search(NO_INDEX, text):
        return (
            "pip cannot reach a package index. Check the network and the proxy, "
            "or name an index that you can reach: PIP_INDEX_URL=https://HOST/simple make setup"
        )
    missing = re.search(r"No matching distribution found for (\S+)", text)
    if missing:
        return (
            f"The package index has no {missing.group(1)} for Python {sys.version_info[0]}."
            f"{sys.version_info[1]} on {platform.system()} {platform.machine()}. "
            f"Name another Python (make PYTHON=python3.12) or index (PIP_INDEX_URL=…). Details: {log}"
        )
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    return f"pip failed: {errors[-1][7:] if errors else 'it gave no reason.'} Details: {log}"


def digest(paths: list) -> str:
    """SHA-256 over the contents of files, as hex."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.sha256(file.read()).digest())
    return total.hexdigest()


def read_stamp(venv: str) -> dict:
    """The stamp of an environment; an empty one if there is none that can be read."""
    try:
        with open(os.path.join(venv, STAMP), encoding="utf-8") as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: str, stamp: dict) -> None:
    """Write the stamp in one step: whoever is cut off leaves the old one."""
    path = os.path.join(venv, STAMP)
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(stamp, file)
    os.replace(path + ".new", path)


def pip_install(python: str, arguments: list, log: str, say: Any) -> None:
    """Run ``pip install``; show the large downloads only and keep everything pip writes in ``log``."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", *arguments]
    lines: list = []
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            large = re.search(r"Downloading (\S+?)-\d\S* \((\d{2,}(?:\.\d+)? MB|[\d.]+ GB)\)", line)
            if large:
                say(f"  downloading {os.path.basename(large.group(1))}, {large.group(2)}")
            elif line.startswith("Installing collected packages"):
                say("  unpacking (a minute or two)")
            elif "Retrying" in line and not any("Retrying" in earlier for earlier in lines):
                say("  the package index does not answer; pip tries a few times")
            lines.append(line)
        if process.wait() != 0:
            raise SetupError(explain_pip("".join(lines), log))


def make_venv(venv: str, disk_usage: Any, say: Any) -> None:
    """Make an empty environment in place of whatever environment was there."""
    check_venv_module(sys.executable, sys.version_info)
    check_space(venv, disk_usage)
    if os.path.isdir(venv) and os.listdir(venv) and not os.path.exists(os.path.join(venv, "pyvenv.cfg")):
        # --clear empties the directory: never somebody's own files.
        raise SetupError(f"{venv} is not empty and no virtual environment. Name another place: make VENV=…")
    say(f"Making the environment {venv} with Python {platform.python_version()}")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", venv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if made.returncode != 0:
        reason = (made.stdout.strip().splitlines() or ["it gave no reason"])[-1]
        raise SetupError(f"{sys.executable} could not make the environment {venv}: {reason}")


def set_up(root: str, venv: str, say: Any, disk_usage: Any = shutil.disk_usage) -> bool:
    """Make or update the environment of a project; nothing happens if it is up to date.

    Args:
        root: the project, with requirements.txt and pyproject.toml.
        venv: where the environment is, or goes.
        say: takes a line of progress.
        disk_usage: as ``shutil.disk_usage``.

    Returns:
        Whether there was anything to do.

    Raises:
        SetupError: with a sentence that says what is in the way.
    """
    inputs = [os.path.join(root, name) for name in ("requirements.txt", "pyproject.toml")]
    # An environment belongs to one interpreter and, because the install is editable, to one place.
    base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    home = {"interpreter": base, "version": list(sys.version_info[:3]), "root": root, "venv": venv}
    wanted = dict(home, inputs=digest(inputs))
    python = os.path.join(venv, "bin", "python")
    # Two makes at once: the second waits, then finds the work done. The lock is on a file that exists anyway.
    with open(inputs[0], "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = read_stamp(venv)
        if stamp == wanted and os.access(python, os.X_OK):
            return False
        if {key: stamp.get(key) for key in home} != home or not starts(python):
            make_venv(venv, disk_usage, say)
            # From here on, a run that is cut short can be taken up again.
            write_stamp(venv, dict(home, inputs="unfinished"))
        log = os.path.join(venv, LOG)
        say("Installing the pinned packages (once; some gigabytes on Linux, as PyTorch brings CUDA)")
        pip_install(python, ["--requirement", inputs[0]], log, say)
        # requirements.txt pins the build backend too, so nothing is fetched here.
        pip_install(python, ["--no-deps", "--no-build-isolation", "--editable", root], log, say)
        write_stamp(venv, wanted)
    return True


def say_line(text: str) -> None:
    """Print a line at once, for logs that are followed."""
    print(text, flush=True)


def main(argv: Any = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bootstrap", description="Make the project's virtual environment.")
    parser.add_argument("--venv", default=".venv", help="where it goes, relative to the project")
    options = parser.parse_args(argv)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    venv = os.path.normpath(os.path.join(root, os.path.expanduser(options.venv)))
    try:
        check_python(sys.version_info, sys.executable)
        check_platform(sys.platform, platform.machine())
        if set_up(root, venv, say_line):
            say_line(f"Ready: {venv}")
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"setup: cannot write {error.filename or venv}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
