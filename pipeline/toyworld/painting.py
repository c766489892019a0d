"""Painters for the toy world's textures and things.

A stuff painter fills the whole picture. A thing painter works in object coordinates u (across) and v (down),
in units of the object's radius, and returns the signed distance to the outline (negative inside) and the
colours.

Shapes: s side of the picture in pixels, H W a box inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]  # (H, W), float32
Planes = NDArray[np.floating[Any]]  # (3, H, W), float32 RGB in 0..1
Colour = tuple[float, float, float]
StuffPainter = Callable[[np.random.Generator, int, float, str], Planes]
"""(rng, s, zoom, colour word) -> (3, s, s)"""
ThingPainter = Callable[[np.random.Generator, Plane, Plane, float, str], tuple[Plane, Planes]]
"""(rng, u (H, W), v (H, W), pixel size in object radii, colour word) -> distance (H, W), colours (3, H, W)"""


@lru_cache(maxsize=256)
def _spline(size: int, knots: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Cubic B-spline over ``knots`` cells: first knot (size,), and weights (4, size) of it and the next 3."""
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


def noise(rng: np.random.Generator, size: int, down: int, across: int | None = None) -> Plane:
    """Smooth noise in 0..1 with ``down`` x ``across`` cells over the picture."""
    across = down if across is None else across
    grid = rng.random((down + 3, across + 3), dtype=np.float32)
    # Two matrix products would be five times slower on two cores, as BLAS threads spin on such small ones.
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
def axes(size: int) -> tuple[Plane, Plane]:
    """Pixel centres in 0..1: y (s, 1) and x (1, s)."""
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    line.setflags(write=False)
    return line[:, None], line[None, :]


def _mix(amount: Plane, low: Colour, high: Colour) -> Planes:
    """Interpolate from ``low`` at 0 to ``high`` at 1."""
    start = np.array(low, np.float32)[:, None, None]
    step = np.array(high, np.float32)[:, None, None] - start
    return np.asarray(amount * step + start, dtype=np.float32)


def _blend(planes: Planes, amount: Plane, colour: Colour) -> None:
    """Blend ``colour`` into ``planes`` by ``amount`` (0..1), in place."""
    planes += amount * (np.array(colour, np.float32)[:, None, None] - planes)


def edge(distance: Plane, softness: float) -> Plane:
    """1 inside (negative distance), 0 outside, with a linear transition of width ``softness``."""
    return np.clip(0.5 - distance / np.float32(softness), 0.0, 1.0)


def _tinted(rng: np.random.Generator, colour: Colour, spread: float = 0.05) -> Colour:
    shift = rng.uniform(-spread, spread, 3) + rng.uniform(-spread, spread)
    red, green, blue = (float(v) for v in np.clip(np.array(colour) + shift, 0.0, 1.0))
    return red, green, blue


# --- stuff ---


def _grass(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    blades = noise(rng, size, round(13 / zoom), round(44 / zoom))
    blades += 0.7 * noise(rng, size, round(20 / zoom), round(60 / zoom))
    field = np.clip((blades - 0.62) * 2.3, 0.0, 1.0)
    planes = _mix(field, _tinted(rng, (0.07, 0.30, 0.05)), _tinted(rng, (0.52, 0.80, 0.20)))
    planes *= 0.85 + 0.3 * noise(rng, size, 4)
    return planes


def _water(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    y, _ = axes(size)
    sway = noise(rng, size, 7, 4)
    waves = np.sin((y + 0.16 * sway) * np.float32(2 * np.pi * 15 / zoom) + 5.0 * noise(rng, size, 8, 10))
    planes = _mix(0.5 + 0.5 * waves, _tinted(rng, (0.02, 0.28, 0.52)), _tinted(rng, (0.16, 0.58, 0.75)))
    glint = np.clip((waves - 0.55) * 2.5, 0.0, 1.0)
    glint *= np.clip(noise(rng, size, 18, 9) * 3.0 - 1.2, 0.0, 1.0)
    _blend(planes, glint, (0.88, 0.97, 1.0))
    return planes


def _sand(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    grain = noise(rng, size, round(58 / zoom))
    dunes = noise(rng, size, 8, 4)
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
    y, x = axes(size)
    rows = np.float32(round(9 / zoom))
    down = y * rows + np.float32(rng.random())
    row = np.floor(down)
    across = x * rows * np.float32(0.5) + np.float32(0.5) * (row % 2) + np.float32(rng.random())
    column = np.floor(across)
    tints = rng.random((16, 16), dtype=np.float32)
    tint = tints[row.astype(np.intp) % 16, column.astype(np.intp) % 16]
    low, high = _BRICKS[colour]
    planes = _mix(
        0.75 * tint + 0.35 * noise(rng, size, 40), _tinted(rng, low, 0.03), _tinted(rng, high, 0.03)
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
    y, _ = axes(size)
    high, low = _SKIES[colour]
    haze = y * 0.75 + 0.3 * noise(rng, size, 5, 3)
    return _mix(haze, _tinted(rng, high, 0.03), _tinted(rng, low, 0.03))


def _wood(rng: np.random.Generator, size: int, zoom: float, colour: str) -> Planes:
    y, x = axes(size)
    along, over = (x, y) if rng.random() < 0.5 else (y, x)
    upright = along is y
    planks = np.float32(round(4 / zoom) + 1)
    across = over * planks + np.float32(rng.random())
    plank = np.floor(across)
    shade = rng.random(16, dtype=np.float32)[plank.astype(np.intp) % 16]
    cells = (4, 9) if upright else (9, 4)
    rings = noise(rng, size, *cells) * 1.6 + over * np.float32(13 / zoom) + shade * 5.0
    grain = 0.5 + 0.5 * np.sin(rings * np.float32(2 * np.pi))
    cells = (6, 60) if upright else (60, 6)
    field = 0.42 * grain + 0.3 * shade + 0.35 * noise(rng, size, *cells)
    planes = _mix(field, _tinted(rng, (0.33, 0.18, 0.07), 0.03), _tinted(rng, (0.80, 0.56, 0.31), 0.03))
    seam = np.clip((np.abs(across - plank - 0.5) - 0.455) * 30.0, 0.0, 0.85)
    _blend(planes, np.broadcast_to(seam, (size, size)), (0.16, 0.08, 0.03))
    return planes


STUFF_PAINTERS: dict[str, StuffPainter] = {
    "grass": _grass,
    "water": _water,
    "sand": _sand,
    "brick": _brick,
    "sky": _sky,
    "wood": _wood,
}


# --- things ---


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


_LADYBUGS: dict[str, Colour] = {"red": (0.86, 0.09, 0.07), "yellow": (0.96, 0.74, 0.08)}


def _ladybug(rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str) -> tuple[Plane, Planes]:
    body = _ellipse(u, v, (0.0, 0.12), (0.84, 0.82))
    head = _ellipse(u, v, (0.0, -0.70), (0.42, 0.30))
    dome = np.clip(1.0 + 1.15 * body, 0.0, 1.0)
    planes = _mix(1.0 - dome * 0.75, (0.30, 0.02, 0.02), _tinted(rng, _LADYBUGS[colour], 0.04))
    black = edge(_dots(np.abs(u) + 0.06, v + np.float32(rng.uniform(-0.1, 0.1)), 0.40, 0.135), pixel)
    black = np.maximum(black, edge(np.abs(u) - 0.035, pixel))
    black = np.maximum(black, edge(np.maximum(head, -body - 0.06), pixel))
    _blend(planes, black, (0.06, 0.05, 0.06))
    eyes = edge(_ellipse(np.abs(u), v, (0.22, -0.78), (0.10, 0.09)), pixel)
    _blend(planes, eyes, (0.95, 0.95, 0.92))
    _blend(planes, 0.5 * edge(_ellipse(u, v, (-0.32, -0.22), (0.26, 0.16)), 0.35), (1.0, 1.0, 1.0))
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
    planes = _mix(edge(bands, 0.7), _tinted(rng, (0.07, 0.07, 0.08), 0.02), (0.97, 0.96, 0.93))
    planes *= 1.0 - 0.18 * np.clip(v + 0.2, 0.0, 1.0)
    _blend(planes, edge(_ellipse(u, v, (-0.98, -0.46), (0.14, 0.14)), pixel), (0.12, 0.11, 0.12))
    _blend(planes, edge(_ellipse(u, v, (-0.72, -0.72), (0.05, 0.05)), pixel), (0.0, 0.0, 0.0))
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
    _blend(planes, 0.35 * edge(np.abs(lobe - 0.97) - 0.02, 0.03), (0.85, 0.55, 0.02))
    heart = edge(r - 0.40, pixel)
    _blend(planes, heart, (0.27, 0.13, 0.05))
    _blend(planes, heart * edge(_dots(u, v, 0.15, 0.045), pixel), (0.62, 0.40, 0.16))
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
    light = np.maximum(edge(side - 0.05, pixel), 0.9 * edge(0.40 - vein, max(0.12, pixel * 3)))
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
    head = edge(u + 0.52, pixel)
    _blend(planes, head * 0.85, tuple(0.4 * a + 0.6 * b for a, b in zip(low, high, strict=True)))  # type: ignore[arg-type]
    rays = np.maximum(edge(0.44 - u, pixel), edge(-0.0 - body, pixel)) * (0.55 + 0.35 * np.sin(v * 24.0))
    _blend(planes, np.clip(rays, 0.0, 1.0) * (body > 0), low)
    _blend(planes, edge(_ellipse(u, v, (-0.70, -0.10), (0.12, 0.12)), pixel), (1.0, 1.0, 1.0))
    _blend(planes, edge(_ellipse(u, v, (-0.72, -0.10), (0.06, 0.06)), pixel), (0.02, 0.02, 0.05))
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
    planes = _mix(edge(waves, 9 * pixel), low, high)
    _blend(planes, edge(-0.075 - d, pixel), _tinted(rng, (0.42, 0.22, 0.10), 0.03))
    planes *= 1.0 + 0.08 * (u - v)
    return d, planes


def _orange(rng: np.random.Generator, u: Plane, v: Plane, pixel: float, colour: str) -> tuple[Plane, Planes]:
    d = _ellipse(u, v, (0.0, 0.08), (0.84, 0.82))
    away = np.sqrt((u + 0.28) ** 2 + (v + 0.22) ** 2)
    planes = _mix(
        np.clip(away * 0.72 - 0.08, 0.0, 1.0), _tinted(rng, (1.0, 0.62, 0.10), 0.03), (0.80, 0.31, 0.0)
    )
    _blend(planes, 0.65 * edge(_dots(u, v, 0.20, 0.05), 0.08), (0.66, 0.25, 0.0))
    _blend(planes, 0.65 * edge(_ellipse(u, v, (-0.32, -0.28), (0.18, 0.13)), 0.30), (1.0, 0.95, 0.80))
    stalk = _ellipse(u, v, (0.16, -0.80), (0.30, 0.13))
    _blend(planes, edge(stalk, pixel), (0.16, 0.50, 0.12))
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
        # Puffs are lit from above; where two meet, the dark lower rim of one shows against the other.
        height = np.minimum(height, (r + 0.75 * dv) / np.float32(radius))
    curls = np.abs(np.sin(u * 9.0 + 2.0 * np.sin(v * 7.0)) * np.sin(v * 9.0 + 2.0 * np.sin(u * 8.0)))
    light = np.clip(1.12 - 0.5 * np.clip(height, 0.0, 1.6) - 0.35 * curls, 0.0, 1.0)
    return d, _mix(light, low, high)


THING_PAINTERS: dict[str, ThingPainter] = {
    "ladybug": _ladybug,
    "zebra": _zebra,
    "sunflower": _sunflower,
    "leaf": _leaf,
    "fish": _fish,
    "chessboard": _chessboard,
    "orange": _orange,
    "cloud": _cloud,
}
