from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES
from pipeline.ontology.ontology import load_ontology
from pipeline.toyworld.scenes import generate


def test_several_threads_may_label_at_a_time() -> None:
    prepared = prepare_labeller(RECIPES["toy"], load_ontology("toyworld"), precision="fp32")
    labeller = prepared.build(precision="fp32", threads=1)
    # More sizes than position tables are kept, so that threads throw out each other's.
    images = [generate(3, 1, 16 * side).images[0] for side in range(2, 22) for _ in range(2)]

    def label(image: np.ndarray) -> tuple[np.ndarray, int]:
        return labeller.label([image], [image.shape[:2]])[0].labels, torch.get_num_threads()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(label, images))
    assert {threads for _, threads in together} == {1}
    assert all((label(image)[0] == labels).all() for image, (labels, _) in zip(images, together, strict=True))
