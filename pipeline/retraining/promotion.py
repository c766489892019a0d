"""Move the alias ``champion``: by the gate's verdict, back again, or by force.

MLflow's aliases have no compare-and-set, so the caller holds the lease of the retraining. Each move is
written to the ledger (``pipeline.retraining.ledger``) as an intent, then made, read back, and written as a
fact. A process may be killed at any of these points: the same call continues from there, and makes one such
entry in all. An alias that somebody else has moved is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.retraining import registry
from pipeline.retraining.ledger import CONCLUSIONS, Entry, Intent, Ledger
from pipeline.table.lease import Lease, refuse_other_holder

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_NOTES: Mapping[str, str] = {"forcing": "forced", "rolling_back": "rolled_back"}
"""The tag that says why, of the version that a person has chosen, or has left."""


def promote(
    ledger: Ledger,
    client: MlflowClient,
    lease: Lease,
    name: str,
    version: str,
    *,
    expected: str | None,
    verdict: Mapping[str, Any],
    run: str,
) -> Entry:
    """Make a version champion, because the gate says so.

    Args:
        ledger: of the retraining.
        client: of ``pipeline.retraining.registry.connect_registry``.
        lease: of the ledger's output.
        name: of the registered model.
        version: to be champion.
        expected: the champion that it was compared with; None if there was none.
        verdict: of the gate.
        run: number of the tick.

    Returns:
        The entry ``promoted``; that of an earlier call if this tick has promoted the version already, even
        if it was rolled back since.

    Raises:
        MaskMillError: ``champion_changed`` if somebody else has moved the alias; ``name_unknown``;
            ``output_in_use`` if the lease is lost; ``tracking_unreachable``; as
            ``pipeline.retraining.registry.refuse_other_owner`` and ``Ledger.entries``.
    """
    registry.refuse_other_owner(client, name, ledger.output)
    unfinished = ledger.standing(name).unfinished
    if unfinished is not None and not _is_of_tick(unfinished, version, expected, run):
        settle(ledger, client, lease, name)
        unfinished = None
    done = _entry_of_tick(ledger, "promoted", name, version, run)
    if done is not None:
        return done
    if unfinished is None:
        unfinished = _intend(
            ledger, client, lease, "promoting", name, version, previous=expected, run=run, verdict=verdict
        )
    return _move(ledger, client, lease, unfinished)


def refuse(
    ledger: Ledger,
    client: MlflowClient,
    lease: Lease,
    name: str,
    version: str | None,
    *,
    verdict: Mapping[str, Any],
    run: str,
) -> Entry:
    """Write down that the gate has refused a version; the alias stays. See ``promote``.

    Args:
        version: the registered candidate; None if it was not registered.
    """
    settle(ledger, client, lease, name)
    done = _entry_of_tick(ledger, "refused", name, version, run)
    return done or ledger.append(lease, "refused", name, version, run=run, verdict=verdict)


def force(
    ledger: Ledger,
    client: MlflowClient,
    lease: Lease,
    name: str,
    version: str,
    *,
    why: str,
    user: str | None = None,
) -> Entry:
    """Make a version champion, whatever the gate says and whoever moved the alias. See ``promote``.

    Args:
        why: in words; also a tag of the version.
        user: who wants it.

    Returns:
        The entry ``forced``; if the version is champion by ledger and alias already, the entry that made it
        so.
    """
    registry.refuse_other_owner(client, name, ledger.output)
    unfinished = ledger.standing(name).unfinished
    if unfinished is not None and (unfinished.kind, unfinished.version) == ("forcing", version):
        return _move(ledger, client, lease, unfinished)
    settle(ledger, client, lease, name)
    found = registry.alias(client, name, registry.CHAMPION)
    last = _last_move(ledger, name)
    if last is not None and found == version == ledger.current(name):
        return last
    intent = _intend(ledger, client, lease, "forcing", name, version, previous=found, why=why, user=user)
    return _move(ledger, client, lease, intent)


def rollback(
    ledger: Ledger,
    client: MlflowClient,
    lease: Lease,
    name: str,
    *,
    to: str | None = None,
    why: str | None = None,
    user: str | None = None,
) -> Entry:
    """Go back to the champion before, by the ledger. See ``promote``.

    A rollback that was stopped is finished, and no other one begun. If the last move was a rollback, nothing
    moves unless ``to`` asks for it: who repeats a command that was killed cannot know how far it had come.

    Args:
        to: the version to go back to, which was champion; None is the champion before.
        why: in words; also a tag of the version that was champion.
        user: who wants it.

    Returns:
        The entry ``rolled_back``; an earlier one if nothing had to move.

    Raises:
        MaskMillError: ``input_missing`` if there is no champion before; ``wrong_use`` if ``to`` was none.
    """
    registry.refuse_other_owner(client, name, ledger.output)
    unfinished = ledger.standing(name).unfinished
    if unfinished is not None and unfinished.kind == "rolling_back" and to in (None, unfinished.version):
        return _move(ledger, client, lease, unfinished)
    settle(ledger, client, lease, name)
    standing = ledger.standing(name)
    found = registry.alias(client, name, registry.CHAMPION)
    if standing.champion not in (None, found):
        raise _changed(name, found, standing.champion)
    last = _last_move(ledger, name)
    if last is not None and (to == last.version or (to is None and last.kind == "rolled_back")):
        return last
    if to is not None and to not in standing.champions[:-1]:
        earlier = ", ".join(standing.champions[:-1]) or "none"
        raise WrongUse(
            "wrong_use",
            f"Version {to} of {name} was not champion before this one; by the ledger of {ledger.output.uri} "
            f"there were: {earlier}.",
            "Choose one of these, or any version: maskmill promote … --version N --force --why TEXT.",
        )
    if standing.before is None:
        has = "never had a champion" if standing.champion is None else "has had no champion before this one"
        raise FailedWork(
            "input_missing",
            f"There is nothing to go back to: {name} {has} by the ledger of {ledger.output.uri}.",
            "Choose a version yourself: maskmill promote … --version N --force --why TEXT.",
        )
    intent = _intend(
        ledger,
        client,
        lease,
        "rolling_back",
        name,
        to or standing.before,
        previous=standing.champion,
        why=why,
        user=user,
    )
    return _move(ledger, client, lease, intent)


def settle(ledger: Ledger, client: MlflowClient, lease: Lease, name: str) -> Entry | None:
    """Conclude what a stopped run has left, without moving the alias.

    Returns:
        The conclusion: that of the intent if the alias has moved, else ``failed``; None if nothing was left.

    Raises:
        MaskMillError: ``output_in_use``; ``tracking_unreachable``; as ``Ledger.entries``.
    """
    intent = ledger.standing(name).unfinished
    if intent is None:
        return None
    if registry.alias(client, name, registry.CHAMPION) == intent.version:
        return _conclude(ledger, client, lease, intent)
    return _append(ledger, lease, intent, "failed", "It was stopped before the alias moved.")


def _intend(
    ledger: Ledger,
    client: MlflowClient,
    lease: Lease,
    kind: Intent,
    name: str,
    version: str,
    *,
    previous: str | None,
    run: str | None = None,
    verdict: Mapping[str, Any] | None = None,
    why: str | None = None,
    user: str | None = None,
) -> Entry:
    registry.read_version(client, name, version)  # refuses one that is not there
    return ledger.append(
        lease, kind, name, version, previous=previous, run=run, verdict=verdict, why=why, user=user
    )


def _move(ledger: Ledger, client: MlflowClient, lease: Lease, intent: Entry) -> Entry:
    """Move the alias as an intent says, unless it has been moved, and conclude it."""
    assert intent.version is not None
    found = registry.alias(client, intent.name, registry.CHAMPION)
    if found == intent.previous != intent.version:
        refuse_other_holder(ledger.output, lease.run_id)
        try:
            registry.set_alias(client, intent.name, registry.CHAMPION, intent.version)
        except MaskMillError as error:
            if error.code == "name_unknown":
                _append(ledger, lease, intent, "failed", error.message)
            raise
        found = registry.alias(client, intent.name, registry.CHAMPION)
    if found != intent.version:
        changed = _changed(intent.name, found, intent.previous)
        _append(ledger, lease, intent, "failed", changed.message)
        raise changed
    return _conclude(ledger, client, lease, intent)


def _conclude(ledger: Ledger, client: MlflowClient, lease: Lease, intent: Entry) -> Entry:
    tag = _NOTES.get(intent.kind)
    about = intent.previous if intent.kind == "rolling_back" else intent.version
    if tag is not None and about is not None and intent.why:
        refuse_other_holder(ledger.output, lease.run_id)
        registry.tag_version(client, intent.name, about, tag, intent.why)
    return _append(ledger, lease, intent, CONCLUSIONS[intent.kind], intent.why)


def _append(ledger: Ledger, lease: Lease, intent: Entry, kind: Any, why: str | None) -> Entry:
    return ledger.append(
        lease,
        kind,
        intent.name,
        intent.version,
        previous=intent.previous,
        run=intent.run,
        verdict=intent.verdict,
        why=why,
        user=intent.user,
    )


def _last_move(ledger: Ledger, name: str) -> Entry | None:
    moves = (entry for entry in reversed(ledger.of(name)) if entry.kind in CONCLUSIONS.values())
    return next(moves, None)


def _is_of_tick(intent: Entry, version: str, expected: str | None, run: str) -> bool:
    said = (intent.kind, intent.version, intent.previous, intent.run)
    return said == ("promoting", version, expected, run)


def _entry_of_tick(ledger: Ledger, kind: str, name: str, version: str | None, run: str) -> Entry | None:
    for entry in ledger.of(name):
        if (entry.kind, entry.version, entry.run) == (kind, version, run):
            return entry
    return None


def _changed(name: str, found: str | None, expected: str | None) -> FailedWork:
    def said(version: str | None) -> str:
        return "no version" if version is None else f"version {version}"

    return FailedWork(
        "champion_changed",
        f"Somebody else has moved the alias {registry.CHAMPION} of {name}: it points to {said(found)}, not "
        f"to {said(expected)}. It was left there.",
        "Find out who did it. Then let the next retraining compare with it, or choose a version yourself: "
        "maskmill promote … --version N --force --why TEXT.",
    )
