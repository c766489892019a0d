"""The toy world's rows on what a corpus and an image know of their classes: candidates, purification,
calibration.
"""

from __future__ import annotations

from typing import Any

from jobs.benchmarks.rows import claim
from jobs.benchmarks.toyworld.labelling import Bench, Condition
from pipeline.evaluation.results import Claim, Section

NEAR: dict[str, Any] = {"refine": "pamr", "refine_dilations": (1, 2, 4, 8)}
"""The refiner that suits the toy world's small pictures."""
CALIBRATED: dict[str, Any] = {"calibrate": 0.95}


def classes(bench: Bench) -> tuple[Section, list[Claim]]:
    """Candidates, class purification and calibration, alone and together."""
    options: dict[str, dict[str, Any]] = {
        "all classes, as they score": {},
        "candidates: the 5 best of the class token": {"candidates": 5},
        "candidates: the 6 best of the class token": {"candidates": 6},
        "candidates: cosine of 0.2 or more": {"candidates_above": 0.2, "candidates": 3},
        "purified: redundant classes (0.15)": {"redundant_below": 0.15},
        "purified: ambiguous classes (0.7)": {"ambiguous_above": 0.7},
        "calibrated: a quarter of the 95 % quantile": CALIBRATED,
        "calibrated, half of it": {**CALIBRATED, "calibrate_weight": 0.5},
        "calibrated on 32 images": {**CALIBRATED, "calibrate_images": 32},
        "refined (PAMR, near)": NEAR,
        "calibrated and refined": {**CALIBRATED, **NEAR},
        "calibrated, 6 candidates, refined": {**CALIBRATED, **NEAR, "candidates": 6},
    }
    conditions = {name: Condition(name, settings) for name, settings in options.items()}
    section = bench.section(
        "classes",
        "Which classes an image may have, and how high their scores are",
        list(conditions.values()),
        note="Candidates are chosen by the class token of each image; purification is FreeCP's two tests. "
        "Calibration subtracts a share of each class's 95 % quantile, measured on 256 unlabelled scenes.",
    )
    runs = {name: bench.runs(condition)["miou"] for name, condition in conditions.items()}
    base = runs["all classes, as they score"]
    return section, [
        claim(text, source, runs[name], base, margin=margin)
        for text, source, name, margin in (
            (
                "Candidates by the class token raise mIoU",
                "ReCLIP, CVPR 2024",
                "candidates: the 6 best of the class token",
                0.0,
            ),
            (
                "Dropping redundant classes raises mIoU",
                "FreeCP",
                "purified: redundant classes (0.15)",
                0.0,
            ),
            ("Dropping ambiguous classes raises mIoU", "FreeCP", "purified: ambiguous classes (0.7)", 0.0),
            (
                "Calibration over the corpus raises mIoU by 2 points",
                "MaskMill",
                "calibrated: a quarter of the 95 % quantile",
                0.02,
            ),
            (
                "Calibrated and refined, labels are 5 points better than the head's",
                "MaskMill",
                "calibrated and refined",
                0.05,
            ),
        )
    ]


SECTIONS = {"classes": classes}
