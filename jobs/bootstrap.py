"""Make the project's virtual environment: the first step of every target in the Makefile.

Uses only the standard library and syntax of Python 3.6, so that an unsupported Python prints an error and no
traceback. A stamp in the environment records what it was built from, which makes a second call a no-op.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 10), (3, 13)
SPACE = 8 * 10**9  # bytes; PyTorch for Linux brings CUDA
STAMP = "maskmill-setup.json"
PIP_FAILED = """pip failed, for the reason above. Common causes:
  no network or proxy: PIP_INDEX_URL=https://HOST/simple names an index that you can reach
  unknown certificate: PIP_CERT=/path/to/ca.pem names your network's
  no matching distribution: no build for this Python or machine (PyTorch has none for Intel Macs)
  no space left: free some, or use another disk: make VENV=/other/disk/venv, TMPDIR=/other/disk make …
Then run the same command again: it continues from here."""


def fail(message: str) -> None:
    """Exit with status 1."""
    sys.exit(f"setup: {message}")


def check_python() -> None:
    """Exit unless this Python is supported and can make virtual environments."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        version = ".".join(map(str, sys.version_info[:3]))
        fail(
            f"maskmill needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]}, and {sys.executable} is {version}. "
            "Name another one: make PYTHON=python3.12"
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        fail(
            f"{sys.executable} cannot make virtual environments. Install the missing part (Debian, Ubuntu: "
            f"apt install python3.{sys.version_info[1]}-venv) or name another one: make PYTHON=python3.12"
        )


def make_venv(venv: str) -> None:
    """Create an empty environment, replacing an earlier one."""
    os.makedirs(venv, exist_ok=True)
    if os.listdir(venv) and not os.path.exists(os.path.join(venv, "pyvenv.cfg")):
        fail(f"{venv} is neither empty nor a virtual environment. Name another place: make VENV=…")
    free = shutil.disk_usage(venv).free
    if free < SPACE:
        fail(
            f"the packages need {SPACE / 1e9:.0f} GB of disk, and {venv} has {free / 1e9:.1f} GB. "
            "Free some, or use another disk: make VENV=/other/disk/venv"
        )
    print(f"Making the environment {venv}", flush=True)
    if subprocess.call([sys.executable, "-m", "venv", "--clear", venv]) != 0:
        fail("python -m venv failed, for the reason above.")


def set_up(root: str, venv: str, dev: bool) -> None:
    """Create or update the environment of the project in ``root``; ``dev`` adds what tests and lint need."""
    requirements = ["requirements.txt", "requirements-dev.txt"][: 1 + dev]
    wanted = {}
    for name in ["pyproject.toml", *requirements]:
        with open(os.path.join(root, name), "rb") as file:
            wanted[name] = hashlib.sha256(file.read()).hexdigest()
    # Scripts and the editable install contain absolute paths, so a moved environment is rebuilt.
    home = [sys.version, os.path.realpath(sys.executable), root, venv]
    stamp_path, python = os.path.join(venv, STAMP), os.path.join(venv, "bin", "python")
    with open(os.path.join(root, "pyproject.toml"), "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a concurrent call waits, then finds the work done
        try:
            with open(stamp_path) as file:
                stamp = json.load(file)
        except (OSError, ValueError):
            stamp = {}
        if stamp.get("home") != home or not os.access(python, os.X_OK):
            make_venv(venv)
            stamp = {"home": home}
        elif wanted.items() <= stamp.items():
            return
        with open(stamp_path, "w") as file:  # marks an incomplete install, which the next call resumes
            json.dump({"home": home}, file)
        print("Installing packages (once; several GB on Linux)", flush=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
        # The build backend is among the packages, so the second call downloads nothing.
        for what in (["-r", requirements[-1]], ["--no-deps", "--no-build-isolation", "-e", "."]):
            if subprocess.call(pip + what, cwd=root) != 0:
                fail(PIP_FAILED)
        with open(stamp_path, "w") as file:
            json.dump({**stamp, **wanted}, file)
    print(f"Ready: {venv}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the project's virtual environment.")
    parser.add_argument("--venv", default=".venv", help="its folder, relative to the project")
    parser.add_argument("--dev", action="store_true", help="include the packages for tests and lint")
    options = parser.parse_args()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    venv = os.path.normpath(os.path.join(root, os.path.expanduser(options.venv)))
    try:
        check_python()
        set_up(root, venv, options.dev)
    except OSError as error:
        fail(f"cannot write {error.filename or venv}: {error.strerror}")
    except KeyboardInterrupt:
        fail("interrupted. The same command continues from here.")


if __name__ == "__main__":
    main()
