"""How the labels of one table differ from those of another."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel, ConfigDict, FiniteFloat

from pipeline.metrics.divergence import divergence_by_name, most_moved
from pipeline.table.statistics import QualityScore


class Compared(Protocol):
    """What is compared of a table.

    Attributes:
        shares: of each class in the pixels that have one, by name; empty without any.
        mean_quality: of the labelled images; None without any.
        score: what quality it is.
        failed_share: share of the images without labels, in [0, 1].
        ignored_share: share of the pixels that have no class, in [0, 1].
    """

    @property
    def shares(self) -> dict[str, float]: ...

    @property
    def mean_quality(self) -> float | None: ...

    @property
    def score(self) -> QualityScore: ...

    @property
    def failed_share(self) -> float: ...

    @property
    def ignored_share(self) -> float: ...


class LabelDrift(BaseModel):
    """How labels differ from earlier ones.

    Attributes:
        divergence: of the shares of the classes, by name, in bits: 0 is alike, 1 has no class in common. None
            if one of the tables has no labelled pixel.
        moved: the classes whose share changed most, with their shares before and after.
        quality: mean quality, before and after; None for both if they are of different kinds.
        failed: share of images without labels, before and after.
        ignored: share of pixels without a class, before and after.
    """

    model_config = ConfigDict(frozen=True)

    divergence: FiniteFloat | None
    moved: tuple[tuple[str, float, float], ...]
    quality: tuple[float | None, float | None]
    failed: tuple[float, float]
    ignored: tuple[float, float]

    def sentences(self) -> list[str]:
        """The drift for people, a line each."""
        said = ["The labels cannot be compared: one of the tables has none."]
        if self.divergence is not None:
            moved = [f"{name} from {before:.1%} to {after:.1%}" for name, before, after in self.moved]
            most = f"; most changed {', '.join(moved)}" if moved else ""
            said = [f"The classes of the labels diverge by {self.divergence:.3f} bits{most}."]
        before, after = self.quality
        if before is not None and after is not None:
            said.append(f"Mean label quality went from {before:.3f} to {after:.3f}.")
        for what, (was, now) in (
            ("images without labels", self.failed),
            ("pixels without a class", self.ignored),
        ):
            said.append(f"The share of {what} went from {was:.1%} to {now:.1%}.")
        return said


def compare_labels(before: Compared, after: Compared, *, most: int = 3) -> LabelDrift:
    """Compare two tables; classes are matched by name.

    Args:
        before: the labels of before, such as those that the model in use was trained on.
        after: the new ones.
        most: how many classes to name.
    """
    old, new = before.shares, after.shares
    known = bool(old) and bool(new)
    same = before.score == after.score
    return LabelDrift(
        divergence=divergence_by_name(old, new) if known else None,
        moved=tuple(
            (name, old.get(name, 0.0), new.get(name, 0.0))
            for name in most_moved(old, new)[:most]
            if known and old.get(name, 0.0) != new.get(name, 0.0)
        ),
        quality=(before.mean_quality, after.mean_quality) if same else (None, None),
        failed=(before.failed_share, after.failed_share),
        ignored=(before.ignored_share, after.ignored_share),
    )
