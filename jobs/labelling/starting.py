"""How a labelling run starts: Ray, and beside it the weights and the embedded class names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from jobs.console import LabelDisplay
from jobs.labelling.options import LabelOptions
from jobs.labelling.recorded import refuse_other_weights, refuse_others_beside
from pipeline.cluster.disks import Landmarks, require_shared
from pipeline.cluster.session import joins_cluster, ray_session, worker_precision
from pipeline.cluster.signals import signals_held
from pipeline.corpus.corpus import Corpus
from pipeline.files.status import StatusFile
from pipeline.labelling.recipes import LabelRecipe, table_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.table.record import TableRecord

if TYPE_CHECKING:
    from pipeline.cluster.resources import Compute
    from pipeline.labelling.labeller import PreparedLabeller


@contextlib.contextmanager
def started(
    recipe: LabelRecipe,
    ontology: Ontology,
    options: LabelOptions,
    recorded: TableRecord | None,
    run_id: str,
    display: LabelDisplay,
    status: StatusFile,
) -> Iterator[tuple[PreparedLabeller, Compute]]:
    """Start Ray while a thread embeds the class names. Missing weights fail before anything starts.

    Args:
        recipe: of the run.
        ontology: the classes.
        options: where it runs.
        recorded: the table that it adds to; None for a new one.
        run_id: names the Ray session.
        display: is told the stages.
        status: begins once the weights are found.

    Raises:
        MaskMillError: as ``pipeline.labelling.prepare.prepare_labeller`` and
            ``pipeline.cluster.session.ray_session``; ``output_differs`` if the weights are not those of the
            table.
    """
    precision = table_recipe(recorded).precision if recorded else recipe.precision
    # On a cluster, "auto" depends on the machines that do the work.
    asks_cluster = precision == "auto" and joins_cluster(options.address)
    with contextlib.ExitStack() as stack:
        thread = ThreadPoolExecutor(1, "embedding")
        stack.callback(thread.shutdown, wait=False)  # do not wait for it after Ctrl-C
        preparing: Future[PreparedLabeller] | None = None

        def prepare(precision: str) -> Future[PreparedLabeller]:
            return _begin_preparing(thread, recipe, ontology, precision, recorded, options.output)

        def begin() -> None:
            nonlocal preparing
            display.stage("reading weights")
            if not asks_cluster:
                preparing = prepare(precision)
            display.stage("embedding class names, starting Ray")
            status.begin()

        if not options.verbose:
            # Ray prints there that a process died; the run continues, or ends with words of its own.
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        compute = stack.enter_context(
            ray_session(
                run_id, address=options.address, verbose=options.verbose, notice=display.say, begin=begin
            )
        )
        if preparing is None:
            preparing = prepare(worker_precision(compute))
        prepared = preparing.result()
        refuse_others_beside(recorded, prepared, output=options.output)
        require_shared(
            Landmarks.copies(prepared.files),
            "The weights of the model are",
            "Put the model into an object store, or a copy of it on each node in the same place.",
        )
        yield prepared, compute


def _begin_preparing(
    thread: ThreadPoolExecutor,
    recipe: LabelRecipe,
    ontology: Ontology,
    precision: str,
    recorded: TableRecord | None,
    output: str,
) -> Future[PreparedLabeller]:
    """Start a thread that finds the weights and embeds the class names; return once the weights are found.

    Raises:
        MaskMillError: as ``pipeline.labelling.prepare.prepare_labeller`` up to finding the weights;
            ``output_differs`` if they are not those of the table. The future raises later errors.
    """
    known: Future[None] = Future()

    def check(fingerprint: str) -> None:
        refuse_other_weights(recorded, fingerprint, model=recipe.model, output=output)
        known.set_result(None)

    def prepare() -> PreparedLabeller:
        from pipeline.labelling.prepare import prepare_labeller

        asked = recipe
        if recipe.maskclip.classes.uncalibrated:
            from pipeline.labelling.calibrating import plain_scores

            asked = plain_scores(recipe)
        return prepare_labeller(asked, ontology, precision=precision, check_weights=check)

    preparing = thread.submit(prepare)
    first: list[Future[Any]] = [known, preparing]
    wait(first, return_when=FIRST_COMPLETED)
    if preparing.done():
        preparing.result()
    return preparing


def calibrated(
    recipe: LabelRecipe,
    ontology: Ontology,
    corpus: Corpus,
    plain: PreparedLabeller,
    compute: Compute,
    display: LabelDisplay,
) -> tuple[LabelRecipe, PreparedLabeller]:
    """Measure the classes' scores on a sample of the corpus; the recipe and the Labeller with what was found.

    Args:
        recipe: of the run.
        ontology: the classes.
        corpus: all images of the run.
        plain: the Labeller without calibration, from ``started``.
        compute: how many images to label at a time.
        display: is told what was found.
    """
    with signals_held():
        from pipeline.labelling.calibrating import calibrated as with_scores
        from pipeline.labelling.calibrating import count_corpus
        from pipeline.labelling.prepare import prepare_labeller
    workers = max(1, compute.actors * compute.calls)
    counted = count_corpus(recipe, corpus, plain, workers=workers, notice=display.say)
    recipe = with_scores(recipe, counted)
    return recipe, prepare_labeller(recipe, ontology, precision=plain.precision)
