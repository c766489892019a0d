"""What the steps of a tick share: configuration, output, registry, and what earlier steps have made."""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from models.errors import FailedWork
from pipeline.datasets.base import Dataset
from pipeline.datasets.pairs import open_pairs
from pipeline.files.storage import Storage
from pipeline.ontology.ontology import Ontology
from pipeline.retraining import registry
from pipeline.retraining.config import Model, Retraining, load_classes, tracking_uri
from pipeline.retraining.corrections import FROZEN
from pipeline.retraining.decision import Decision, read_decision
from pipeline.retraining.intake import Intake
from pipeline.retraining.labels import LabelSummary, read_labels
from pipeline.retraining.ledger import Ledger
from pipeline.retraining.parent import PARENT_TAG, tick_tags
from pipeline.retraining.record import RetrainingRecord
from pipeline.retraining.registry import CHAMPION, Version
from pipeline.retraining.state import Runner, read_ticks, tick_folder
from pipeline.retraining.webhook import tell_webhook
from pipeline.table.lease import Lease

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

STEPS_OF_MODEL = ("train", "evaluate", "gate", "register", "promote")
HELD_TRUTH = "heldout-truth"
"""In the output: the images that are held out, with the teacher's labels as masks."""


def digest(value: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def step_names(config: Retraining) -> list[str]:
    """Names of the steps of a tick, in order."""
    of_models = [f"{kind} {model.folder}" for model in config.models for kind in STEPS_OF_MODEL]
    return ["intake", "label", "verify", *of_models, "report"]


@dataclass
class Work:
    """What the steps of a tick share.

    Attributes:
        config: the configuration.
        dataset: the images with truth; None if images are held out instead.
        record: of the output.
        storage: the output.
        lease: of the output.
        runner: of the tick.
        console: for what the jobs say.
        say: for what the user must know now.
        intake: what this tick takes in, if it is decided already.
        file: the configuration's, for commands that are shown; None if it has none.
        verbose: show Ray's own messages.
    """

    config: Retraining
    dataset: Dataset | None
    record: RetrainingRecord
    storage: Storage
    lease: Lease
    runner: Runner
    console: Console
    say: Callable[[str], None]
    intake: Callable[[], Intake]
    file: str | None = None
    verbose: bool = False
    _client: MlflowClient | None = field(default=None, init=False)

    @property
    def run(self) -> str:
        """Number of the tick."""
        return self.runner.tick.run

    def here(self, name: str) -> str:
        """Name of a file of the tick, in the output."""
        return f"{tick_folder(self.run)}/{name}"

    @property
    def client(self) -> MlflowClient:
        """MLflow; importing it takes seconds."""
        if self._client is None:
            self._client = registry.connect_registry(self.record, tracking_uri(self.config), create=True)
        return self._client

    @functools.cached_property
    def ledger(self) -> Ledger:
        """The ledger."""
        return Ledger(self.storage)

    @functools.cached_property
    def classes(self) -> Ontology:
        """What is labelled."""
        return load_classes(self.config)

    def tags(self, **more: str) -> dict[str, str]:
        """Tags of a job's run in MLflow."""
        parent = self.runner.tick.mlflow_run
        named = {f"{registry.PREFIX}{name}": value for name, value in more.items()}
        return tick_tags(self.config.name, self.run) | named | ({PARENT_TAG: parent} if parent else {})


def champion(work: Work, model: Model) -> Version | None:
    """The champion of a model, by registry and ledger.

    Raises:
        MaskMillError: ``champion_changed`` if the two do not agree; ``tracking_unreachable``.
    """
    name = work.config.registered(model)
    found = registry.alias(work.client, name, CHAMPION)
    standing = work.ledger.standing(name)
    known = {standing.champion, standing.unfinished.version if standing.unfinished else standing.champion}
    if found not in known:
        raise FailedWork(
            "champion_changed",
            f"By the ledger of {work.storage.uri}, version {standing.champion} of {name} is champion; by "
            f"MLflow's registry, {f'version {found}' if found else 'none'} is.",
            "Check that tracking names the same MLflow as before. If the alias was moved by hand, say so: "
            f"maskmill promote {shlex.quote(work.storage.uri)} --version N --force --why TEXT.",
        )
    return None if found is None else registry.read_version(work.client, name, found)


def measured_on(work: Work) -> Dataset:
    """The images with truth, or those that are held out with the teacher's labels."""
    if work.dataset is not None:
        return work.dataset
    place = work.storage.uri_of(HELD_TRUTH)
    return open_pairs(
        images=f"{place}/images", masks=f"{place}/masks", ontology=work.classes, has_truth=False
    )


def corrections_of(work: Work) -> str | None:
    """Where the corrections are that this tick believes; None without any."""
    return work.storage.uri_of(work.here(FROZEN)) if work.runner.outputs("label").get("corrections") else None


def labels_before(work: Work) -> LabelSummary | None:
    """What the labels of the last tick with an outcome were; None in the first tick."""
    for tick in reversed(list(read_ticks(work.storage))):
        if tick.run != work.run and tick.outcome in ("promoted", "refused"):
            return read_labels(work.storage.child(tick_folder(tick.run)))
    return None


def decision_of(work: Work, model: Model) -> Decision:
    """The verdict on a model's candidate."""
    found = read_decision(work.storage, work.here(f"{model.folder}-verdict.json"))
    assert found is not None, "the gate has written it"
    return found


def tell(work: Work, event: str, **facts: Any) -> None:
    """Tell the webhook, if there is one; a failure to do so is a warning."""
    warning = tell_webhook(
        work.config.webhook_env,
        {
            "event": event,
            "retraining": work.config.name,
            "tick": work.run,
            "output": work.storage.uri,
            **facts,
        },
    )
    if warning:
        work.say(warning)
