"""The toy world: procedural scenes with a caption and a true label map, generated from a seed.

A scene has one or two *stuff* textures with up to three *things* on top. Every class has a distinct local
texture, as a dense model must tell classes apart by a patch.

Random numbers do not depend on the size, so scene ``i`` of a seed is the same picture at 64 and at 512
pixels, whatever else is generated.

Shapes: n scenes, s side in pixels. Images are uint8 RGB, label maps uint8 class ids.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.toyworld.captions import CLASSES, STUFF, THINGS, caption, pick_colour
from pipeline.toyworld.painting import STUFF_PAINTERS, THING_PAINTERS, Planes, axes, edge, noise

VISIBLE_SHARE = 0.008
"""Minimum share of the picture for a class to be named in the caption."""
_SHADOW = 0.22  # reach of the contact shadow, in object radii


class Scene(NamedTuple):
    """One scene.

    Attributes:
        image: uint8 (s, s, 3), RGB.
        labels: uint8 (s, s), indices into ``CLASSES``.
        caption: names some of what is visible, and nothing else.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    caption: str


class ToySet(NamedTuple):
    """Scenes of one size; see ``generate``.

    Attributes:
        images: uint8 (n, s, s, 3), RGB.
        labels: uint8 (n, s, s), indices into ``CLASSES``.
        captions: n strings.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    captions: list[str]


def generate(seed: int, count: int, size: int, *, start: int = 0) -> ToySet:
    """Generate scenes ``start`` to ``start + count - 1`` of a seed.

    Scene i does not depend on ``start`` or ``count``.

    Args:
        seed: 0 or more.
        count: number of scenes, 0 or more.
        size: side in pixels, at least 16.
        start: index of the first scene, 0 or more.

    Raises:
        ValueError: if a number is out of range.
    """
    if seed < 0 or count < 0 or start < 0:
        raise ValueError(f"seed, count and start must not be negative: {seed}, {count}, {start}")
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty((count, size, size), np.uint8)
    captions = []
    for row in range(count):
        made = scene(seed, start + row, size)
        images[row], labels[row] = made.image, made.labels
        captions.append(made.caption)
    return ToySet(images, labels, captions)


def scene(seed: int, index: int, size: int) -> Scene:
    """Draw scene ``index`` of a seed at ``size`` x ``size`` pixels.

    Raises:
        ValueError: if ``size`` is below 16, or ``seed`` or ``index`` is negative.
    """
    if size < 16:
        raise ValueError(f"a scene needs at least 16 pixels a side, not {size}")
    rng = np.random.default_rng((seed, index))
    zoom = float(np.exp(rng.uniform(np.log(0.75), np.log(1.5))))
    colour_of: dict[str, str] = {}

    canvas, labels = _ground(rng, size, zoom, colour_of)
    _place_things(rng, canvas, labels, zoom, colour_of)

    light = float(np.exp(rng.normal(0.0, 0.09)))
    canvas *= light
    canvas += noise(rng, size, 48) * 0.03 - 0.015  # film grain
    image = np.empty((size, size, 3), np.uint8)
    np.clip(canvas, 0.0, 1.0, out=canvas)
    canvas *= 255.0
    canvas += 0.5
    image[...] = canvas.transpose(1, 2, 0)

    area = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    visible = [name for name, share in zip(CLASSES, area, strict=True) if share >= VISIBLE_SHARE]
    return Scene(image, labels, caption(rng, visible, colour_of, light))


def _ground(
    rng: np.random.Generator, size: int, zoom: float, colour_of: dict[str, str]
) -> tuple[Planes, NDArray[np.uint8]]:
    """Paint one texture, or two separated by a wavy line, with sky always on top."""
    count = 2 if rng.random() < 0.65 else 1
    chosen = [STUFF[i] for i in rng.permutation(len(STUFF))[:count]]
    if chosen[-1] == "sky":
        chosen.reverse()
    painted = []
    for name in chosen:
        colour_of[name] = pick_colour(rng, name)
        painted.append(STUFF_PAINTERS[name](rng, size, zoom, colour_of[name]))
    canvas = painted[0]
    labels = np.full((size, size), CLASSES.index(chosen[0]), np.uint8)
    if count == 2:
        y, x = axes(size)
        tilt = rng.normal(0.0, 0.12) if chosen[0] == "sky" else rng.uniform(0.0, 2 * np.pi)
        ahead = (y - 0.5) * np.float32(np.cos(tilt)) + (x - 0.5) * np.float32(np.sin(tilt))
        waves = 0.02 * np.sin(
            (x * np.float32(np.cos(tilt)) - y * np.float32(np.sin(tilt))) * 14.0 + rng.uniform(0, 6)
        )
        distance = np.float32(rng.uniform(-0.2, 0.2)) + waves - ahead
        canvas += edge(distance, 1.5 / size) * (painted[1] - canvas)
        labels[distance < 0] = CLASSES.index(chosen[1])
    return canvas, labels


#: Maximum lean of things in radians; all others rotate freely.
_LEAN = {"zebra": 0.25, "cloud": 0.2, "fish": 0.6}


def _place_things(
    rng: np.random.Generator,
    canvas: Planes,
    labels: NDArray[np.uint8],
    zoom: float,
    colour_of: dict[str, str],
) -> None:
    """Draw 0 to 3 different things onto canvas (3, s, s) and labels (s, s), in place."""
    count = int(rng.choice(4, p=(0.08, 0.27, 0.37, 0.28)))
    taken: list[tuple[float, float, float]] = []
    for choice in rng.permutation(len(THINGS))[:count]:
        name = THINGS[choice]
        colour_of[name] = pick_colour(rng, name)
        radius = float(rng.uniform(0.15, 0.22)) * zoom**0.8
        x = y = 0.5
        for _ in range(8):
            x, y = (float(p) for p in rng.uniform(0.13, 0.87, 2))
            if all(np.hypot(x - a, y - b) > 0.8 * (radius + other) for a, b, other in taken):
                break
        taken.append((x, y, radius))
        lean = _LEAN.get(name, np.pi)
        _draw(rng, canvas, labels, name, colour_of[name], (x, y), radius, float(rng.uniform(-lean, lean)))


def _draw(
    rng: np.random.Generator,
    canvas: Planes,
    labels: NDArray[np.uint8],
    name: str,
    colour: str,
    centre: tuple[float, float],
    radius: float,
    angle: float,
) -> None:
    size = labels.shape[0]
    reach = radius * (1.12 + _SHADOW)
    left, top = (max(0, int((c - reach) * size)) for c in centre)
    right, bottom = (min(size, int((c + reach) * size) + 1) for c in centre)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    y, x = axes(size)
    dy, dx = (y[top:bottom] - centre[1]) / radius, (x[:, left:right] - centre[0]) / radius
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = np.asarray((dx * cos + dy * sin) * np.float32(flip), np.float32)
    v = np.asarray(dy * cos - dx * sin, np.float32)
    pixel = 1.0 / (radius * size)
    distance, planes = THING_PAINTERS[name](rng, u, v, pixel, colour)

    box = canvas[:, top:bottom, left:right]
    shade = np.clip(1.0 - distance / _SHADOW, 0.0, 1.0)
    box *= 1.0 - 0.38 * shade * shade
    box += edge(distance, pixel) * (planes - box)
    labels[top:bottom, left:right][distance < 0] = CLASSES.index(name)
