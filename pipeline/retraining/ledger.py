"""The ledger of a retraining: which version became champion when, and why. It is only ever added to.

Each entry is a file of its own, ``ledger/000001.json`` and so on, which the storage creates only if there is
none: of two writers, one gets the number, and the other is told. What is champion follows from the entries
alone, in order (``Standing``). The registry's alias should say the same; where it does not, somebody else has
moved it.

A move of the alias has two entries. The intent (``promoting``, ``forcing``, ``rolling_back``) is written
before it, and its conclusion (``promoted``, ``forced``, ``rolled_back``, or ``failed``) after it. An intent
that is the last entry of a model belongs to a run that was stopped in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.errors import Damaged, FailedWork
from pipeline.files.records import find_record, now
from pipeline.files.redaction import redact
from pipeline.files.storage import Storage
from pipeline.table.lease import Lease, refuse_other_holder

LEDGER_FOLDER = "ledger"
SCHEMA_VERSION = 1
_FILE = re.compile(r"(\d{6,})\.json")
_REMEDY = "Restore the ledger from a copy: without the entry, nobody can tell which version was champion."

Intent = Literal["promoting", "forcing", "rolling_back"]
Kind = Literal[
    "promoting", "promoted", "forcing", "forced", "rolling_back", "rolled_back", "refused", "failed"
]
CONCLUSIONS: Mapping[str, Kind] = {
    "promoting": "promoted",
    "forcing": "forced",
    "rolling_back": "rolled_back",
}
"""What an intent becomes once the alias has moved."""


class Entry(BaseModel):
    """One line of the ledger.

    Attributes:
        schema_version: of the file.
        sequence: position in the ledger, from 1.
        kind: what happened.
        time: UTC, ISO 8601.
        name: of the registered model.
        version: that is or would be champion.
        previous: the champion before; None if there was none.
        run: number of the tick, such as ``0007``; None for a promotion or rollback by hand.
        verdict: of the gate, with its reasons.
        why: in words.
        user: who did it by hand.
        fencing_token: run id of the lease under which it was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    sequence: int = Field(ge=1)
    kind: Kind
    time: str
    name: str = Field(min_length=1)
    version: str | None = None
    previous: str | None = None
    run: str | None = None
    verdict: dict[str, Any] | None = None
    why: str | None = None
    user: str | None = None
    fencing_token: str

    @property
    def is_intent(self) -> bool:
        """Whether the alias has yet to move."""
        return self.kind in CONCLUSIONS


@dataclass(frozen=True)
class Standing:
    """Where a registered model stands by its entries.

    Attributes:
        champions: versions, oldest first; the last is champion, the one before it is what a rollback goes
            to. A version that a rollback left is not among them.
        unfinished: the intent of a run that was stopped before its conclusion.
    """

    champions: tuple[str, ...] = ()
    unfinished: Entry | None = None

    @property
    def champion(self) -> str | None:
        """The champion; None if there was never one."""
        return self.champions[-1] if self.champions else None

    @property
    def before(self) -> str | None:
        """The champion that a rollback goes to; None if there is nothing to go back to."""
        return self.champions[-2] if len(self.champions) > 1 else None


def replay(entries: Iterable[Entry], name: str) -> Standing:
    """The standing of a model after entries, which are in order.

    A promotion adds its version, after the champion that it found if that was another's doing. A rollback
    takes champions away, so that a second rollback goes further back, never to what the first one left.

    >>> entry = lambda **values: Entry(sequence=1, time="", name="pets", fencing_token="t", **values)
    >>> promotions = [entry(kind="promoted", version=version) for version in "123"]
    >>> replay([*promotions, entry(kind="rolled_back", version="2", previous="3")], "pets").champions
    ('1', '2')
    """
    champions: list[str] = []
    unfinished = None
    for entry in entries:
        if entry.name != name:
            continue
        unfinished = entry if entry.is_intent else None
        if entry.kind in ("promoted", "forced"):
            for version in (entry.previous, entry.version):
                if version is not None and champions[-1:] != [version]:
                    champions.append(version)
        elif entry.kind == "rolled_back" and entry.version is not None:
            champions = champions[:-1]
            while entry.version in champions and champions[-1] != entry.version:
                champions.pop()
            if champions[-1:] != [entry.version]:
                champions.append(entry.version)
    return Standing(tuple(champions), unfinished)


class Ledger:
    """The ledger in the output of a retraining.

    Args:
        output: the retraining's, which holds the lease as well.
    """

    def __init__(self, output: Storage) -> None:
        self.output = output
        self._storage = output.child(LEDGER_FOLDER)
        self._read: list[Entry] = []  # entries never change

    def entries(self) -> tuple[Entry, ...]:
        """All entries, in order.

        Raises:
            MaskMillError: ``file_damaged`` for an entry that is missing or does not make sense, or a file
                that is no entry; ``newer_version``; ``storage_unreachable``.
        """
        numbers = []
        for file in self._storage.list():
            if file.startswith("."):  # left by a kill while it was written; never in place
                continue
            found = _FILE.fullmatch(file)
            if found is None or file != _file(int(found[1])):
                raise Damaged(
                    "file_damaged",
                    f"{self._storage.uri_of(file)} is no entry of a ledger.",
                    "Move it elsewhere, if it was put there by hand.",
                )
            numbers.append(int(found[1]))
        absent = sorted(set(range(1, max([*numbers, len(self._read)], default=0) + 1)) - set(numbers))
        if absent:
            raise Damaged(
                "file_damaged",
                f"{self._storage.uri_of(_file(absent[0]))} is missing"
                + (f", and {len(absent) - 1} more" if len(absent) > 1 else "")
                + f", while there are entries up to {max([*numbers, len(self._read)])}.",
                _REMEDY,
            )
        for number in range(len(self._read) + 1, len(numbers) + 1):
            self._read.append(self._entry(number))
        return tuple(self._read)

    def of(self, name: str) -> tuple[Entry, ...]:
        """The entries of one registered model, in order; see ``entries``."""
        return tuple(entry for entry in self.entries() if entry.name == name)

    def standing(self, name: str) -> Standing:
        """Where a model stands; see ``entries`` for errors."""
        return replay(self.entries(), name)

    def current(self, name: str) -> str | None:
        """The version that is champion by the ledger; None if there was never one."""
        return self.standing(name).champion

    def champion_before(self, name: str) -> str | None:
        """The version that a rollback goes to; None if there is nothing to go back to."""
        return self.standing(name).before

    def append(
        self,
        lease: Lease,
        kind: Kind,
        name: str,
        version: str | None,
        *,
        previous: str | None = None,
        run: str | None = None,
        verdict: Mapping[str, Any] | None = None,
        why: str | None = None,
        user: str | None = None,
    ) -> Entry:
        """Add an entry; the arguments are fields of ``Entry``, of which ``why`` loses its secrets.

        Args:
            lease: of ``output``, which must be held still.

        Raises:
            MaskMillError: ``output_in_use`` if another run has the lease, or has just written the entry of
                this number; as ``entries``.
        """
        known = self.entries()
        refuse_other_holder(self.output, lease.run_id)
        entry = Entry(
            sequence=len(known) + 1,
            kind=kind,
            time=now(),
            name=name,
            version=version,
            previous=previous,
            run=run,
            verdict=None if verdict is None else dict(verdict),
            why=None if why is None else redact(why),
            user=user,
            fencing_token=lease.run_id,
        )
        file = _file(entry.sequence)
        data = entry.model_dump_json(indent=2).encode() + b"\n"
        # An answer can be lost, and the request be sent again: then the entry there is this one.
        if not self._storage.create_bytes(file, data) and self._storage.read_bytes(file) != data:
            raise FailedWork(
                "output_in_use",
                f"Another run has just written {self._storage.uri_of(file)}.",
                "Let it finish, and run the same command again.",
            )
        self._read.append(entry)
        return entry

    def _entry(self, number: int) -> Entry:
        file = _file(number)
        place = self._storage.uri_of(file)
        entry = find_record(Entry, self._storage, file, SCHEMA_VERSION, remedy=_REMEDY)
        if entry is None:
            raise Damaged("file_damaged", f"{place} is missing.", _REMEDY)
        if entry.sequence != number:
            raise Damaged("file_damaged", f"{place} holds entry {entry.sequence}.", _REMEDY)
        return entry


def _file(number: int) -> str:
    return f"{number:06}.json"
