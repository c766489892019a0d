"""``maskmill status``: what a job does now, or what became of it, by what lies beside its output."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import duration, time_left
from jobs.options import Flag, Maybe, Tracking
from models.errors import WrongUse
from pipeline.files.status import Status, read_status
from pipeline.files.storage import Storage, canonical_uri, is_remote, open_storage
from pipeline.retraining.ledger import LEDGER_FOLDER, Entry, Ledger, replay
from pipeline.retraining.state import Tick, read_tick, run_names
from pipeline.table.labels import OK
from pipeline.table.lease import LEASE_TTL_S, Holder, read_holder
from pipeline.table.record import TableRecord, find_table_record

SCHEMA_VERSION = 1
PLACES = ("", ".maskmill")
"""Where an output keeps its status and its lease: an export keeps them apart from its files."""
_RUN_ID = re.compile(r"[0-9a-f]{8,32}", re.IGNORECASE)
_AGAIN = "Run the same command again to go on."

State = Literal["running", "finished", "failed", "stopped", "dead", "idle"]


@dataclass(frozen=True)
class Found:
    """What lies beside an output.

    Attributes:
        uri: of the output.
        status: of the latest job; None if none has written one.
        holder: of the lease; None if nobody holds it.
        table: record of a label table.
        tick: the latest of a retraining.
        entries: ledger of a retraining.
    """

    uri: str
    status: Status | None
    holder: Holder | None
    table: TableRecord | None
    tick: Tick | None
    entries: tuple[Entry, ...]

    @property
    def starting(self) -> bool:
        """Whether a run holds the output that has not written a status yet."""
        if self.holder is None or (self.status is not None and self.status.run_id == self.holder.run_id):
            return False
        alive = self.holder.is_alive()
        return time.time() - self.holder.heartbeat < LEASE_TTL_S if alive is None else alive

    @property
    def state(self) -> State:
        """How it stands."""
        if self.starting:
            return "running"
        if self.status is None:
            return "idle" if self.holder is None else "dead"
        life = self.status.life()
        if life != "finished":
            return life
        return "finished" if self.status.finished == "ok" else self.status.finished or "dead"

    def to_dict(self) -> dict[str, Any]:
        """As ``ShowStatus`` describes it."""
        status, holder, counts = self.status, self.holder, self.table.counts if self.table else {}
        return {
            "schema_version": SCHEMA_VERSION,
            "output": self.uri,
            "state": self.state,
            "job": None
            if status is None
            else {**status.model_dump(mode="json"), "age_s": round(status.age_s, 1)},
            "lease": None
            if holder is None
            else {"run_id": holder.run_id, "host": holder.host, "pid": holder.pid},
            "table": None
            if self.table is None
            else {
                "updated": self.table.updated,
                "images": counts.get("images"),
                "failures": _failures(counts),
            },
            "retraining": None
            if self.tick is None and not self.entries
            else {
                "tick": None if self.tick is None else self.tick.model_dump(mode="json"),
                "champions": _champions(self.entries),
                "last": self.entries[-1].model_dump(mode="json") if self.entries else None,
            },
        }


@dataclass(frozen=True, kw_only=True)
class ShowStatus:
    """Show what a job does now: where it runs, how far it is, its rate, its failures, its last sign of life.

    Works from any machine that reaches the output: label, import, evaluate, export, train and retrain write
    status.json beside what they make. Exits with 0 while the job runs, once it has ended well, and if there
    is a table but no job; with 1 if it failed, was stopped, or is dead.

    With --json, one object: schema_version 1; output; state (running, finished, failed, stopped, dead, or
    idle: a table and no job); job (status.json, and age_s: seconds since the last sign of life); lease
    (run_id, host, pid); table (updated, images, failures by code); retraining (tick with its steps, champions
    by name, last entry of the ledger). What does not exist is null.

    Attributes:
        output: the --output of the job, or the id of its run in MLflow.
        json: print it as JSON.
        watch: refresh every so many seconds, until the job has ended.
    """

    output: Annotated[Positional[str], arg(metavar="OUT|RUN")]
    json: Flag = False
    watch: Maybe[float] = None
    tracking: Tracking = None

    def run(self, console: Console | None = None) -> int:
        """Show the status, once or again and again.

        Raises:
            MaskMillError: ``wrong_use`` if nothing of MaskMill is there; ``name_unknown``; what storages and
                records say.
        """
        console = console or Console()
        if self.watch is not None and not self.watch > 0:
            raise WrongUse("wrong_use", f"--watch {self.watch:g} is no time.", "Give seconds, such as 5.")
        storage = open_storage(self._place())
        while True:
            found = look(storage)
            if self.json:
                indent = 2 if self.watch is None else None
                print(json.dumps(found.to_dict(), indent=indent, ensure_ascii=False), flush=True)
            else:
                text = "\n".join(described(found))
                console.print(text, highlight=False, soft_wrap=True, markup=False)
            if self.watch is None or found.state != "running":
                return 0 if found.state in ("running", "finished", "idle") else 1
            try:
                time.sleep(self.watch)
            except KeyboardInterrupt:  # of the looking, not of the job
                return 0

    def _place(self) -> str:
        """The output; that of a tracked run, if there is no such place but a run."""
        place = canonical_uri(self.output)
        if is_remote(place) or Path(place).exists() or not _RUN_ID.fullmatch(self.output):
            return self.output
        from pipeline.tracking.runs import choose_runs

        (run,) = choose_runs([self.output], self.tracking)
        if "output" not in run.params:
            raise WrongUse(
                "wrong_use", f"Run {run.id} does not say where its output is.", "Give the output itself."
            )
        return run.params["output"]


def look(storage: Storage) -> Found:
    """Read what lies beside an output; changes nothing.

    Raises:
        MaskMillError: ``wrong_use`` if nothing of MaskMill is there; what storages and records say.
    """
    status, holder = None, None
    for place in PLACES:
        within = storage.child(place) if place else storage
        status = status or read_status(within)
        holder = holder or read_holder(within)
    ticks = run_names(storage)
    found = Found(
        storage.uri,
        status,
        holder,
        find_table_record(storage),
        read_tick(storage, ticks[-1]) if ticks else None,
        Ledger(storage).entries() if storage.exists(LEDGER_FOLDER) else (),
    )
    if not any((found.status, found.holder, found.table, found.tick, found.entries)):
        raise WrongUse(
            "wrong_use",
            f"There is no job and no label table in {storage.uri}.",
            "Give the --output of a command, or the id of a run (maskmill runs).",
        )
    return found


def described(found: Found) -> Iterator[str]:
    """The status for people, line by line."""
    status, holder = found.status, found.holder
    if status is None or found.starting:
        if holder is not None:
            doing = "a job is starting" if found.starting else "a job was here, and is dead"
            yield f"{found.uri}: {doing} (process {holder.pid} on {holder.host}, run {holder.run_id})"
            if not found.starting:
                yield f"  {_AGAIN}"
        else:
            yield f"{found.uri}: no job"
    else:
        yield from _job(found, status)
    if found.table is not None:
        counts = found.table.counts
        failures = _failures(counts)
        if counts:
            yield f"  table        {counts.get('images', 0):,} images{_failed(failures, ', ')}"
        else:
            yield "  table        not counted yet"
    yield from _retraining(found)


def _job(found: Found, status: Status) -> Iterator[str]:
    state = {"finished": "has ended well", "failed": "has failed", "stopped": "was stopped"}
    where = f"process {status.pid} on {status.host}, run {status.run_id}"
    yield f"{found.uri}: {status.job} {state.get(found.state, f'is {found.state}')} ({where})"
    if found.state in ("running", "dead") and status.stage:
        yield f"  stage        {status.stage}"
    done = _done(status, running=found.state == "running")
    if done:
        yield f"  done         {done}"
    if status.failures:
        yield f"  failed       {_failed(status.failures)}"
    figures = {name: value for name, value in status.figures.items() if value is not None}
    if figures:
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        yield f"  figures      {shown}"
    if status.message:
        code = f" [{status.error}]" if status.error else ""
        yield f"  it says      {status.message}{code}"
    yield f"  last sign    {_age(found, status)}"
    if status.mlflow_run:
        yield f"  MLflow run   {status.mlflow_run}"


def _done(status: Status, *, running: bool) -> str:
    if status.done is None:
        return ""
    of = ""
    if status.total:
        of = f" of {status.total:,}"
    parts = [f"{status.done:,}{of} {status.unit}".strip()]
    if status.total:
        parts[0] += f" ({status.done / status.total:.0%})"
    if status.per_second:
        parts.append(f"{status.per_second:,.1f} {status.unit}/s")
    if running and status.eta_s is not None:
        parts.append(time_left(max(0.0, status.eta_s - max(0.0, status.age_s))))
    return ", ".join(parts)


def _age(found: Found, status: Status) -> str:
    age = status.age_s
    if age < -5:
        ago = f"now (the clock of {status.host} is {duration(-age)} ahead of this one)"
    else:
        ago = f"{duration(max(0.0, age))} ago"
    if found.state == "dead":
        return f"{ago}. There is no sign of life: it was probably killed. {_AGAIN}"
    if found.state == "failed":
        return f"{ago}. Mend what it says. {_AGAIN}"
    if found.state == "stopped":
        return f"{ago}. {_AGAIN}"
    return ago


def _retraining(found: Found) -> Iterator[str]:
    tick = found.tick
    if tick is not None:
        at = tick.at
        done = sum(step.state == "done" for step in tick.steps)
        now = tick.outcome or ("between steps" if at is None else f"step {at.name} ({at.state})")
        yield f"  tick         {tick.run}: {now}, {done} of {len(tick.steps)} steps done"
        if at is not None and at.command and tick.outcome is None:
            yield f"  alone        {at.command}"
    champions = _champions(found.entries)
    for name, version in champions.items():
        yield f"  champion     {name} version {version or 'none yet'}"
    if found.entries:
        last = found.entries[-1]
        version = f" version {last.version}" if last.version else ""
        why = f": {last.why}" if last.why else ""
        yield f"  last entry   {last.time} {last.kind.replace('_', ' ')} {last.name}{version}{why}"


def _champions(entries: tuple[Entry, ...]) -> dict[str, str | None]:
    return {name: replay(entries, name).champion for name in dict.fromkeys(entry.name for entry in entries)}


def _failures(counts: Mapping[str, Any]) -> dict[str, int]:
    return {code: count for code, count in counts.get("status", {}).items() if code != OK}


def _failed(failures: Mapping[str, int], before: str = "") -> str:
    """``3: 2 not_found, 1 decode_failed``; empty if none has failed."""
    if not failures:
        return ""
    codes = ", ".join(f"{count:,} {code}" for code, count in sorted(failures.items()))
    return f"{before}{sum(failures.values()):,}{' failed' if before else ''}: {codes}"
