"""Make the project's virtual environment: the first step of every target in the Makefile.

Uses only the standard library and syntax of Python 3.6, so that an unsupported Python prints an error and no
traceback. A stamp in the environment records what it was built from, which makes a second call a no-op.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys

SPACE = 8 * 10**9  # bytes; PyTorch for Linux brings CUDA
PIP_FAILED = """pip failed, for the reason above. Common causes:
  no network or proxy: PIP_INDEX_URL=https://HOST/simple names an index that you can reach
  unknown certificate: PIP_CERT=/path/to/ca.pem names your network's
  no matching distribution: no build for this Python or machine (PyTorch has none for Intel Macs)
  no space left: free some, or use another disk: make VENV=/other/disk/venv, TMPDIR=/other/disk make …
Then run the same command again: it continues from here."""


def check(ok: bool, message: str) -> None:
    """Exit with status 1 and the message unless ``ok``."""
    if not ok:
        sys.exit("setup: " + message)


def set_up(root: str, venv: str, files: list) -> None:
    """Create or update the environment of the project in ``root``, with the packages of the last file."""
    # Scripts and the editable install contain absolute paths, so a moved environment is rebuilt.
    home = [sys.version, os.path.realpath(sys.executable), root, venv]
    wanted = {}
    for name in files:
        with open(os.path.join(root, name), "rb") as file:
            wanted[name] = hashlib.sha256(file.read()).hexdigest()
    stamp_path, python = os.path.join(venv, "maskmill-setup.json"), os.path.join(venv, "bin", "python")
    try:
        with open(stamp_path) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        stamp = {}
    if stamp.get("home") != home or not os.access(python, os.X_OK):
        os.makedirs(venv, exist_ok=True)
        known = not os.listdir(venv) or os.path.exists(os.path.join(venv, "pyvenv.cfg"))
        check(known, f"{venv} is neither empty nor a virtual environment. Name another place: make VENV=…")
        free = shutil.disk_usage(venv).free
        room = f"the packages need {SPACE / 1e9:.0f} GB of disk, and {venv} has {free / 1e9:.1f} GB. "
        check(free >= SPACE, room + "Free some, or use another disk: make VENV=/other/disk/venv")
        print(f"Making the environment {venv}", flush=True)
        made = subprocess.call([sys.executable, "-m", "venv", "--clear", venv]) == 0
        check(made, "python -m venv failed, for the reason above.")
        stamp = {"home": home}
    elif wanted.items() <= stamp.items():
        return
    with open(stamp_path, "w") as file:  # marks an incomplete install, which the next call resumes
        json.dump({"home": home}, file)
    print("Installing packages (once; several GB on Linux)", flush=True)
    # The build backend is among the packages, so the second call downloads nothing.
    for what in (["-r", files[-1]], ["--no-deps", "--no-build-isolation", "-e", "."]):
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
        check(subprocess.call(pip + what, cwd=root) == 0, PIP_FAILED)
    with open(stamp_path, "w") as file:
        json.dump({**stamp, **wanted}, file)
    print(f"Ready: {venv}", flush=True)


def main(venv: str, dev: bool) -> None:
    """Check this Python and set up the environment, for ``dev`` with the packages for tests and lint."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    version = ".".join(map(str, sys.version_info[:3]))
    supported = f"maskmill needs Python 3.10 to 3.13, and {sys.executable} is {version}. "
    check((3, 10) <= sys.version_info[:2] <= (3, 13), supported + "Name another one: make PYTHON=python3.12")
    package = f"Debian, Ubuntu: apt install python3.{sys.version_info[1]}-venv"
    missing = f"{sys.executable} cannot make virtual environments. Install the missing part ({package}) or "
    able = bool(importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"))
    check(able, missing + "name another one: make PYTHON=python3.12")
    try:
        with open(__file__, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a concurrent call waits, then finds the work done
            files = ["pyproject.toml", "requirements.txt", *(["requirements-dev.txt"] if dev else [])]
            set_up(root, os.path.normpath(os.path.join(root, os.path.expanduser(venv))), files)
    except OSError as error:
        check(False, f"cannot write {error.filename or venv}: {error.strerror}")
    except KeyboardInterrupt:
        check(False, "interrupted. The same command continues from here.")


if __name__ == "__main__":
    main(sys.argv[1], "--dev" in sys.argv)
