"""Rounds of a labelling run: each labels some partitions of the corpus, on the nodes that are there then."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.cluster.nodes import plan_like, plan_when_joined
from pipeline.cluster.progress import Progress
from pipeline.cluster.resources import Compute
from pipeline.corpus.spill import PARTITION
from pipeline.files.storage import Storage
from pipeline.labelling.file_rows import rows_per_file
from pipeline.labelling.flow import NOTHING, Replanning, run_labelling
from pipeline.labelling.labeller import PreparedLabeller
from pipeline.labelling.recipes import LabelRecipe
from pipeline.labelling.stages import Write
from pipeline.ontology.ontology import Ontology
from pipeline.table.increment import Choice, Table, Work, commit, record_counts, unfinished
from pipeline.table.record import TableRecord
from pipeline.table.statistics import QualityScore

ROUND_IMAGES = 32_768
"""Images of a round for each that is labelled at the same time: workers take their time to start."""


@dataclass(kw_only=True)
class Rounds:
    """Labels what was chosen of a corpus, in rounds.

    Attributes:
        storage: the output, whose lease the run holds.
        run_id: of the run.
        table: what the output holds.
        recipe: every setting that changes the labels.
        ontology: the classes.
        score: what the column ``quality`` holds.
        large: gather the rows of many parts in each file.
        joined: whether the nodes are those of a cluster, and may change.
        fence: raises if the lease was lost.
        notice: called with what the user should know.
        outcome: images by status, of the rounds that are committed.
        kept: new rows that were not taken, by status; see ``Replaced``.
    """

    storage: Storage
    run_id: str
    table: Table
    recipe: LabelRecipe
    ontology: Ontology
    score: QualityScore
    large: bool
    joined: bool
    fence: Callable[[], None]
    notice: Callable[[str], None]
    outcome: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    _work: Work | None = None

    def label(
        self,
        choice: Choice,
        prepared: PreparedLabeller,
        compute: Compute,
        report: Callable[[Progress], None],
    ) -> Progress:
        """Label all rounds, and commit all but the last."""
        progress, began = NOTHING, time.monotonic()
        for work in choice.rounds(max(PARTITION, ROUND_IMAGES * compute.actors * compute.calls)):
            if self._work is not None:
                self.commit()
                # A flow that has ended refers to itself, and so keeps its manifest: Python looks for such
                # objects by their number, not by their size, and may not do so for many rounds.
                gc.collect()
                if self.joined:
                    compute = plan_when_joined(plan_like(compute), self.notice)
            self._work = work
            progress = self._round(work, prepared, compute, report, progress, began)
        return progress

    def commit(self) -> TableRecord:
        """Put in place and count what the round has added, and write the record of the table."""
        assert self._work is not None
        fresh, replaced = commit(self.storage, self._work.todo, self.table, self.fence, self.notice)
        self.outcome.update(Counter(fresh.status) + Counter(replaced.added.status) + replaced.kept)
        self.kept.update(replaced.kept)
        return record_counts(self.storage, self.table, fresh, replaced)

    def _round(
        self,
        work: Work,
        prepared: PreparedLabeller,
        compute: Compute,
        report: Callable[[Progress], None],
        so_far: Progress,
        began: float,
    ) -> Progress:
        replanning = Replanning(
            plan=lambda before: plan_when_joined(plan_like(before), self.notice),
            unfinished=lambda manifest: unfinished(manifest, self.storage, self.table),
            notice=self.notice,
        )
        return run_labelling(
            work.todo,
            make_labeller=prepared.build,
            image_settings=self.recipe.images,
            write=Write(
                self.storage,
                self.run_id,
                ignore_index=self.ontology.ignore_index,
                num_classes=self.ontology.num_classes,
                score=self.score,
                replacing=work.replacing,
            ),
            compute=compute,
            report=report,
            replanning=replanning if self.joined else None,
            so_far=so_far,
            began=began,
            file_rows=rows_per_file(work.todo) if self.large else None,
        )
