"""Commands of MaskMill in processes of their own, that are watched, disturbed and waited for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
HOOKS = Path(__file__).resolve().parent / "hooks"
"""First in the PYTHONPATH of commands that are disturbed from inside."""
LIMIT_S = 900.0
"""A command that has not ended after this time hangs."""


def plain(cache: Path) -> dict[str, str]:
    """Environment of commands: a cache of their own, faults from inside possible; no cluster."""
    return {
        "PYTHONPATH": f"{HOOKS}{os.pathsep}{ROOT}",
        "MASKMILL_CACHE": str(cache),
        "RAY_ADDRESS": "",
        # At Ray's own 15, workers starve beside anything else on this machine.
        "RAY_worker_niceness": "5",
        # Ray takes a raylet for dead after five times this period, 15 s by default, and ends what has
        # lost the head of its cluster after the second number, 60 s by default.
        "RAY_health_check_period_ms": "1000",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    }


class Hung(Exception):
    """A command did not end in time; the text says which, and what it said last."""


class Unexpected(Exception):
    """A command ended otherwise than it should have; the text says how."""


class Command:
    """``maskmill`` in processes of its own.

    Args:
        arguments: of ``maskmill``.
        environment: of the processes.
        log: file that gets what it says, after what is there already.
        folder: where it runs.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path = ROOT
    ) -> None:
        self.arguments = list(arguments)
        self._log = log
        self._from = log.stat().st_size if log.exists() else 0
        self._end = time.monotonic() + LIMIT_S
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *self.arguments],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        self.driver = psutil.Process(self._process.pid)

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self._log.read_bytes()[self._from :].decode(errors="replace")

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Wait for its end; returns the exit status, or minus the signal that ended it.

        Raises:
            Hung: ``LIMIT_S`` after its start.
        """
        try:
            return self._process.wait(max(0.1, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            raise self._hung() from None

    def wait_until(self, what: Callable[[], object], *, every_s: float = 0.01) -> bool:
        """Wait until something is true; returns whether it was before the command ended.

        Raises:
            Hung: ``LIMIT_S`` after the start of the command.
        """
        while not what():
            if not self.runs:
                return False
            if time.monotonic() > self._end:
                self.end()
                raise self._hung()
            time.sleep(every_s)
        return True

    def expect(self, *statuses: int) -> int:
        """Wait for its end, which must have one of these statuses.

        Raises:
            Hung: ``LIMIT_S`` after its start.
            Unexpected: it has another status, or shows a traceback.
        """
        status = self.wait()
        if status not in statuses or "Traceback (most recent" in self.said:
            raise Unexpected(f"{' '.join(self.arguments[:2])} ended with {status}: {self.said[-1500:]}")
        return status

    def kill(self) -> None:
        """SIGKILL to the driver alone; returns once it is gone."""
        self._process.kill()
        self._process.wait()

    def send(self, number: int) -> None:
        """Send a signal to the driver."""
        self._process.send_signal(number)

    def end(self) -> None:
        """SIGKILL to all of its processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.driver.children(recursive=True), self.driver]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()

    def _hung(self) -> Hung:
        return Hung(f"{' '.join(self.arguments)} did not end in {LIMIT_S:.0f} s: {self.said[-1500:]}")


def parts_of(output: Path, folder: str = "labels") -> int:
    """Number of parts that a run has written."""
    with contextlib.suppress(FileNotFoundError):
        return sum(name.endswith(".parquet") and name[0] != "." for name in os.listdir(output / folder))
    return 0
