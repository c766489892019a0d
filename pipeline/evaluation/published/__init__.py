"""Published figures of papers and repositories, with their sources.

Each table is a YAML file in this package. Figures are in percent, as printed; null marks a figure that was
not found or is not in the table. Figures from different protocols must not be compared, so every look-up
names one:

    seed      MaskCLIP's repository: whole images, short side 512
    unified   MaskCLIP's successors: short side 336 or more, sliding windows
    clipseg   CLIPSeg's repository: 352 × 352

Datasets are named like the built-in ontologies; a setting that changes the task follows a slash:
``voc20/zero-shot``, ``pascal5i/text``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models.errors import WrongUse, did_you_mean

_FOLDER = Path(__file__).parent

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Protocol = Literal["seed", "unified", "clipseg"]
Unit = Literal["%", "percentage points"]
Threshold = Annotated[float, Field(gt=0, lt=1)] | Literal["best"]
Percent = Annotated[float, Field(ge=-100, le=100)]
Provenance = Literal["published", "repository", "transcription"]
"""``published``: read in the publication itself; ``repository``: read in a repository's README or other file;
``transcription``: second hand, from others who quote the publication."""

_MARKS = {
    "published": "published",
    "repository": "repository file",
    "transcription": "second-hand transcription",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Record):
    """Source of the figures.

    Attributes:
        citation: publication and table, or repository and file.
        provenance: how the figures were obtained.
    """

    citation: Text
    provenance: Provenance

    def __str__(self) -> str:
        return f"{self.citation} ({_MARKS[self.provenance]})"


class Column(_Record):
    """Meaning of a column.

    Attributes:
        dataset: name of the dataset, with the setting after a slash.
        metric: ``miou``, ``miou_seen``, ``miou_unseen`` and ``hiou`` as in ``evaluation.json``; CLIPSeg's
            ``iou_fg``, ``iou_bin`` and ``ap``; ``delta_probability``.
        unit: unit of the figures.
    """

    dataset: Text
    metric: Text
    unit: Unit = "%"


class Row(_Record):
    """The figures of one method.

    Attributes:
        method: the method's name in the table.
        model: backbone or weights, if the table distinguishes them.
        threshold: probability above which a pixel is foreground; ``best`` was chosen on the test set.
        values: one per column, None without a figure.
        source: the row's source, if it is not the table's.
        note: remark on the row.
    """

    method: Text
    model: Text | None = None
    threshold: Threshold | None = None
    values: tuple[Percent | None, ...]
    source: Source | None = None
    note: Text | None = None

    @property
    def title(self) -> str:
        """The method, with the model in parentheses if there is one."""
        return f"{self.method} ({self.model})" if self.model else self.method


@dataclass(frozen=True)
class Figure:
    """A published number with everything needed to quote it; ``value`` is in ``unit``, as printed."""

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
        """The value as a fraction: 0.217 for 21.7 %."""
        return round(self.value / 100, 6)

    def entry(self) -> dict[str, Any]:
        """The figure as an entry of ``published`` in ``evaluation.json``, with the value as a fraction."""
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
        name: stem of the file.
        title: what the table shows.
        protocol: the protocol of all figures.
        source: default for rows without a source.
        columns: meaning of the columns.
        rows: in printed order.
        notes: caveats for comparisons.
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
        """The source of a row."""
        return row.source or self.source

    def metrics(self, dataset: str) -> list[str]:
        """Metrics of a dataset's columns; ``dataset`` includes the setting."""
        return [column.metric for column in self.columns if column.dataset == dataset]

    def shares(self, row: Row, dataset: str) -> dict[str, float]:
        """A row's figures for a dataset (including the setting), as fractions by metric; no nulls."""
        return {
            column.metric: round(value / 100, 6)
            for column, value in zip(self.columns, row.values, strict=True)
            if column.dataset == dataset and value is not None
        }

    def figures(self) -> Iterator[Figure]:
        """All figures, row by row, without nulls."""
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
    """Load a table.

    Raises:
        MaskMillError: ``name_unknown``, listing the known names.
    """
    if name not in names():
        raise WrongUse(
            "name_unknown",
            f"There is no table of published figures {name!r}.",
            f"{did_you_mean(name, names())}Known: {', '.join(names())}.",
        )
    return PublishedTable.model_validate(
        yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    )


def lookup(dataset: str, method: str | None, protocol: str) -> list[Figure]:
    """Find the published figures for a dataset under a protocol.

    Args:
        dataset: including the setting; ``voc20`` does not match ``voc20/zero-shot``.
        method: the method's name, ignoring case; None for all.
        protocol: ``seed``, ``unified`` or ``clipseg``; others have no figures.

    Returns:
        Figures in the order of tables and rows; empty if nothing is published.

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
