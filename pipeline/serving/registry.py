"""The interface of all models that the page serves, and a registry that loads them on first use.

Imports no torch: the name and capabilities of a model are known before it is loaded.

Shapes: H W pixels of the masks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.errors import MaskMillError, WrongUse
from pipeline.labelling.clipseg.pictures import Picture

log = logging.getLogger("maskmill.serve")

State = Literal["idle", "loading", "ready", "failed"]


@dataclass(frozen=True)
class TextPrompt:
    """Words for what to find."""

    text: str


@dataclass(frozen=True)
class ImagePrompt:
    """An example of what to find.

    Attributes:
        name: what to call it in the legend.
        picture: the example.
    """

    name: str
    picture: Picture


Prompt = TextPrompt | ImagePrompt


@dataclass(frozen=True)
class LabelAnswer:
    """One class per pixel: the classes compete.

    Attributes:
        names: by class id; the prompts come first, in order.
        labels: uint8 or uint16 (H, W) ids.
        confidence: uint8 (H, W), round(255 p) of the chosen class.
        other: id of "none of them", or None.
        colors: "#rrggbb" by id, if the model's own classes have colours.
    """

    names: tuple[str, ...]
    labels: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: NDArray[np.uint8]
    other: int | None = None
    colors: tuple[str, ...] | None = None


@dataclass(frozen=True)
class HeatAnswer:
    """One probability map per prompt: prompts are independent, and any may be absent from the image.

    Attributes:
        names: of the prompts, in order.
        heat: uint8 (P, H, W), round(255 p).
    """

    names: tuple[str, ...]
    heat: NDArray[np.uint8]


Answer = LabelAnswer | HeatAnswer


@dataclass(frozen=True)
class ModelInfo:
    """Description of a model and its inputs.

    Attributes:
        name: name on the page.
        kind: ``teacher`` (training-free MaskCLIP), ``student`` or ``clipseg``.
        title: one-line description.
        notice: caveat, or empty.
        text, image: the kinds of prompt that it accepts.
        vocabulary: its own classes, used without a prompt; empty if it needs prompts.
        suggestions: words to try.
        context: words that prompts compete with, unless the request sets others; empty if prompts do not
            compete.
        threshold: initial threshold on the page.
    """

    name: str
    kind: Literal["teacher", "student", "clipseg"]
    title: str
    notice: str = ""
    text: bool = True
    image: bool = False
    vocabulary: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    threshold: float = 0.0


class ServedModel(Protocol):
    """A loaded model; calls never overlap."""

    def predict(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        context: Sequence[str],
        size: tuple[int, int],
    ) -> Answer:
        """Find the prompts.

        Args:
            image: uint8 (h, w, 3) RGB.
            prompts: of kinds that the model accepts; may be empty for a model with a vocabulary.
            context: words that the prompts compete with; ignored if prompts do not compete.
            size: (H, W) of the maps to return.

        Raises:
            MaskMillError: for unusable prompts (``prompt_invalid``).
        """
        ...


@dataclass(frozen=True)
class Entry:
    """A model and how to load it."""

    info: ModelInfo
    load: Callable[[], ServedModel]


class ModelRegistry:
    """Models by name, each loaded in its own thread on first use.

    Args:
        entries: at least one, with different names; the first is the default.

    Raises:
        MaskMillError: ``wrong_use``, ``name_unknown``.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = {entry.info.name: entry for entry in entries}
        if len(self._entries) != len(entries):
            names = [entry.info.name for entry in entries]
            twice = next(name for name in names if names.count(name) > 1)
            raise WrongUse(
                "wrong_use",
                f"Two models are called {twice!r}.",
                "Write --model NAME=SPEC.",
            )
        if not entries:
            raise WrongUse("name_unknown", "There is no model to serve.", "Name one with --model.")
        self._loading: dict[str, Future[ServedModel]] = {}
        self._lock = threading.Lock()

    def infos(self) -> list[ModelInfo]:
        """All models, the default first."""
        return [entry.info for entry in self._entries.values()]

    def info(self, name: str) -> ModelInfo:
        """One model.

        Raises:
            MaskMillError: ``name_unknown``.
        """
        if name not in self._entries:
            raise WrongUse(
                "name_unknown",
                f"There is no model {name[:100]!r} here.",
                f"Use one of {', '.join(self._entries)}.",
            )
        return self._entries[name].info

    def state(self, name: str) -> tuple[State, BaseException | None]:
        """The state of a model, and the error if loading failed."""
        with self._lock:
            future = self._loading.get(name)
        if future is None:
            return "idle", None
        if not future.done():
            return "loading", None
        error = future.exception()
        return ("ready", None) if error is None else ("failed", error)

    def load(self, name: str) -> Future[ServedModel]:
        """Start loading a model unless it is loading or loaded; retries a failed load.

        Raises:
            MaskMillError: ``name_unknown``.
        """
        self.info(name)
        with self._lock:
            future = self._loading.get(name)
            if future is not None and not (future.done() and future.exception()):
                return future
            fresh = self._loading[name] = Future()
        entry = self._entries[name]

        def work() -> None:
            try:
                fresh.set_result(entry.load())
            except BaseException as error:  # must reach the waiting requests
                known = isinstance(error, MaskMillError)
                log.error("The model %s could not be loaded: %s", name, error, exc_info=not known)
                fresh.set_exception(error)

        # A daemon thread, so that a stuck download does not block the server's exit.
        threading.Thread(target=work, name=f"load {name}", daemon=True).start()
        return fresh


def unclaimed(words: Sequence[str], prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """The context words that no prompt mentions: "red ladybug" removes "ladybug" and "ladybugs".

    Keeps the order and drops duplicates.
    """
    spoken = [f" {prompt.text.casefold()} " for prompt in prompts if isinstance(prompt, TextPrompt)]

    def said(word: str) -> bool:
        forms = {word, word.removesuffix("s"), f"{word}s"}
        return any(f" {form} " in text for form in forms for text in spoken)

    return tuple(word for word in dict.fromkeys(words) if not said(word.casefold()))
