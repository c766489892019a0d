"""Learning rates against closed forms, and against PyTorch's schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from models.errors import MaskMillError
from pipeline.training.loop.optimisation import learning_rate
from pipeline.training.loop.settings import LoopSettings


def settings(**changes: object) -> LoopSettings:
    return LoopSettings(**({"iterations": 100, "batch_size": 4, "learning_rate": 0.02} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "changes", "expected"),
    [
        (1, {}, 0.02),
        (51, {"power": 1.0, "min_learning_rate": 0.0}, 0.01),
        (51, {"power": 2.0, "min_learning_rate": 0.01}, 0.01 + 0.01 * 0.25),
        (100, {}, 1e-4 + (0.02 - 1e-4) * 0.01**0.9),  # mmcv's last iteration
        (51, {"schedule": "cosine", "min_learning_rate": 0.0}, 0.01),
        (26, {"schedule": "cosine", "min_learning_rate": 0.004}, 0.004 + 0.008 * (1 + math.sqrt(0.5))),
        (77, {"schedule": "constant"}, 0.02),
        (1, {"schedule": "constant", "warmup": 9}, 0.002),
        (9, {"schedule": "constant", "warmup": 9}, 0.018),
        (10, {"schedule": "constant", "warmup": 9}, 0.02),
        (1, {"warmup": 4, "power": 1.0, "min_learning_rate": 0.0}, 0.02 / 5),
    ],
)
def test_closed_forms(step: int, changes: dict[str, object], expected: float) -> None:
    assert learning_rate(step, settings(**changes)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["poly", "cosine"])
def test_agrees_with_pytorch(kind: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    theirs = (
        torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=100, power=0.9)
        if kind == "poly"
        else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    )
    ours = settings(schedule=kind, min_learning_rate=0.0)
    for step in range(1, 101):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(step, ours), rel=1e-6)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"iterations": 0}, "iterations = 0: "),
        ({"learning_rate": float("nan")}, "learning_rate = NaN: "),
        ({"clip_norm": -1.0}, "clip_norm = -1.0: "),
        ({"optimizer": "lion"}, "optimizer = lion: .*'sgd' or 'adamw'"),
        ({"min_learning_rate": 0.5}, "above learning_rate"),
        ({"max_failures": -2}, "max_failures = -2: "),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(MaskMillError, match=says) as caught:
        settings(**changes)
    assert caught.value.code == "setting_invalid"


@pytest.mark.parametrize(
    ("workers", "accumulation", "fits"), [(0, 1, True), (2, 2, True), (3, 1, False), (2, 3, False)]
)
def test_a_batch_must_divide_evenly(workers: int, accumulation: int, fits: bool) -> None:
    chosen = settings(batch_size=8, accumulation=accumulation)
    if fits:
        chosen.check_workers(workers)
        return
    with pytest.raises(MaskMillError, match=f"multiple of {workers * accumulation}") as caught:
        chosen.check_workers(workers)
    assert caught.value.code == "setting_invalid"
