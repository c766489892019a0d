from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.clip.text import TextClassifier
from models.errors import MaskMillError
from pipeline.labelling.labeller import LabellerSettings
from pipeline.labelling.student import StudentLabeller
from pipeline.ontology.reading import load_ontology, parse_classes
from pipeline.toyworld.scenes import generate
from pipeline.trained.student import load_student, read_student_record
from tests.pipeline.trained.test_student import toy_text

COUNT = load_ontology("toyworld").num_classes


@pytest.fixture(scope="module")
def folder(student_folder: Path) -> Path:
    return student_folder


def labeller(
    folder: Path, *, text: TextClassifier | None = None, fingerprint: str | None = None, **changes: Any
) -> StudentLabeller:
    settings = LabellerSettings(**({"num_classes": COUNT} | changes))
    return StudentLabeller(settings, uri=str(folder), text=text, fingerprint=fingerprint)


def expected(folder: Path, image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """(C, H, W) probabilities: the student's own forward pass, resized to the image."""
    model = load_student(read_student_record(folder), device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(image).permute(2, 0, 1)[None])
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].softmax(0)


@pytest.mark.parametrize("size", [(64, 80), (96, 120), (61, 83)])
def test_labels_are_those_of_the_model_resized(folder: Path, size: tuple[int, int]) -> None:
    image = generate(3, 1, 80).images[0][:64]
    p, best = expected(folder, image, size).max(0)
    (prediction,) = labeller(folder).label([image], [size])
    assert prediction.labels.shape == size and prediction.labels.dtype == np.uint8
    assert len(np.unique(prediction.labels)) > 3  # a random student that sees one class proves little
    assert (prediction.labels == best.numpy()).mean() > 0.999
    assert np.abs(prediction.confidence - 255 * p.numpy()).max() < 1


def test_thresholds_are_per_class_and_may_be_changed_without_loading(folder: Path) -> None:
    image = generate(3, 1, 64).images[0]
    plain = labeller(folder)
    (free,) = plain.label([image], [(64, 64)])
    common = int(np.bincount(free.labels.ravel()).argmax())
    limits = [0.0] * COUNT
    limits[common] = float(np.median(free.confidence[free.labels == common])) / 255
    for strict in (
        plain.with_thresholds(limits),
        labeller(folder, thresholds=tuple(limits), ignore_index=200),
    ):
        (limited,) = strict.label([image], [(64, 64)])
        ignored = limited.labels != free.labels
        assert 0 < ignored.sum() < (free.labels == common).sum()
        assert set(free.labels[ignored]) == {common}
        assert set(limited.labels[ignored]) <= {200, 255}
        assert (free.confidence[ignored] <= 255 * limits[common] + 0.5).all()
        assert (limited.confidence == free.confidence).all()  # confidence is before any threshold
    (again,) = plain.label([image], [(64, 64)])
    assert (again.labels == free.labels).all()


def test_other_class_names_need_no_training(folder: Path) -> None:
    other = parse_classes("zebra, sky, grass", background=None, templates="toyworld")
    text, _ = toy_text(other)
    image = generate(3, 1, 64).images[0]
    (prediction,) = labeller(folder, text=text, num_classes=3).label([image], [(64, 64)])
    changing = labeller(folder)
    (own,) = changing.label([image], [(64, 64)])
    changing.set_text(text)
    np.testing.assert_array_equal(changing.label([image], [(64, 64)])[0].labels, prediction.labels)
    changing.set_text(None)
    np.testing.assert_array_equal(changing.label([image], [(64, 64)])[0].labels, own.labels)
    # The same features: the best of three of the student's own classes.
    names = load_ontology("toyworld").names
    among = expected(folder, image, (64, 64))[[names.index(name) for name in other.names]].argmax(0).numpy()
    assert (prediction.labels == among).mean() > 0.999 and len(np.unique(among)) > 1


def test_a_student_replaced_since_is_refused(folder: Path) -> None:
    labeller(folder, fingerprint=read_student_record(folder).fingerprint)
    with pytest.raises(MaskMillError) as caught:
        labeller(folder, fingerprint="0" * 64)
    assert caught.value.code == "weights_do_not_fit"
