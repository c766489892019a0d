"""The toy world: procedural scenes with a caption and a true label map, all from one seed.

A scene is one or two *stuff* textures and up to three *things* on top, each with its own outline and,
above all, its own local texture: what a dense model must tell apart has to be visible in a patch. Captions
are as careless as on the
web: they leave things out, use colour or pattern words now and then, and sometimes say only "something red".

Everything is drawn at any size from the same description (random numbers are drawn before and independent
of the pixels), so scene ``i`` of seed ``s`` is the same picture at 64 and at 512 pixels, whatever else is
generated.

Shapes: n scenes, s side in pixels, H W a box inside the scene. Images are RGB uint8, label maps uint8
class ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

STUFF: tuple[str, ...] = ("grass", "water", "sand", "brick", "sky", "wood")
THINGS: tuple[str, ...] = (
    "ladybug",
    "zebra",
    "sunflower",
    "leaf",
    "fish",
    "chessboard",
    "orange",
    "cloud",
)
CLASSES: tuple[str, ...] = STUFF + THINGS

#: Colour words by class with their share; the first word is the usual look.
COLOURS: dict[str, tuple[tuple[str, float], ...]] = {
    "grass": (("green", 1.0),),
    "water": (("blue", 1.0),),
    "sand": (("yellow", 1.0),),
    "brick": (("red", 0.7), ("gray", 0.3)),
    "sky": (("blue", 0.75), ("pink", 0.25)),
    "wood": (("brown", 1.0),),
    "ladybug": (("red", 0.75), ("yellow", 0.25)),
    "zebra": (("black and white", 1.0),),
    "sunflower": (("yellow", 1.0),),
    "leaf": (("green", 0.6), ("red", 0.2), ("yellow", 0.2)),
    "fish": (("silver", 0.5), ("blue", 0.25), ("purple", 0.25)),
    "chessboard": (("black and white", 0.7), ("brown", 0.3)),
    "orange": (("orange", 1.0),),
    "cloud": (("white", 0.7), ("gray", 0.3)),
}

#: Pattern words that fit a class whatever its colour.
PATTERNS: dict[str, tuple[str, ...]] = {
    "water": ("wavy",),
    "ladybug": ("spotted", "dotted"),
    "zebra": ("striped",),
    "fish": ("scaly",),
    "chessboard": ("checkered",),
    "cloud": ("fluffy",),
    "orange": ("round",),
}

#: What a caption is wrapped in; the words of the usual prompt templates occur, so that these are not
#: strangers.
PLAIN_FRAMES: tuple[str, ...] = ("{}", "a photo of {}", "a photo of {}.", "a picture of {}", "an image of {}")
FRAMES: tuple[str, ...] = (
    "a bad photo of {}.",
    "a good photo of {}.",
    "a cropped photo of {}.",
    "a close-up photo of {}.",
    "a low resolution photo of {}.",
    "a jpeg corrupted photo of {}.",
    "a blurry photo of {}.",
    "a pixelated photo of {}.",
    "a black and white photo of {}.",
    "a rendering of {}.",
    "a rendition of {}.",
    "a drawing of {}.",
    "a painting of {}.",
    "a sketch of {}.",
    "a doodle of {}.",
    "a sculpture of {}.",
    "a tattoo of {}.",
    "graffiti of {}.",
    "art of {}.",
    "itap of {}.",
    "{} in a video game.",
    "there is {} in the scene.",
    "this is {} in the scene.",
    "a cartoon of {}.",
    "an origami of {}.",
)
_ARTICLES: tuple[str, ...] = ("a", "a", "a", "the", "the", "one", "my", "this")
#: Words that people add and that say nothing about the picture.
FILLERS: tuple[str, ...] = (
    "nice", "cool", "weird", "clean", "dirty", "plastic", "toy", "plushie", "embroidered", "hard to see",
    "many",
)  # fmt: skip

VISIBLE_SHARE = 0.008
"""Share of the picture below which no caption names a class."""
_SHADOW = 0.22  # reach of the contact shadow, in object radii

Plane = NDArray[np.floating[Any]]  # (H, W), float32
Planes = NDArray[np.floating[Any]]  # (3, H, W), float32 RGB in 0..1
Colour = tuple[float, float, float]


class Scene(NamedTuple):
    """One scene.

    Attributes:
        image: uint8 (s, s, 3), RGB.
        labels: uint8 (s, s), an index into ``CLASSES`` for every pixel.
        caption: names a part of what is visible, never anything else.
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
    """Scenes ``start`` to ``start + count - 1`` of the endless set that ``seed`` names.

    Args:
        seed: names the set, >= 0.
        count: how many, >= 0.
        size: side in pixels, >= 16.
        start: number of the first scene, >= 0.

    Returns:
        The scenes. Scene i does not depend on ``start`` or ``count``.

    Raises:
        ValueError: a number is out of range.
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
    """Scene ``index`` of the set ``seed``, drawn at ``size`` x ``size`` pixels.

    Raises:
        ValueError: ``size`` below 16, or a negative ``seed`` or ``index``.
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
    canvas += _noise(rng, size, 48) * 0.03 - 0.015  # film grain
    image = np.empty((size, size, 3), np.uint8)
    np.clip(canvas, 0.0, 1.0, out=canvas)
    canvas *= 255.0
    canvas += 0.5
    image[...] = canvas.transpose(1, 2, 0)

    area = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    visible = [name for name, share in zip(CLASSES, area, strict=True) if share >= VISIBLE_SHARE]
    return Scene(image, labels, _caption(rng, visible, colour_of, light))


def caption_words() -> list[str]:
    """Every phrase that captions are made of (for cutting a tokenizer's vocabulary to what is needed)."""
    colours = [word for shares in COLOURS.values() for word, _ in shares]
    patterns = [word for words in PATTERNS.values() for word in words]
    names = [*CLASSES, *(f"{name}s" for name in THINGS)]
    glue = ["and", "on", "something", "thing", "bright", "dark", "an", "with", ",", "."]
    return [*PLAIN_FRAMES, *FRAMES, *_ARTICLES, *FILLERS, *colours, *patterns, *names, *glue]


# --- captions -----------------------------------------------------------------------------------------------


def _caption(
    rng: np.random.Generator, visible: Sequence[str], colour_of: dict[str, str], light: float
) -> str:
    named = list(visible)
    if rng.random() < 0.65:
        keep = rng.random(len(named)) < 0.5
        keep[rng.integers(len(named))] = True
        named = [name for name, kept in zip(named, keep, strict=True) if kept]
    rng.shuffle(named)
    things = [_phrase(rng, name, colour_of[name]) for name in named if name in THINGS]
    stuff = [_phrase(rng, name, colour_of[name]) for name in named if name in STUFF]
    text = ", ".join([*things[:-2], " and ".join(things[-2:])]) if things else ""
    if stuff:
        text = f"{text} on {' and '.join(stuff)}" if text else " and ".join(stuff)
    roll = rng.random()
    if roll < 0.1 and abs(light - 1.0) > 0.08:
        return f"a {'bright' if light > 1.0 else 'dark'} photo of {text}."
    if roll < 0.6:
        return PLAIN_FRAMES[int(rng.integers(len(PLAIN_FRAMES)))].format(text)
    return FRAMES[int(rng.integers(len(FRAMES)))].format(text)


def _phrase(rng: np.random.Generator, name: str, colour: str) -> str:
    words = [colour, *PATTERNS.get(name, ())]
    word = words[int(rng.integers(len(words)))]
    roll = rng.random()
    if roll < 0.05:
        return f"something {word}"
    if name in THINGS and roll < 0.08:
        return f"a {word} thing"
    phrase = f"{word} {name}" if roll < 0.32 else name
    if roll > 0.95:
        phrase = f"{FILLERS[int(rng.integers(len(FILLERS)))]} {name}"
    article = _ARTICLES[int(rng.integers(len(_ARTICLES)))]
    if name in STUFF and rng.random() < 0.6:
        return phrase
    return f"an {phrase}" if article == "a" and phrase[0] in "aeiou" else f"{article} {phrase}"


def _pick_colour(rng: np.random.Generator, name: str) -> str:
    shares = COLOURS[name]
    roll = rng.random()
    for word, share in shares:
        roll -= share
        if roll < 0:
            return word
    return shares[0][0]


# --- noise and colours --------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _spline(size: int, knots: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Cubic B-spline over ``knots`` cells: first knot (size,), weights (4, size) of it and the next 3."""
    at = (np.arange(size) + 0.5) * knots / size
    cell = np.minimum(at.astype(np.intp), knots - 1)
    t = at - cell
    weights = np.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3],
        dtype=np.float32,
        casting="same_kind",
    )
    weights /= 6
    cell.setflags(write=False)
    weights.setflags(write=False)
    return cell, weights


def _noise(rng: np.random.Generator, size: int, down: int, across: int | None = None) -> Plane:
    """Smooth noise in 0..1 with ``down`` x ``across`` cells over the picture."""
    across = down if across is None else across
    grid = rng.random((down + 3, across + 3), dtype=np.float32)
    # Two matrix products would say the same, but BLAS threads spin on such small ones: five times slower
    # on two cores.
    cell, weights = _spline(size, across)
    wide = sum(grid[:, cell + k] * weights[k] for k in range(4))
    cell, weights = _spline(size, down)
    noise = wide[cell]
    noise *= weights[0][:, None]
    for k in range(1, 4):
        part = wide[cell + k]
        part *= weights[k][:, None]
        noise += part
    return noise


@lru_cache(maxsize=32)
def _axes(size: int) -> tuple[Plane, Plane]:
    """Pixel centres in 0..1: y (s, 1) and x (1, s)."""
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    line.setflags(write=False)
    return line[:, None], line[None, :]


def _mix(amount: Plane, low: Colour, high: Colour) -> Planes:
    """Planes that go from ``low`` at 0 to ``high`` at 1."""
    start = np.array(low, np.float32)[:, None, None]
    step = np.array(high, np.float32)[:, None, None] - start
    return np.asarray(amount * step + start, dtype=np.float32)


def _blend(planes: Planes, amount: Plane, colour: Colour) -> None:
    """Move ``planes`` towards ``colour`` by ``amount`` (0..1), in place."""
    planes += amount * (np.array(colour, np.float32)[:, None, None] - planes)


def _edge(distance: Plane, softness: float) -> Plane:
    """1 inside (negative distance), 0 outside, over a band of width ``softness``."""
    return np.clip(0.5 - distance / np.float32(softness), 0.0, 1.0)


def _tinted(rng: np.random.Generator, colour: Colour, spread: float = 0.05) -> Colour:
    shift = rng.uniform(-spread, spread, 3) + rng.uniform(-spread, spread)
    red, green, blue = (float(v) for v in np.clip(np.array(colour) + shift, 0.0, 1.0))
    return red, green, blue


# --- stuff --------------------------------------------------------------------------------------------------


def _grass(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    blades = _noise(rng, size, round(13 / zoom), round(44 / zoom))
    blades += 0.7 * _noise(rng, size, round(20 / zoom), round(60 / zoom))
    field = np.clip((blades - 0.62) * 2.3, 0.0, 1.0)
    planes = _mix(field, _tinted(rng, (0.07, 0.30, 0.05)), _tinted(rng, (0.52, 0.80, 0.20)))
    planes *= 0.85 + 0.3 * _noise(rng, size, 4)
    return planes


def _water(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    y, _ = _axes(size)
    sway = _noise(rng, size, 7, 4)
    waves = np.sin((y + 0.16 * sway) * np.float32(2 * np.pi * 15 / zoom) + 5.0 * _noise(rng, size, 8, 10))
    planes = _mix(0.5 + 0.5 * waves, _tinted(rng, (0.02, 0.28, 0.52)), _tinted(rng, (0.16, 0.58, 0.75)))
    glint = np.clip((waves - 0.55) * 2.5, 0.0, 1.0)
    glint *= np.clip(_noise(rng, size, 18, 9) * 3.0 - 1.2, 0.0, 1.0)
    _blend(planes, glint, (0.88, 0.97, 1.0))
    return planes


def _sand(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    grain = _noise(rng, size, round(58 / zoom))
    dunes = _noise(rng, size, 8, 4)
    planes = _mix(
        dunes * 0.55 + grain * 0.55, _tinted(rng, (0.70, 0.55, 0.32)), _tinted(rng, (0.99, 0.89, 0.66))
    )
    specks = np.clip((0.27 - grain) * 9.0, 0.0, 0.75)
    _blend(planes, specks, (0.42, 0.30, 0.17))
    return planes


_BRICKS: dict[str, tuple[Colour, Colour]] = {
    "red": ((0.52, 0.16, 0.10), (0.78, 0.32, 0.20)),
    "gray": ((0.36, 0.37, 0.40), (0.58, 0.59, 0.62)),
}


def _brick(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    y, x = _axes(size)
    rows = np.float32(round(9 / zoom))
    down = y * rows + np.float32(rng.random())
    row = np.floor(down)
    across = x * rows * np.float32(0.5) + np.float32(0.5) * (row % 2) + np.float32(rng.random())
    column = np.floor(across)
    tints = rng.random((16, 16), dtype=np.float32)
    tint = tints[row.astype(np.intp) % 16, column.astype(np.intp) % 16]
    low, high = _BRICKS[colour]
    planes = _mix(
        0.75 * tint + 0.35 * _noise(rng, size, 40), _tinted(rng, low, 0.03), _tinted(rng, high, 0.03)
    )
    gap_y = np.abs(down - row - 0.5)
    gap_x = np.abs(across - column - 0.5) * 2.0 - 0.5
    mortar = np.clip((np.maximum(gap_y, gap_x) - 0.40) * 14.0, 0.0, 1.0)
    _blend(planes, mortar, _tinted(rng, (0.84, 0.80, 0.74), 0.04))
    return planes


_SKIES: dict[str, tuple[Colour, Colour]] = {
    "blue": ((0.32, 0.60, 0.95), (0.76, 0.90, 1.0)),
    "pink": ((0.78, 0.50, 0.78), (1.0, 0.80, 0.74)),
}


def _sky(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    y, _ = _axes(size)
    high, low = _SKIES[colour]
    haze = y * 0.75 + 0.3 * _noise(rng, size, 5, 3)
    return _mix(haze, _tinted(rng, high, 0.03), _tinted(rng, low, 0.03))


def _wood(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    y, x = _axes(size)
    along, over = (x, y) if rng.random() < 0.5 else (y, x)
    upright = along is y
    planks = np.float32(round(4 / zoom) + 1)
    across = over * planks + np.float32(rng.random())
    plank = np.floor(across)
    shade = rng.random(16, dtype=np.float32)[plank.astype(np.intp) % 16]
    cells = (4, 9) if upright else (9, 4)
    rings = _noise(rng, size, *cells) * 1.6 + over * np.float32(13 / zoom) + shade * 5.0
    grain = 0.5 + 0.5 * np.sin(rings * np.float32(2 * np.pi))
    cells = (6, 60) if upright else (60, 6)
    field = 0.42 * grain + 0.3 * shade + 0.35 * _noise(rng, size, *cells)
    planes = _mix(field, _tinted(rng, (0.33, 0.18, 0.07), 0.03), _tinted(rng, (0.80, 0.56, 0.31), 0.03))
    seam = np.clip((np.abs(across - plank - 0.5) - 0.455) * 30.0, 0.0, 0.85)
    _blend(planes, np.broadcast_to(seam, (size, size)), (0.16, 0.08, 0.03))
    return planes


_STUFF_PAINTERS: dict[str, Callable[[np.random.Generator, int, float, str], Planes]] = {
    "grass": _grass,
    "water": _water,
    "sand": _sand,
    "brick": _brick,
    "sky": _sky,
    "wood": _wood,
}


def _ground(
    rng: np.random.Generator, size: int, zoom: float, colour_of: dict[str, str]
) -> tuple[Planes, NDArray[np.uint8]]:
    """One texture, or two on the sides of a wavy line; sky is above whatever it meets."""
    count = 2 if rng.random() < 0.65 else 1
    chosen = [STUFF[i] for i in rng.permutation(len(STUFF))[:count]]
    if chosen[-1] == "sky":
        chosen.reverse()
    painted = []
    for name in chosen:
        colour_of[name] = _pick_colour(rng, name)
        painted.append(_STUFF_PAINTERS[name](rng, size, zoom, colour_of[name]))
    canvas = painted[0]
    labels = np.full((size, size), CLASSES.index(chosen[0]), np.uint8)
    if count == 2:
        y, x = _axes(size)
        tilt = rng.normal(0.0, 0.12) if chosen[0] == "sky" else rng.uniform(0.0, 2 * np.pi)
        ahead = (y - 0.5) * np.float32(np.cos(tilt)) + (x - 0.5) * np.float32(np.sin(tilt))
        waves = 0.02 * np.sin(
            (x * np.float32(np.cos(tilt)) - y * np.float32(np.sin(tilt))) * 14.0 + rng.uniform(0, 6)
        )
        distance = np.float32(rng.uniform(-0.2, 0.2)) + waves - ahead
        canvas += _edge(distance, 1.5 / size) * (painted[1] - canvas)
        labels[distance < 0] = CLASSES.index(chosen[1])
    return canvas, labels


# --- things: signed distance (object radii, negative inside) and colours, in the object's own axes ----------


def _capsule(
    u: Plane, v: Plane, start: tuple[float, float], end: tuple[float, float], radius: float
) -> Plane:
    du, dv = end[0] - start[0], end[1] - start[1]
    pu, pv = u - np.float32(start[0]), v - np.float32(start[1])
    t = np.clip((pu * np.float32(du) + pv * np.float32(dv)) / np.float32(du * du + dv * dv), 0.0, 1.0)
    pu -= t * np.float32(du)
    pv -= t * np.float32(dv)
    return np.sqrt(pu * pu + pv * pv) - np.float32(radius)


def _ellipse(u: Plane, v: Plane, centre: tuple[float, float], radii: tuple[float, float]) -> Plane:
    a, b = (
        (u - np.float32(centre[0])) / np.float32(radii[0]),
        (v - np.float32(centre[1])) / np.float32(radii[1]),
    )
    return (np.sqrt(a * a + b * b) - 1.0) * np.float32(min(radii))


def _dots(u: Plane, v: Plane, period: float, radius: float) -> Plane:
    """Signed distance to the nearest dot of a hexagonal lattice."""
    row = np.floor(v / np.float32(period * 0.87) + 0.5)
    dv = v - row * np.float32(period * 0.87)
    shifted = u / np.float32(period) + 0.5 * (row % 2)
    du = (shifted - np.floor(shifted + 0.5)) * np.float32(period)
    return np.sqrt(du * du + dv * dv) - np.float32(radius)


Painter = Callable[[np.random.Generator, Plane, Plane, float, str], tuple[Plane, Planes]]

_LADYBUGS: dict[str, Colour] = {"red": (0.86, 0.09, 0.07), "yellow": (0.96, 0.74, 0.08)}


def _ladybug(rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str) -> tuple[Plane, Planes]:
    body = _ellipse(u, v, (0.0, 0.12), (0.84, 0.82))
    head = _ellipse(u, v, (0.0, -0.70), (0.42, 0.30))
    dome = np.clip(1.0 + 1.15 * body, 0.0, 1.0)
    planes = _mix(1.0 - dome * 0.75, (0.30, 0.02, 0.02), _tinted(rng, _LADYBUGS[colour], 0.04))
    black = _edge(_dots(np.abs(u) + 0.06, v + np.float32(rng.uniform(-0.1, 0.1)), 0.40, 0.135), pixel)
    black = np.maximum(black, _edge(np.abs(u) - 0.035, pixel))
    black = np.maximum(black, _edge(np.maximum(head, -body - 0.06), pixel))
    _blend(planes, black, (0.06, 0.05, 0.06))
    eyes = _edge(_ellipse(np.abs(u), v, (0.22, -0.78), (0.10, 0.09)), pixel)
    _blend(planes, eyes, (0.95, 0.95, 0.92))
    _blend(planes, 0.5 * _edge(_ellipse(u, v, (-0.32, -0.22), (0.26, 0.16)), 0.35), (1.0, 1.0, 1.0))
    return np.minimum(body, head), planes


def _zebra(rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str) -> tuple[Plane, Planes]:
    d = _ellipse(u, v, (0.08, -0.08), (0.66, 0.38))
    legs = np.abs(np.abs(u - 0.08) - 0.36)  # two pairs, mirrored twice
    d = np.minimum(d, np.maximum(np.abs(legs - 0.13) - 0.10, np.abs(v - 0.42) - 0.50))
    d = np.minimum(d, _capsule(u, v, (-0.42, -0.22), (-0.68, -0.66), 0.20))
    muzzle = _capsule(u, v, (-0.68, -0.68), (-0.92, -0.50), 0.15)
    d = np.minimum(d, muzzle)
    d = np.minimum(d, _capsule(u, v, (-0.60, -0.86), (-0.54, -0.95), 0.05))
    d = np.minimum(d, _capsule(u, v, (0.70, -0.20), (0.86, 0.25), 0.06))
    phase = np.float32(rng.uniform(0.0, 6.0))
    bands = np.sin((u + 0.22 * np.sin(v * 3.0 + phase)) * np.float32(2 * np.pi / 0.27) + v * 2.5 + phase)
    planes = _mix(_edge(bands, 0.7), _tinted(rng, (0.07, 0.07, 0.08), 0.02), (0.97, 0.96, 0.93))
    planes *= 1.0 - 0.18 * np.clip(v + 0.2, 0.0, 1.0)
    _blend(planes, _edge(_ellipse(u, v, (-0.98, -0.46), (0.14, 0.14)), pixel), (0.12, 0.11, 0.12))
    _blend(planes, _edge(_ellipse(u, v, (-0.72, -0.72), (0.05, 0.05)), pixel), (0.0, 0.0, 0.0))
    return d, planes


def _sunflower(
    rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str
) -> tuple[Plane, Planes]:
    r = np.sqrt(u * u + v * v)
    petals = np.float32(rng.integers(6, 9))
    lobe = np.abs(np.cos(np.arctan2(v, u) * petals))
    planes = _mix(
        np.clip(r * 1.2 - 0.25, 0.0, 1.0), (0.90, 0.48, 0.02), _tinted(rng, (1.0, 0.86, 0.10), 0.03)
    )
    _blend(planes, np.clip(0.75 - 1.6 * lobe, 0.0, 0.75), (0.60, 0.30, 0.02))
    _blend(planes, 0.35 * _edge(np.abs(lobe - 0.97) - 0.02, 0.03), (0.85, 0.55, 0.02))
    heart = _edge(r - 0.40, pixel)
    _blend(planes, heart, (0.27, 0.13, 0.05))
    _blend(planes, heart * _edge(_dots(u, v, 0.15, 0.045), pixel), (0.62, 0.40, 0.16))
    return r - (0.70 + 0.26 * lobe), planes


_LEAVES: dict[str, tuple[Colour, Colour]] = {
    "green": ((0.10, 0.42, 0.16), (0.75, 0.92, 0.55)),
    "red": ((0.62, 0.10, 0.06), (0.96, 0.62, 0.30)),
    "yellow": ((0.82, 0.60, 0.06), (0.99, 0.93, 0.60)),
}


def _leaf(rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str) -> tuple[Plane, Planes]:
    side = np.abs(u)
    belly = np.clip(1.0 - (v * 1.05) ** 2, 0.0, None)
    teeth = 0.03 * np.sin(v * 28.0)
    d = (side - (0.62 * belly ** np.float32(0.8) + teeth * belly)) * 0.85
    d = np.minimum(d, _capsule(u, v, (0.0, 0.8), (0.06, 1.12), 0.05))
    low, high = _LEAVES[colour]
    veins = (v + 0.75 * side) / np.float32(0.235)
    vein = np.abs(veins - np.floor(veins) - 0.5)
    planes = _mix(np.clip(0.24 - 0.3 * u + 0.12 * vein, 0.0, 1.0), _tinted(rng, low, 0.04), high)
    light = np.maximum(_edge(side - 0.05, pixel), 0.9 * _edge(0.40 - vein, max(0.12, pixel * 3)))
    _blend(planes, light, high)
    return d, planes


_FISHES: dict[str, tuple[Colour, Colour]] = {
    "silver": ((0.35, 0.40, 0.46), (0.88, 0.92, 0.94)),
    "blue": ((0.06, 0.20, 0.55), (0.48, 0.72, 0.98)),
    "purple": ((0.36, 0.10, 0.46), (0.85, 0.58, 0.92)),
}


def _fish(rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str) -> tuple[Plane, Planes]:
    body = _ellipse(u, v, (-0.16, 0.0), (0.80, 0.50))
    tail = np.maximum(np.abs(v) - (u - 0.38) * 0.95, u - 0.98 + 0.25 * (0.5 - np.abs(v))) * 0.75
    fin = np.maximum(_ellipse(u, v, (0.02, -0.38), (0.34, 0.24)), v + 0.30)
    low, high = _FISHES[colour]
    row = np.floor(u / np.float32(0.145))
    du = u / np.float32(0.145) - row
    shifted = v / np.float32(0.26) + 0.5 * (row % 2)
    dv = (shifted - np.floor(shifted) - 0.5) * 1.8
    scale = np.sqrt(du * du + dv * dv)
    ring = np.clip((np.abs(scale - 0.88) - 0.06) * 3.2, 0.0, 1.0)
    planes = _mix(ring * np.clip(0.74 + 0.45 * v, 0.3, 1.0), low, _tinted(rng, high, 0.04))
    head = _edge(u + 0.52, pixel)
    _blend(planes, head * 0.85, tuple(0.4 * a + 0.6 * b for a, b in zip(low, high, strict=True)))  # type: ignore[arg-type]
    rays = np.maximum(_edge(0.44 - u, pixel), _edge(-0.0 - body, pixel)) * (0.55 + 0.35 * np.sin(v * 24.0))
    _blend(planes, np.clip(rays, 0.0, 1.0) * (body > 0), low)
    _blend(planes, _edge(_ellipse(u, v, (-0.70, -0.10), (0.12, 0.12)), pixel), (1.0, 1.0, 1.0))
    _blend(planes, _edge(_ellipse(u, v, (-0.72, -0.10), (0.06, 0.06)), pixel), (0.02, 0.02, 0.05))
    return np.minimum(np.minimum(body, tail), fin), planes


_BOARDS: dict[str, tuple[Colour, Colour]] = {
    "black and white": ((0.08, 0.08, 0.09), (0.96, 0.95, 0.91)),
    "brown": ((0.36, 0.18, 0.08), (0.95, 0.82, 0.60)),
}


def _chessboard(
    rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str
) -> tuple[Plane, Planes]:
    low, high = _BOARDS[colour]
    d = np.maximum(np.abs(u), np.abs(v)) - 0.82
    waves = np.sin(u * np.float32(np.pi / 0.25)) * np.sin(v * np.float32(np.pi / 0.25))
    planes = _mix(_edge(waves, 9 * pixel), low, high)
    _blend(planes, _edge(-0.075 - d, pixel), _tinted(rng, (0.42, 0.22, 0.10), 0.03))
    planes *= 1.0 + 0.08 * (u - v)
    return d, planes


def _orange(rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str) -> tuple[Plane, Planes]:
    d = _ellipse(u, v, (0.0, 0.08), (0.84, 0.82))
    away = np.sqrt((u + 0.28) ** 2 + (v + 0.22) ** 2)
    planes = _mix(
        np.clip(away * 0.72 - 0.08, 0.0, 1.0), _tinted(rng, (1.0, 0.62, 0.10), 0.03), (0.80, 0.31, 0.0)
    )
    _blend(planes, 0.65 * _edge(_dots(u, v, 0.20, 0.05), 0.08), (0.66, 0.25, 0.0))
    _blend(planes, 0.65 * _edge(_ellipse(u, v, (-0.32, -0.28), (0.18, 0.13)), 0.30), (1.0, 0.95, 0.80))
    stalk = _ellipse(u, v, (0.16, -0.80), (0.30, 0.13))
    _blend(planes, _edge(stalk, pixel), (0.16, 0.50, 0.12))
    return np.minimum(d, stalk), planes


_CLOUDS: dict[str, tuple[Colour, Colour]] = {
    "white": ((0.62, 0.69, 0.80), (1.0, 1.0, 1.0)),
    "gray": ((0.38, 0.41, 0.48), (0.80, 0.82, 0.86)),
}
_PUFFS = (
    (-0.66, 0.20, 0.32),
    (-0.30, -0.14, 0.42),
    (0.20, -0.22, 0.46),
    (0.62, 0.12, 0.36),
    (-0.02, 0.24, 0.40),
)


def _cloud(rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str) -> tuple[Plane, Planes]:
    low, high = _CLOUDS[colour]
    d = np.full(u.shape, 9.0, np.float32)
    height = np.full(u.shape, 9.0, np.float32)
    for x, y, radius in _PUFFS:
        jitter = rng.uniform(-0.06, 0.06, 3)
        x, y, radius = x + jitter[0], y + jitter[1], radius + 0.6 * jitter[2]
        du, dv = u - np.float32(x), v - np.float32(y)
        r = np.sqrt(du * du + dv * dv)
        d = np.minimum(d, r - np.float32(radius))
        # A puff is lit from above; where two meet, the darker lower rim of one shows against the other.
        height = np.minimum(height, (r + 0.75 * dv) / np.float32(radius))
    curls = np.abs(np.sin(u * 9.0 + 2.0 * np.sin(v * 7.0)) * np.sin(v * 9.0 + 2.0 * np.sin(u * 8.0)))
    light = np.clip(1.12 - 0.5 * np.clip(height, 0.0, 1.6) - 0.35 * curls, 0.0, 1.0)
    return d, _mix(light, low, high)


_THING_PAINTERS: dict[str, Painter] = {
    "ladybug": _ladybug,
    "zebra": _zebra,
    "sunflower": _sunflower,
    "leaf": _leaf,
    "fish": _fish,
    "chessboard": _chessboard,
    "orange": _orange,
    "cloud": _cloud,
}
#: How far a thing may lean (radians); the others turn freely.
_LEAN = {"zebra": 0.25, "cloud": 0.2, "fish": 0.6}


def _place_things(
    rng: np.random.Generator,
    canvas: Planes,
    labels: NDArray[np.uint8],
    zoom: float,
    colour_of: dict[str, str],
) -> None:
    """Draw 0 to 3 different things over canvas (3, s, s) and labels (s, s), in place."""
    count = int(rng.choice(4, p=(0.08, 0.27, 0.37, 0.28)))
    taken: list[tuple[float, float, float]] = []
    for choice in rng.permutation(len(THINGS))[:count]:
        name = THINGS[choice]
        colour_of[name] = _pick_colour(rng, name)
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
    y, x = _axes(size)
    dy, dx = (y[top:bottom] - centre[1]) / radius, (x[:, left:right] - centre[0]) / radius
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = np.asarray((dx * cos + dy * sin) * np.float32(flip), np.float32)
    v = np.asarray(dy * cos - dx * sin, np.float32)
    pixel = 1.0 / (radius * size)
    distance, planes = _THING_PAINTERS[name](rng, u, v, pixel, colour)

    box = canvas[:, top:bottom, left:right]
    shade = np.clip(1.0 - distance / _SHADOW, 0.0, 1.0)
    box *= 1.0 - 0.38 * shade * shade
    box += _edge(distance, pixel) * (planes - box)
    labels[top:bottom, left:right][distance < 0] = CLASSES.index(name)
