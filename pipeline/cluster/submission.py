"""Jobs of a Ray cluster, through its public Jobs API.

What is asked for has one name, and each attempt at it is a job with this name and a number, so that a second
submission finds the first. What a job needs travels with it: the code, and small files that it names.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.files.faults import one_line
from pipeline.files.redaction import redact

PACKAGES = ("jobs", "models", "pipeline")
"""What a job runs; beside each other in a checkout as in an installation."""

MOST_MB = 100
"""Largest working directory. Ray takes 500 MB, keeps it in the head's memory, and copies it to each node."""

ANSWER_S = 20.0
"""Time for a head to answer."""

READY_S = 120.0
"""Time for a head that has just been started to be ready for jobs."""

SILENCE_S = 30.0
"""After this time without a line of the log, the head is asked whether it is still there."""

RECONNECTS = 5
"""How often a log that breaks off is taken up again, without a line in between."""

STOPPED_S = 60.0
"""Time for a job to stop; Ray kills it sooner than that."""

_UNSAFE = re.compile(r"[^a-z0-9]+")
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it.

    Attributes:
        name: submission id.
        status: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
        command: what it runs.
        message: the cluster's words on the status.
        exit_code: of the command, if it has ended by itself.
        started, ended: Unix time in seconds.
    """

    name: str
    status: str
    command: str
    message: str
    exit_code: int | None
    started: float | None
    ended: float | None

    @property
    def over(self) -> bool:
        """Whether the status is final."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_status(self) -> int:
        """What a command that waits for the job exits with: the job's own; 130 if it was stopped."""
        if self.status == "STOPPED":
            return 130
        if self.status == "FAILED":
            return self.exit_code if self.exit_code and self.exit_code > 0 else 1
        return 0


def job_name(words: Sequence[str], place: str) -> str:
    """The name of what is asked for: readable, and different for another command.

    Args:
        words: the job's command line.
        place: its output, if it has one.
    """
    digest = hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:8]
    title = re.split(r"[/\\]", place.rstrip("/\\"))[-1]
    readable = _UNSAFE.sub("-", f"maskmill {words[0]} {title}".lower()).strip("-")[:60].rstrip("-")
    return f"{readable}-{digest}"


def attempt_name(name: str, number: int) -> str:
    """The submission id of an attempt, counted from 1."""
    return name if number == 1 else f"{name}-{number}"


@contextlib.contextmanager
def working_directory(files: Mapping[str, Path]) -> Iterator[tuple[Path, int]]:
    """A folder with the code and the named files, and its size in bytes.

    Args:
        files: path within the folder → file or folder on this machine.

    Raises:
        MaskMillError: ``wrong_use``, with the largest files if they are too large.
    """
    home = Path(__file__).resolve().parents[2]
    for name, path in files.items():
        if Path(name).parts[0] in PACKAGES and not path.resolve().is_relative_to(home):
            raise WrongUse(
                "wrong_use",
                f"{name} would take the place of MaskMill's own code in the job's folder.",
                "Give its folder another name.",
            )
    with tempfile.TemporaryDirectory(prefix="maskmill-job-") as scratch:
        root = Path(scratch)
        sources = {name: home / name for name in PACKAGES} | dict(files)
        sizes = {
            str(Path(name) / path.relative_to(source)): path.stat().st_size
            for name, source in sources.items()
            for path in ([source] if source.is_file() else source.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
        total = sum(sizes.values())
        if total > MOST_MB * 1_000_000:
            largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
            named = ", ".join(f"{name} ({sizes[name] / 1e6:.0f} MB)" for name in largest)
            raise WrongUse(
                "wrong_use",
                f"{total / 1e6:.0f} MB would travel with the job, and {MOST_MB} MB is the most. The largest: "
                f"{named}.",
                "Put data where the cluster can read it, such as s3://BUCKET/…, and name that instead.",
            )
        for name, source in sources.items():
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file():
                shutil.copyfile(source, target)
            else:
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        yield root, total


class JobClient:
    """Submits jobs to a cluster, and tells what becomes of them.

    Args:
        address: of the dashboard, ``http://HEAD:8265``.

    Raises:
        MaskMillError: ``cluster_unreachable``.
    """

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        reach(self._address)
        # Ray takes an address in the environment rather than the one that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self._address
        self._client = self._ask(self._connect)

    def attempts(self, name: str) -> list[Job]:
        """The jobs that are attempts at what has this name, first to last."""
        pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
        found: dict[int, Job] = {}
        for details in self._ask(self._client.list_jobs):
            match = pattern.fullmatch(details.submission_id or "")
            if match:
                found[int(match[1] or 1)] = _job(details)
        return [found[number] for number in sorted(found)]

    def job(self, name: str) -> Job:
        """The job with a submission id.

        Raises:
            MaskMillError: ``name_unknown``.
        """
        return _job(self._ask(lambda: self._client.get_job_info(name), name))

    def submit(self, name: str, words: Sequence[str], folder: Path, variables: Mapping[str, str]) -> bool:
        """Submit a command of MaskMill.

        Args:
            name: submission id.
            words: the command's arguments.
            folder: working directory, which is uploaded unless the cluster has it.
            variables: environment of the job. The cluster shows it to everyone who has its token.

        Returns:
            False if there is a job with this id already.
        """
        deadline = time.monotonic() + READY_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=shlex.join(["python", "-m", "jobs.cli", *words]),
                    submission_id=name,
                    runtime_env={"working_dir": str(folder), "env_vars": dict(variables)},
                )
                return True
            except Exception as error:
                if "already exists" in str(error):
                    return False
                # The dashboard answers some seconds before the agent that starts jobs.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise self._told(error, name) from error
            time.sleep(1)

    def stop(self, name: str) -> Job:
        """Stop a job and wait for its end.

        Raises:
            MaskMillError: ``name_unknown``; ``output_in_use`` if it has not stopped after ``STOPPED_S``.
        """
        self._ask(lambda: self._client.stop_job(name), name)
        deadline = time.monotonic() + STOPPED_S
        while not (job := self.job(name)).over:
            if time.monotonic() > deadline:
                raise FailedWork(
                    "output_in_use", f"{name} was told to stop, and still runs.", "Look again in a minute."
                )
            time.sleep(0.5)
        return job

    def follow(self, name: str, show: Callable[[str], None]) -> Job:
        """Pass on what a job writes until it ends.

        Args:
            name: submission id.
            show: called with each piece of its output.

        Raises:
            MaskMillError: ``cluster_unreachable``, ``name_unknown``.
        """
        shown = failures = 0
        while True:
            before, broken = shown, None
            try:
                shown = asyncio.run(self._tail(name, shown, show))
            except _BrokenOff as error:
                shown, broken = error.shown, error
            job = self.job(name)
            failures = 0 if broken is None or shown > before else failures + 1
            if job.over and (broken is None or failures > RECONNECTS):
                return job
            if failures > RECONNECTS:
                raise FailedWork(
                    "cluster_unreachable",
                    f"The log of {name} breaks off: {broken}",
                    "The job continues. Run the same command again to follow it.",
                )
            time.sleep(1)

    async def _tail(self, name: str, shown: int, show: Callable[[str], None]) -> int:
        """Show the log from a position on, in characters; returns the position of its end.

        Raises:
            _BrokenOff: with the position that was reached.
        """
        position = 0
        lines = self._client.tail_job_logs(name)
        try:
            while True:
                piece = asyncio.ensure_future(anext(lines))
                while not (await asyncio.wait({piece}, timeout=SILENCE_S))[0]:
                    # Whoever waits at a connection whose other end is gone learns nothing.
                    reach(self._address)
                    if self.job(name).over:
                        piece.cancel()
                        raise TimeoutError("the job is over, and its log has no end")
                text = await piece
                position += len(text)
                if position > shown:
                    show(text[len(text) - (position - shown) :] if position - shown < len(text) else text)
                    shown = position
        except StopAsyncIteration:
            return shown
        except Exception as error:
            raise _BrokenOff(error, shown) from error

    def _connect(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self._address)

    def _ask(self, question: Callable[[], T], name: str = "") -> T:
        try:
            return question()
        except Exception as error:
            raise self._told(error, name) from error

    def _told(self, error: Exception, name: str) -> MaskMillError:
        import ray.exceptions

        if isinstance(error, MaskMillError):
            return error
        if isinstance(error, ray.exceptions.AuthenticationError):
            return FailedWork(
                "cluster_unreachable",
                f"The Ray at {self._address} does not let you in: {str(error).splitlines()[0]}",
                "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's token.",
            )
        if "status code 404" in str(error) and name:
            return WrongUse(
                "name_unknown",
                f"The Ray at {self._address} has no job {name}.",
                "maskmill submit prints the id of each job; a cluster that was started anew knows none.",
            )
        if "ray[default]" in str(error):
            return FailedWork("package_missing", one_line(error), "Install it: pip install 'ray[default]'.")
        return FailedWork(
            "cluster_unreachable",
            f"The Ray at {self._address} did not do what it was asked: {one_line(error)}",
            "Look at the head's logs; the same command can be given again.",
        )


class _BrokenOff(Exception):
    def __init__(self, cause: Exception, shown: int) -> None:
        super().__init__(one_line(cause))
        self.shown = shown


def reach(address: str) -> None:
    """Make sure that a Ray dashboard answers, in bounded time: Ray's own client waits without end.

    Raises:
        MaskMillError: ``cluster_unreachable``.
    """
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_S) as reply:
            known = "ray_version" in json.loads(reply.read(100_000))
    except urllib.error.HTTPError as error:
        known = error.code in (401, 403)  # it wants the token
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise FailedWork(
            "cluster_unreachable",
            f"Nothing answers at {redact(address)}: {redact(str(reason))}",
            "Is the cluster up, and the tunnel to its dashboard open (ray dashboard cluster.yaml, or kubectl "
            "port-forward)? A head without ray[default] has no dashboard.",
        ) from error
    if not known:
        raise FailedWork(
            "cluster_unreachable",
            f"What answers at {redact(address)} is not the dashboard of a Ray.",
            "Give --address http://HEAD:8265. A head without ray[default] has no dashboard.",
        )


def _job(details: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return milliseconds / 1000 if milliseconds else None

    return Job(
        name=details.submission_id,
        status=details.status.value,
        command=details.entrypoint,
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=seconds(details.start_time),
        ended=seconds(details.end_time),
    )
