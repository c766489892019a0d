"""``maskmill promote``: make a version champion by hand, whatever the gate says."""

from __future__ import annotations

import contextlib
import functools
import shlex
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import psutil
from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import stderr_console, stop_at_once, timed
from jobs.options import Flag, Maybe
from models.errors import WrongUse
from pipeline.retraining.record import find_output, read_retraining
from pipeline.table.lease import Lease

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from pipeline.retraining.ledger import Entry, Ledger
    from pipeline.retraining.record import RetrainingRecord


@dataclass(frozen=True, kw_only=True)
class Promote:
    """Make a version of a retrained model champion, whatever the gate says; the ledger notes who and why.

    Attributes:
        retraining: the output of maskmill retrain, or its configuration.
        version: number of the version in MLflow's registry.
        force: overrule the gate.
        why: reason, for the ledger and for a tag of the version.
        model: name of the registered model, if the retraining has several.
        tracking: MLflow tracking URI; default: that of the retraining.
    """

    retraining: Annotated[Positional[str], arg(metavar="OUT|CONFIG")]
    version: str
    force: Flag = False
    why: Maybe[str] = None
    model: Maybe[str] = None
    tracking: Maybe[str] = None

    def run(self, console: Console | None = None) -> int:
        """Move the alias, and say from where to where.

        Raises:
            MaskMillError: ``wrong_use``; ``output_in_use`` while a retraining runs; as
                ``pipeline.retraining.record`` and ``pipeline.retraining.promotion.force``.
        """
        why = (self.why or "").strip()
        if not self.version.isdecimal():
            raise WrongUse(
                "wrong_use", f"--version {self.version} is not the number of a version.", "Give a number."
            )
        if not self.force:
            raise WrongUse(
                "wrong_use",
                f"Whether version {self.version} becomes champion is for the gate of maskmill retrain to "
                "decide.",
                "Add --force --why TEXT to overrule it; the ledger notes it.",
            )
        if not why:
            raise WrongUse(
                "wrong_use",
                "--force needs --why: the ledger notes why the gate was overruled.",
                "Add --why TEXT.",
            )
        with changing_champion(self.retraining, self.model, self.tracking) as change:
            from pipeline.retraining.promotion import force

            entry = force(
                change.ledger,
                change.client,
                change.lease,
                change.name,
                self.version,
                why=why,
                user=this_user(),
            )
            new = entry.fencing_token == change.lease.run_id
        change.tell(entry)
        say = functools.partial((console or Console()).print, soft_wrap=True, highlight=False, markup=False)
        if new:
            tell_move(say, entry, self.retraining, self.model)
        else:
            say(f"Version {self.version} of {entry.name} is champion already, since {entry.time}.")
        return 0


@dataclass(frozen=True)
class Change:
    """What a command needs to move the champion of a retraining.

    Attributes:
        record: of the retraining.
        ledger: of the retraining.
        client: of its registry.
        lease: of its output.
        name: of the registered model.
        notice: for what the user should know.
    """

    record: RetrainingRecord
    ledger: Ledger
    client: MlflowClient
    lease: Lease
    name: str
    notice: Callable[[str], None]

    def tell(self, entry: Entry) -> None:
        """Tell the webhook of a move by hand; of an earlier one too, as a kill may have lost that message."""
        from pipeline.retraining.webhook import tell_webhook

        if entry.kind not in ("forced", "rolled_back"):
            return
        event = {
            "event": entry.kind,
            "retraining": self.record.name,
            "output": self.ledger.output.uri,
            "model": entry.name,
            "version": entry.version,
            "previous": entry.previous,
            "why": entry.why,
            "user": entry.user,
            "entry": entry.sequence,
            "time": entry.time,
        }
        warning = tell_webhook(self.record.webhook_env, event)
        if warning:
            self.notice(warning)


@contextlib.contextmanager
def changing_champion(place: str, model: str | None, tracking: str | None) -> Iterator[Change]:
    """Hold the lease of a retraining, so that none runs meanwhile.

    Args:
        place: the retraining's output, or its configuration.
        model: name of the registered model; None if there is only one.
        tracking: MLflow tracking URI instead of the recorded one.

    Raises:
        MaskMillError: ``output_in_use``; ``wrong_use``; as ``pipeline.retraining.record`` and
            ``pipeline.retraining.registry.connect_registry``.
    """
    output = find_output(place)
    record = read_retraining(output)
    name = record.model(model).name
    from pipeline.retraining.ledger import Ledger
    from pipeline.retraining.registry import connect_registry

    console = stderr_console()
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    ledger = Ledger(output)
    ledger.entries()  # damage is told before MLflow is asked
    with Lease.acquire(output, on_lost=stop_at_once, notice=say) as lease:
        with timed(console, "connecting to MLflow"):
            client = connect_registry(record, tracking)
        yield Change(record, ledger, client, lease, name, say)


def this_user() -> str:
    """Who runs this, for the ledger."""
    return f"{psutil.Process().username()}@{socket.gethostname()}"


def tell_move(say: functools.partial[None], entry: Entry, place: str, model: str | None) -> None:
    """Say what a move of the champion has changed, and what to run next."""
    before = "there was none" if entry.previous is None else f"it was version {entry.previous}"
    say(f"{entry.name}: champion is version {entry.version} now; {before}.")
    say(f"  ledger  entry {entry.sequence}" + (f": {entry.why}" if entry.why else ""))
    say(f"  use it  models:/{entry.name}@champion, or restart what has loaded it")
    if entry.previous not in (None, entry.version):
        named = "" if model is None else f" --model {shlex.quote(model)}"
        undo = f"maskmill promote {shlex.quote(place)}{named} --version {entry.previous} --force --why TEXT"
        if entry.kind == "forced":
            undo = f"maskmill rollback {shlex.quote(place)}{named} --to {entry.previous}"
        say(f"  undo    {undo}")
