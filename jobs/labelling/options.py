"""Where a labelling run writes, what it takes on, and how it is run and tracked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Suppress

from jobs.options import Address, Flag, Maybe, SystemMetrics, Tracking, Verbose


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Where a labelling run writes, what it takes on, and how it is run and tracked.

    Attributes:
        output: folder (or s3://… prefix) for the label table.
        limit: for a try: only the first N images. Run again without it for the others.
        sample: for a try: only N images at random; a larger sample holds a smaller one.
        max_failure_rate: exit with 1 if a larger share of the images of this run fails.
        changed: also label again the images that have changed under their names since they were labelled.
        retry_failed: label only the images again that failed; codes select some ("--retry-failed
            not_found unavailable").
        overwrite: delete a table that is already in --output and start over.
        tags: of the run in MLflow; not an option.
    """

    output: str
    limit: Maybe[int] = None
    sample: Maybe[int] = None
    max_failure_rate: float = 0.05
    changed: Flag = False
    retry_failed: Maybe[tuple[str, ...]] = None
    overwrite: Flag = False
    tracking: Tracking = None
    system_metrics: SystemMetrics = False
    address: Address = None
    verbose: Verbose = False
    tags: Annotated[Mapping[str, str], Suppress] = field(default_factory=dict)
