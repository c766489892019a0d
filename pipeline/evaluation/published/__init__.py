"""Figures that papers and repositories published, as data with their sources.

One YAML file per table, in this package. Figures are in percent as printed; null is a figure that was not
found or that the table does not have. Figures of different protocols must not be compared, so every look-up
names one:

    seed      as MaskCLIP's repository evaluates: whole images, short side 512
    unified   as MaskCLIP's successors do: short side 336 or more, sliding windows
    clipseg   as CLIPSeg's repository does: 352 × 352

A dataset is named as the built-in ontologies are; a setting that changes the task follows a slash:
``voc20/zero-shot``, ``pascal5i/text``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models.errors import WrongUse

_FOLDER = Path(__file__).parent

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Protocol = Literal["seed", "unified", "clipseg"]
Unit = Literal["%", "percentage points"]
Threshold = Annotated[float, Field(gt=0, lt=1)] | Literal["best"]
Percent = Annotated[float, Field(ge=-100, le=100)]
Provenance = Literal["published", "repository", "transcription"]
"""``published``: read in the publication; ``repository``: read in a repository's README or other file;
``transcription``: second hand, read where others quote the publication."""

_MARKS = {
    "published": "published",
    "repository": "repository file",
    "transcription": "second-hand transcription",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Record):
    """Where figures are printed.

    Attributes:
        citation: publication and table, or repository and file.
        provenance: how the figures were read, see :data:`Provenance`.
    """

    citation: Text
    provenance: Provenance

    def __str__(self) -> str:
        return f"{self.citation} ({_MARKS[self.provenance]})"


class Column(_Record):
    """What a column of figures measures.

    Attributes:
        dataset: name of the dataset, with the setting after a slash.
        metric: ``miou``, ``miou_seen``, ``miou_unseen`` and ``hiou`` as in ``evaluation.json``; CLIPSeg's
            ``iou_fg``, ``iou_bin`` and ``ap``; ``delta_probability``.
        unit: of its figures.
    """

    dataset: Text
    metric: Text
    unit: Unit = "%"


class Row(_Record):
    """The figures of one method.

    Attributes:
        method: as the table calls it.
        model: backbone or weights, where the table tells them apart.
        threshold: probability beyond which a pixel is foreground; ``best`` was chosen on the test set.
        values: one a column; None where there is no figure.
        source: of this row, where it is not the table's.
        note: what to know about this row.
    """

    method: Text
    model: Text | None = None
    threshold: Threshold | None = None
    values: tuple[Percent | None, ...]
    source: Source | None = None
    note: Text | None = None

    @property
    def title(self) -> str:
        """The method, and in brackets the model where the table tells models apart."""
        return f"{self.method} ({self.model})" if self.model else self.method


@dataclass(frozen=True)
class Figure:
    """One published number with everything needed to quote it.

    Attributes:
        table: name of the table.
        value: in ``unit``, as printed.
    """

    dataset: str
    method: str
    model: str | None
    metric: str
    value: float
    unit: Unit
    threshold: float | Literal["best"] | None
    protocol: Protocol
    source: Source
    table: str
    note: str | None

    @property
    def share(self) -> float:
        """The value as a share, 0.217 for 21.7 %."""
        return round(self.value / 100, 6)

    def entry(self) -> dict[str, Any]:
        """As an entry of ``published`` in ``evaluation.json``; the value is a share."""
        return {
            "method": self.method if self.model is None else f"{self.method} ({self.model})",
            "metric": self.metric,
            "value": self.share,
            "source": str(self.source),
            "protocol": self.protocol,
        }


class PublishedTable(_Record):
    """A table of a publication or repository.

    Attributes:
        name: of the file, without its ending.
        title: what the table shows.
        protocol: how all of its figures were measured.
        source: of all rows that name no other.
        columns: what is measured.
        rows: in the order of print.
        notes: what to know before comparing.
    """

    name: Text
    title: Text
    protocol: Protocol
    source: Source
    columns: Annotated[tuple[Column, ...], Field(min_length=1)]
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _rows_fit_columns(self) -> PublishedTable:
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ValueError(f"{row.method}: {len(row.values)} values for {len(self.columns)} columns")
        return self

    def source_of(self, row: Row) -> Source:
        """Where a row of this table is printed."""
        return row.source or self.source

    def metrics(self, dataset: str) -> list[str]:
        """Metrics of the columns for a dataset with its setting."""
        return [column.metric for column in self.columns if column.dataset == dataset]

    def shares(self, row: Row, dataset: str) -> dict[str, float]:
        """Figures of a row for a dataset with its setting, as shares by metric, without those not found."""
        return {
            column.metric: round(value / 100, 6)
            for column, value in zip(self.columns, row.values, strict=True)
            if column.dataset == dataset and value is not None
        }

    def figures(self) -> Iterator[Figure]:
        """All numbers, row by row; those not found are left out."""
        for row in self.rows:
            for column, value in zip(self.columns, row.values, strict=True):
                if value is not None:
                    yield Figure(
                        dataset=column.dataset,
                        method=row.method,
                        model=row.model,
                        metric=column.metric,
                        value=value,
                        unit=column.unit,
                        threshold=row.threshold,
                        protocol=self.protocol,
                        source=self.source_of(row),
                        table=self.name,
                        note=row.note,
                    )


@cache
def names() -> tuple[str, ...]:
    """Names of all tables."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


@cache
def load_published(name: str) -> PublishedTable:
    """A table by name.

    Raises:
        MaskMillError: ``dataset_unknown``, with the names there are.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise WrongUse(
            "dataset_unknown",
            f"There is no table of published figures {name!r}.",
            f"{hint}Known: {', '.join(names())}.",
        )
    return PublishedTable.model_validate(
        yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    )


def lookup(dataset: str, method: str | None, protocol: str) -> list[Figure]:
    """Published figures for one dataset under one protocol.

    Args:
        dataset: as in :attr:`Column.dataset`; ``voc20`` does not give those of ``voc20/zero-shot``.
        method: as in :attr:`Row.method`, upper and lower case alike; None for all.
        protocol: ``seed``, ``unified`` or ``clipseg``; there are no figures for any other.

    Returns:
        In the order of tables and rows; empty if nothing is published.

    >>> [figure.value for figure in lookup("context59", "MaskCLIP", "unified")]
    [26.4, 15.8]
    """
    return [
        figure
        for name in names()
        for figure in load_published(name).figures()
        if figure.protocol == protocol
        and figure.dataset == dataset
        and (method is None or figure.method.casefold() == method.casefold())
    ]
