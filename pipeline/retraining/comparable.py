"""Whether measurements of two models can be compared: what is wrong with one, and where two differ.

C classes, K classes of the labels that a model was trained on.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.retraining.decision import Reason, reason_about
from pipeline.retraining.measured import Measured


def soundness(one: Measured) -> Reason:
    """Whether a measurement can be used; nothing is computed from one that cannot."""
    faults = _faults(one)
    found = f"unusable: {'; '.join(faults)}." if faults else "sound."
    text = f"What was measured of {one.name} is {found}"
    return reason_about(one, "measurement", not faults, text, images=len(one.images))


def _faults(one: Measured) -> list[str]:
    """What is wrong with a measurement, in words."""
    shape = len(one.images), len(one.classes)
    counts = {"truth": one.truth, "predicted": one.predicted, "correct": one.correct}
    faults = [
        f"the counts of {name} are {np.asarray(part).dtype} {np.shape(part)}, not integers {shape}"
        for name, part in counts.items()
        if np.shape(part) != shape or np.asarray(part).dtype.kind not in "iu"
    ]
    faults += [
        f"there is no {what}"
        for what, held in (
            ("image", one.images),
            ("class", one.classes),
            ("digest of the evaluation set", one.evaluation_set),
            ("digest of the protocol", one.protocol),
        )
        if not held
    ]
    if len(set(one.images)) < len(one.images):
        faults.append("an image is there twice")
    if not faults:
        if min(int(part.min()) for part in counts.values()) < 0:
            faults.append("a count is negative")
        elif (one.correct > np.minimum(one.truth, one.predicted)).any():
            faults.append("more pixels are correct than there are")
        elif (one.predicted.sum(axis=1) > one.truth.sum(axis=1)).any():
            faults.append("more pixels are predicted than have a truth")
        elif not one.truth.any():
            faults.append("no pixel has a truth, so mean IoU is undefined")
    if one.seconds_per_image is not None and not 0 <= one.seconds_per_image < np.inf:
        faults.append(f"{one.seconds_per_image} seconds per image")
    if one.model_bytes is not None and one.model_bytes < 0:
        faults.append(f"a size of {one.model_bytes} bytes")
    return faults + histogram_faults(one)


def histogram_faults(one: Measured) -> list[str]:
    """What is wrong with the histogram of the labels that a model was trained on; it may be unknown."""
    if one.label_histogram is None:
        return []
    histogram = np.asarray(one.label_histogram, np.float64)
    if one.label_classes is None or histogram.shape != (len(one.label_classes),):
        return ["the histogram of its labels does not fit their classes"]
    if not np.isfinite(histogram).all() or (histogram < 0).any():
        return ["the histogram of its labels has negative or undefined shares"]
    return []


def comparability(candidate: Measured, champion: Measured) -> list[Reason]:
    """Whether both were measured on the same images with the same truth, in the same way."""
    both = f"{candidate.name} and {champion.name}"
    same_set = candidate.evaluation_set == champion.evaluation_set
    on_set = (
        f"{both} were measured on the same evaluation set, {candidate.evaluation_set[:12]}."
        if same_set
        else f"{candidate.name} was measured on another evaluation set ({candidate.evaluation_set[:12]}) "
        f"than {champion.name} ({champion.evaluation_set[:12]})."
    )
    differing = [
        what
        for what, same in (
            ("the classes differ", candidate.classes == champion.classes),
            ("one was measured against truth", candidate.has_truth == champion.has_truth),
            ("protocol, view or settings differ", candidate.protocol == champion.protocol),
        )
        if not same
    ]
    in_way = (
        f"{both} were not measured in the same way: {'; '.join(differing)}."
        if differing
        else f"{both} were measured in the same way."
    )
    only = sorted(set(candidate.images) ^ set(champion.images))
    other_truth = (
        not only
        and not differing
        and not np.array_equal(sorted_by_name(candidate).truth, sorted_by_name(champion).truth)
    )
    text = f"Both were measured on the same {len(candidate.images):,} images."
    if only:
        named = ", ".join(only[:5]) + (", …" if len(only) > 5 else "")
        text = f"{len(only):,} images were measured with one of the two models only: {named}."
    elif other_truth:
        text = "The images have other true pixels for one model than for the other."
    same_images = not (only or other_truth)
    return [
        reason_about(candidate, "evaluation_set", same_set, on_set),
        reason_about(candidate, "protocol", not differing, in_way),
        reason_about(candidate, "images", same_images, text, differing=len(only)),
    ]


def sorted_by_name(one: Measured) -> Measured:
    """With its images in the order of their names, on which the resamples depend."""
    order = sorted(range(len(one.images)), key=one.images.__getitem__)
    return replace(
        one,
        images=tuple(one.images[at] for at in order),
        truth=one.truth[order],
        predicted=one.predicted[order],
        correct=one.correct[order],
    )
