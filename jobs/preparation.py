"""What a labelling run needs before its first image: weights found, class names embedded.

A generator, for a process of its own (``jobs.apart``): all that it yields is told without torch, so that the
driver, which only waits, need never import it.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.apart import POSSIBLE, Apart
from models.errors import WrongUse
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import LabelRecipe
from pipeline.ontology.ontology import Ontology


@dataclass(frozen=True)
class Request:
    """What is to be prepared.

    Attributes:
        recipe: how images are labelled.
        ontology: the classes.
        output: the table, for messages.
        precision: of the run; "auto" is decided for this machine.
        fingerprint: of the weights that the table was made with so far; None for a new table.
    """

    recipe: LabelRecipe
    ontology: Ontology
    output: str
    precision: str
    fingerprint: str | None


@dataclass(frozen=True)
class Settled:
    """Weights and settings are known to be good; of the prompts only their length is not.

    Attributes:
        labeller: pickle of what builds the Labeller; takes ``threads``, and ``words`` if they are to come.
        words_to_come: whether ``prepare`` yields once more: a pickle of the words, which takes seconds.
        weights: see ``pipeline.labelling.prepare.PreparedLabeller``.
        precision: of the run, never "auto".
    """

    labeller: bytes
    words_to_come: bool
    weights: dict[str, Any]
    precision: str


def prepare(request: Request) -> Iterator[Settled | bytes]:
    """Find the weights, and embed the class names.

    Yields:
        What is settled, and then the words if they are to come.

    Raises:
        MaskMillError: see ``pipeline.labelling.prepare.prepare_labeller``; ``output_differs`` for other
        weights than
            the table's.
    """

    def same_weights(fingerprint: str) -> None:
        if request.fingerprint not in (None, fingerprint):
            raise WrongUse(
                "output_differs",
                f"{request.output} was labelled with other weights of {request.recipe.model} "
                f"({request.fingerprint[:12]}, now {fingerprint[:12]}).",
                "Give the same weights, or name another --output.",
            )

    prepared = prepare_labeller(
        request.recipe, request.ontology, precision=request.precision, check_weights=same_weights
    )
    yield Settled(pickle.dumps(prepared.build), False, prepared.weights, prepared.precision)


@contextlib.contextmanager
def preparing(request: Request, environment: Mapping[str, str]) -> Iterator[Iterator[Settled | bytes]]:
    """``prepare``, from now on in a process of its own that ends with this context.

    Where torch is imported already, that would import it again for nothing: the work is done in the thread
    that asks for it then, at the priority of this process.

    Args:
        request: what is to be prepared.
        environment: of the process, beside this one's.
    """
    if "torch" in sys.modules or not POSSIBLE:
        yield prepare(request)
    else:
        with Apart(prepare, request, environment=environment) as apart:
            yield iter(apart)
