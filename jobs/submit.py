"""``maskmill submit``: a command → a job on a Ray cluster."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import duration, stderr_console
from jobs.options import Flag, Maybe, Repeated
from jobs.retrain.command import Retrain
from models.errors import WrongUse
from pipeline.cluster.submission import (
    JobClient,
    attempt_name,
    job_name,
    working_directory,
)
from pipeline.files.redaction import MASK, command_line, redact
from pipeline.retraining.config import Named, named_places

if TYPE_CHECKING:
    from pipeline.cluster.submission import Job

VALUED = ("--address", "--status", "--stop", "--env", "--include")
"""Options with a value: what follows them is not the job."""

DATA = frozenset(
    {"images", "manifest", "output", "labels", "known", "root", "roots", "truth", "table", "input"}
    | {"source", "results", "corrects", "against", "honeypots"}
)
"""Options of all commands that name data, of any size and on any storage."""

DATABASE, CONFIGURED = "tracking database", "file"
"""What a configuration names besides: MLflow's, and files of recipes and classes."""

PAIRS = frozenset({"roots", "settings", "weights", "labels"})
"""Options that may be NAME=VALUE."""

NEVER = {"submit": "it is this command", "serve": "it never ends", "demo": "it is for one machine"}
"""Commands that are no job for a cluster, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Run a command of maskmill on a Ray cluster: maskmill submit label --images s3://… --output s3://…

    The job is checked here, and travels with MaskMill's code. One that runs or has succeeded is followed, not
    submitted again; one that failed or was stopped is. Exits with the job's status.

    Attributes:
        job: the command, with its options.
        address: of the cluster's dashboard, http://HEAD:8265; default: the one in
            RAY_API_SERVER_ADDRESS, else in RAY_ADDRESS.
        follow: show what the job writes until it ends.
        again: submit a job that has succeeded once more, such as for new images. One that runs is followed.
        status: show the state of a job, by the id that submit printed.
        stop: stop a job, by its id.
        env: pass this variable of your environment on, by its name; may be repeated. Not for secrets: the
            cluster shows a job's environment. Secrets are set on its machines.
        include: a file or folder, below this one, that the job reads; may be repeated. Files that its options
            or the configuration of a retraining name travel by themselves.
        shared_disk: paths outside of this folder are on a disk that all machines share.
    """

    job: Annotated[Positional[tuple[str, ...]], arg(metavar="JOB …", help_behavior_hint="")] = ()
    address: Maybe[str] = None
    follow: Flag = True
    again: Flag = False
    status: Annotated[Maybe[str], arg(metavar="ID")] = None
    stop: Annotated[Maybe[str], arg(metavar="ID")] = None
    env: Annotated[Repeated, arg(metavar="NAME")] = ()
    include: Annotated[Repeated, arg(metavar="PATH")] = ()
    shared_disk: Flag = False

    def run(self, console: Console | None = None) -> int:
        """Tell how a job is, or stop it.

        Raises:
            MaskMillError: ``wrong_use``; as ``JobClient``.
        """
        console = console or stderr_console()
        asked = [name for name in (self.status, self.stop) if name is not None]
        if len(asked) != 1 or self.job:
            raise WrongUse(
                "wrong_use",
                "maskmill submit takes one of a job, --status ID and --stop ID.",
                "Write maskmill submit label --images …, for instance.",
            )
        client = JobClient(self._place(console))
        job = client.job(asked[0])
        if self.stop is not None:
            if job.over:
                _say(console, f"{job.name} does not run: {_state(job)}.")
                return 0
            job = client.stop(job.name)
            _say(console, f"{job.name} was stopped.")
            return 0
        print(f"{job.name}: {_state(job)}\n  {redact(job.command)}")
        if job.status == "FAILED":
            print(f"  {redact(job.message)}")
        return job.exit_status

    def submit(self, parsed: object, console: Console | None = None) -> int:
        """Submit the job and follow it.

        Args:
            parsed: the job, as its own parser understood it.
            console: for messages.

        Raises:
            MaskMillError: ``wrong_use``; as ``JobClient``.
        """
        console = console or stderr_console()
        if self.status is not None or self.stop is not None:
            return self.run(console)  # which refuses it
        if self.job[0] in NEVER:
            raise WrongUse(
                "wrong_use",
                f"maskmill {self.job[0]} cannot be submitted: {NEVER[self.job[0]]}.",
                "Submit a job that reads and writes s3://…, such as label or train.",
            )
        _refuse_secrets(self.job)
        variables = self._variables()
        files = self.files(parsed)
        address = self._place(console)
        output = next((value for option, value in _named(parsed) if option == "output"), "")
        name = job_name(self.job, output)
        if _untracked(parsed) and "MLFLOW_TRACKING_URI" not in variables:
            _say(
                console,
                "Runs are tracked where MLFLOW_TRACKING_URI of the cluster's machines says. If it is not set "
                "there, add --env MLFLOW_TRACKING_URI, or --tracking URI to the job: nothing that a job "
                "writes to its own folder is kept.",
            )
        client = JobClient(address)
        job = self._find_or_submit(client, name, files, variables, console)
        if not self.follow:
            _say(console, f"maskmill submit --status {job} tells how it is; --stop {job} stops it.")
            return 0
        return _follow(client, job, console)

    def _find_or_submit(
        self,
        client: JobClient,
        name: str,
        files: dict[str, Path],
        variables: dict[str, str],
        console: Console,
    ) -> str:
        """The id of the job that does what is asked: one that is there already, or a new one."""
        with working_directory(files) as (folder, size):
            while True:
                attempts = client.attempts(name)
                last = attempts[-1] if attempts else None
                if last is not None and not last.over:
                    _say(console, f"{last.name} is there already: {_state(last)}.")
                    return last.name
                if last is not None and last.status == "SUCCEEDED" and not self.again:
                    _say(console, f"{last.name} is done: {_state(last)}. --again submits it once more.")
                    return last.name
                if last is not None:
                    _say(console, f"{last.name}: {_state(last)}. The job is submitted again.")
                new = attempt_name(name, len(attempts) + 1)
                _say(console, f"Sending {size / 1e6:.1f} MB: {', '.join(('the code', *files))}.")
                if client.submit(new, self.job, folder, variables):
                    _say(console, f"Submitted {new}.")
                    return new
                # Someone else has just submitted the same.

    def _place(self, console: Console) -> str:
        """The address of the dashboard."""
        address = self.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        if not address:
            raise WrongUse(
                "wrong_use",
                "Which cluster? Neither --address nor RAY_API_SERVER_ADDRESS is set.",
                "Give --address http://127.0.0.1:8265, with a tunnel to it (ray dashboard cluster.yaml).",
            )
        if not re.match(r"https?://[^/\s]+/*$", address):
            raise WrongUse(
                "wrong_use",
                f"{redact(address)} is not the address of a dashboard, which takes jobs.",
                "Give --address http://HEAD:8265.",
            )
        host = re.sub(r"^https?://|:\d+/*$|/*$", "", address)
        if address.startswith("http://") and host not in ("127.0.0.1", "localhost", "[::1]"):
            _say(
                console,
                f"The token travels to {host} unencrypted: in an open network use a tunnel or https.",
            )
        return address

    def _variables(self) -> dict[str, str]:
        """The variables to pass on, none of which is a secret.

        Raises:
            MaskMillError: ``wrong_use``.
        """
        found = {}
        for name in self.env:
            value = os.environ.get(name)
            if "=" in name or value is None:
                raise WrongUse(
                    "wrong_use",
                    f"--env {redact(name)} is not the name of a variable of this environment.",
                    "Set the variable first, and give its name alone: --env NAME.",
                )
            if redact(f"{name}={value}") != f"{name}={value}":
                raise WrongUse(
                    "wrong_use",
                    f"{name} holds a secret, and who has the cluster's token can read a job's environment.",
                    "Set it on the cluster's machines: docs/cluster.md says how, for AWS and for Kubernetes.",
                )
            found[name] = value
        return found

    def files(self, parsed: object) -> dict[str, Path]:
        """What travels with the job, by its path there.

        Raises:
            MaskMillError: ``wrong_use`` for a path that the cluster cannot see.
        """
        found: dict[str, Path] = {}
        for name, value in (*_named(parsed), *_configured(parsed)):
            local = Path(value).expanduser()
            data = name in DATA or name == DATABASE
            if "://" in value or not (data or name == CONFIGURED or local.exists()):
                continue
            if self.shared_disk and local.is_absolute():
                continue
            travels = local.is_file() and _below_here(local) and name not in ("output", DATABASE)
            if data and not travels:
                raise WrongUse(
                    "wrong_use",
                    f"The cluster does not see the {name} {value}, which is a place on this machine.",
                    "Give one that all machines see: s3://BUCKET/…, or an absolute path with --shared-disk.",
                )
            found[_travels_as(value)] = local
        return found | {_travels_as(value): Path(value) for value in self.include}


def job_apart(words: Sequence[str]) -> list[str]:
    """Put ``--`` before the job, so that its options are not taken for those of ``submit``.

    Args:
        words: the command line; as it is if it is not one of ``submit``.
    """
    if not words or words[0] != "submit" or "--" in words:
        return [*words]
    place = 1
    while place < len(words) and words[place].startswith("-"):
        place += 2 if words[place] in VALUED else 1
    return [*words[:place], "--", *words[place:]] if place < len(words) else [*words]


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _follow(client: JobClient, name: str, console: Console) -> int:
    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = client.follow(name, show)
    except KeyboardInterrupt:
        _say(
            console,
            f"{name} continues. The same command follows it again; maskmill submit --stop {name} stops it.",
        )
        return 130
    _say(console, f"{name}: {_state(job)}.")
    if job.status == "FAILED" and job.exit_code is None:  # it did not come to run
        _say(console, redact(job.message))
    return job.exit_status


def _state(job: Job) -> str:
    """What a job does or has done, in words."""
    words = {
        "PENDING": "it waits to be started",
        "RUNNING": "it runs",
        "SUCCEEDED": "it has succeeded",
        "FAILED": "it has failed" + (f" with exit status {job.exit_code}" if job.exit_code else ""),
        "STOPPED": "it was stopped",
    }[job.status]
    if job.started is None:
        return words
    began = datetime.datetime.fromtimestamp(job.started).astimezone().isoformat(" ", "seconds")
    return f"{words} ({duration((job.ended or time.time()) - job.started)}, since {began})"


def _named(parsed: object) -> Iterator[tuple[str, str]]:
    """(name, value) of every option of a command that is a text, those of its groups included."""
    for entry in dataclasses.fields(parsed):  # type: ignore[arg-type]
        value = getattr(parsed, entry.name)
        for one in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(one):
                yield from _named(one)
            elif isinstance(one, str | Path):
                text = str(one)
                pair = entry.name in PAIRS and "://" not in text
                yield entry.name, text.rpartition("=")[2] if pair else text


def _configured(parsed: object) -> Iterator[tuple[str, str]]:
    """(name, place) of what the configuration of a retraining names, seen from here.

    Raises:
        MaskMillError: ``setting_invalid``.
    """
    named = _configuration(parsed)
    if named is None:
        return
    assert isinstance(parsed, Retrain)
    beside = os.path.dirname(parsed.config)
    database = (named.tracking or "").partition(":///")
    places = [*named.data, *((CONFIGURED, file) for file in named.files)]
    if database[0].startswith("sqlite"):
        places.append((DATABASE, database[2]))
    for name, place in places:
        yield name, place if "://" in place else os.path.join(beside, os.path.expanduser(place))


def _configuration(parsed: object) -> Named | None:
    """What the configuration of a retraining names; None for other commands.

    Raises:
        MaskMillError: ``setting_invalid``.
    """
    if not (isinstance(parsed, Retrain) and Path(parsed.config).is_file()):
        return None
    file = Path(parsed.config)
    return named_places(file.read_bytes(), str(file), folder=file.resolve().parent)


def _untracked(parsed: object) -> bool:
    """Whether a command has an option --tracking which is not given, or a configuration without."""
    named = _configuration(parsed)
    if named is not None:
        return named.tracking is None
    return any(
        (entry.name == "tracking" and value is None)
        or (dataclasses.is_dataclass(value) and _untracked(value))
        for entry in dataclasses.fields(parsed)  # type: ignore[arg-type]
        for value in [getattr(parsed, entry.name)]
    )


def _below_here(path: Path) -> bool:
    return not path.is_absolute() and path.resolve().is_relative_to(Path.cwd().resolve())


def _travels_as(value: str) -> str:
    """The path of a file within the job's folder: the one that it has here.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    path = Path(value)
    if not path.exists() or not _below_here(path) or path.resolve() == Path.cwd().resolve():
        raise WrongUse(
            "wrong_use",
            f"{value} is not a file or folder below this one, as what travels with a job must be.",
            "Copy it here, and give its relative path.",
        )
    return os.path.normpath(path)


def _refuse_secrets(words: Sequence[str]) -> None:
    """Refuse a command line with a secret in it.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    if MASK in command_line(["maskmill", *words]):
        raise WrongUse(
            "wrong_use",
            "The job's command line holds a secret, and whoever has the cluster's token can read it.",
            "Set secrets on the cluster's machines (docs/cluster.md); give signed addresses in a list file.",
        )
