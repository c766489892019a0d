from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import canberra

from models.errors import MaskMillError
from pipeline.training.maskclip_plus.drift import DriftAlarm, relative_change

NAMES = ("grass", "water", "sky", "fish")
SOUND = torch.tensor([40.0, 30.0, 20.0, 10.0])
COLLAPSED = torch.tensor([10.0, 30.0, 60.0, 0.0])


def _alarm(**changes) -> DriftAlarm:
    alarm = DriftAlarm(NAMES, **{"bound": 0.25, "patience": 3, **changes})
    alarm.set_reference(100, SOUND)
    return alarm


@pytest.mark.parametrize("seed", range(5))
def test_change_is_the_canberra_distance_per_class(seed):
    p, q = np.random.default_rng(seed).dirichlet(np.full(14, 3.0), size=2)
    q[seed] = 0  # a class without a pixel
    q /= q.sum()
    change = relative_change(torch.tensor(p) * 1000, torch.tensor(q) * 3)
    assert change == pytest.approx(canberra(p, q) / 14, rel=0.02)
    floor = 0.01 / 14
    assert change == pytest.approx(
        canberra(p + floor, q + floor) / ((p + q) / (p + q + 2 * floor)).sum(), abs=1e-12
    )


def test_rare_classes_count_but_negligible_ones_do_not():
    before = torch.tensor([0.5, 0.47, 0.03, 0.0])
    assert relative_change(before, torch.tensor([0.5, 0.5, 0.0, 0.0])) > 0.3
    assert relative_change(before, torch.tensor([0.5, 0.47 - 1e-5, 0.03, 1e-5])) < 0.01


@pytest.mark.parametrize(
    ("p", "q", "expected"), [((1, 2), (2, 4), 0.0), ((1, 0), (0, 5), 1.0), ((1, 0, 0), (0, 1, 1), 1.0)]
)
def test_change_goes_from_0_to_1(p, q, expected):
    assert relative_change(torch.tensor(p), torch.tensor(q)) == pytest.approx(expected, abs=1e-12)


def test_alarm_waits_for_its_patience_and_says_what_happened():
    alarm = _alarm()
    alarm.check(101, COLLAPSED)
    alarm.check(102, COLLAPSED)
    with pytest.raises(MaskMillError) as caught:
        alarm.check(103, COLLAPSED)
    error = caught.value
    assert error.code == "self_training_collapsed"
    for words in (
        "step 103",
        "step 100",
        "Vanished: fish 10.0% to 0.0%.",
        "Shrunk: grass 40.0% to 10.0%.",
        "Grown: sky 20.0% to 60.0%.",
    ):
        assert words in error.message, error.message
    assert f"by {alarm.drift:.0%}" in error.message
    assert "step 100" in error.remedy


def test_only_consecutive_steps_count():
    alarm = _alarm()
    for step in range(101, 131):
        alarm.check(step, SOUND if step % 3 == 0 else COLLAPSED)
    assert alarm.check(131, SOUND) == 0


@pytest.mark.parametrize(("bound", "raises"), [(0.4, True), (0.6, False), (1.0, False)])
def test_bound_decides(bound, raises):
    alarm = _alarm(bound=bound, patience=1)
    assert 0.4 < relative_change(SOUND, COLLAPSED) < 0.6
    if raises:
        with pytest.raises(MaskMillError):
            alarm.check(101, COLLAPSED)
    else:
        assert alarm.check(101, COLLAPSED) == alarm.drift == relative_change(SOUND, COLLAPSED)


def test_state_carries_reference_and_count():
    alarm = _alarm()
    alarm.check(101, COLLAPSED)
    alarm.check(102, COLLAPSED)
    resumed = DriftAlarm(NAMES, bound=0.25, patience=3)
    resumed.load_state_dict(alarm.state_dict())
    assert resumed.drift == alarm.drift
    with pytest.raises(MaskMillError, match="step 100"):
        resumed.check(103, COLLAPSED)


def test_without_a_reference_there_is_no_drift():
    alarm = DriftAlarm(NAMES, bound=0.25, patience=1)
    alarm.set_reference(1, torch.zeros(4))
    assert alarm.check(2, COLLAPSED) == 0
    resumed = DriftAlarm(NAMES, bound=0.25, patience=1)
    resumed.load_state_dict(alarm.state_dict())
    assert resumed.check(3, COLLAPSED) == 0
    assert _alarm(patience=1).check(101, torch.zeros(4)) == 0, "a batch without a pixel to guess"
