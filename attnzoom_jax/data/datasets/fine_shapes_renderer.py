"""Draws the scenes of `fine_shapes`: textured objects on clutter, each with one small mark.

A scene is a list of `Thing`s (everything that is random about an object) and one background seed,
so that it can be drawn again with one property changed: the tests prove the annotation that way.

    coverage  = area-averaged polygon at SUPERSAMPLE x resolution           [h, w] in [0, 1]
    mask      = coverage >= 1/2, less what a thing in front hides
    part      = the convex hull of the mark, as drawn
    rim       = pixels of the mask within `RIM` of its contour
    surface   = the mask without rim and part

Lengths are meant for 64 x 64 pixels and scale with the image; points are (y, x), pixel centres.
"""

import dataclasses
import functools
import math

import cv2
import numpy as np

FAMILIES = ("circle", "square", "triangle", "star")
MARKS = ("cross", "ring", "bars", "chevron")
TEXTURES = ("plain", "striped", "spotted")
COLORS = {
    "red": (0.84, 0.22, 0.20),
    "orange": (0.86, 0.46, 0.12),
    "yellow": (0.74, 0.62, 0.10),
    "green": (0.24, 0.60, 0.22),
    "cyan": (0.12, 0.58, 0.62),
    "blue": (0.24, 0.38, 0.84),
}
WARM = ("red", "orange", "yellow")
CLASS_NAMES = tuple(f"{family}_{mark}" for family in FAMILIES for mark in MARKS)
# Which pixels decide each attribute, whether it is true or false.
DECIDED_BY = {
    "striped": "surface",
    "spotted": "surface",
    "warm": "surface",
    "outlined": "rim",
    "pale_mark": "part",
    **dict.fromkeys(FAMILIES, "rim"),
    **dict.fromkeys(MARKS, "part"),
}
ATTRIBUTES = tuple(DECIDED_BY)

MAX_DISTRACTORS = 2
MAX_DISTRACTOR_RATIO = 0.6  # of the labelled object's visible pixels
MIN_VISIBLE = 0.85  # of every object
SUPERSAMPLE = 4
RIM = 2.5
PHRASES = {"cross": "a cross", "ring": "a ring", "bars": "two bars", "chevron": "a chevron"}


@dataclasses.dataclass(frozen=True)
class Thing:
    """Everything that is random about one object; lengths in pixels, angles in radians."""

    family: str
    mark: str
    color: str
    rgb: tuple[float, float, float]
    texture: str
    texture_period: float
    texture_angle: float
    texture_phase: float
    outlined: bool
    pale_mark: bool
    center: tuple[float, float]
    radius: float  # of the disc of the same size
    angle: float
    mark_center: tuple[float, float]
    mark_radius: float
    mark_angle: float
    mark_stroke: float  # share of mark_radius

    @property
    def label(self) -> int:
        """The class: family and mark."""
        return CLASS_NAMES.index(f"{self.family}_{self.mark}")

    @property
    def attributes(self) -> np.ndarray:
        """The binary attributes, bool [a]."""
        true = {self.family, self.mark, self.texture}
        true |= {"warm"} if self.color in WARM else set()
        true |= {"outlined"} if self.outlined else set()
        true |= {"pale_mark"} if self.pale_mark else set()
        return np.array([name in true for name in ATTRIBUTES])

    @property
    def phrase(self) -> str:
        """A short description, such as "striped red triangle with a cross"."""
        return f"{self.texture} {self.color} {self.family} with {PHRASES[self.mark]}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and the things on it, the labelled one first; `order` draws back to front."""

    size: int
    background_seed: int
    things: tuple[Thing, ...]
    order: tuple[int, ...]


def draw(scene: Scene) -> dict:
    """Draws a scene and its exact annotation.

    Args:
        scene: What to draw; h = w = scene.size.

    Returns:
        image uint8 [h, w, 3]; object_ids and part_ids uint8 [h, w], 0 for the background and i + 1
        where thing i (its mark) is visible; attribute_bits uint16 [h, w], where bit a is set if the
        pixel decides attribute a of the object visible there.
    """
    size = scene.size
    image = _background(scene.background_seed, size)
    ids = np.zeros((size, size), np.uint8)
    parts = np.zeros((size, size), np.uint8)
    bits = np.zeros((size, size), np.uint16)
    for i in scene.order:
        thing = scene.things[i]
        body = _body(thing, size)
        mask = body >= 0.5
        part = _part(thing, size) & mask
        depth = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 5)
        _paint(image, thing, body, size)
        np.copyto(ids, i + 1, where=mask)
        np.copyto(parts, 0, where=mask)
        np.copyto(parts, i + 1, where=part)
        np.copyto(bits, _BITS["surface"], where=mask)
        np.copyto(bits, _BITS["rim"], where=mask & (depth <= _px(RIM, size)))
        np.copyto(bits, _BITS["part"], where=part)
    return {
        "image": cv2.convertScaleAbs(np.maximum(image, 0), alpha=255),  # rounds and saturates
        "object_ids": ids,
        "part_ids": parts,
        "attribute_bits": bits,
    }


def sample_scene(
    rng: np.random.Generator, label: int, *, size: int = 64, distractor_share: float = 0.5
) -> Scene:
    """Draws a random scene whose largest object has the given class.

    Args:
        rng: Source of everything random.
        label: Class of the largest object, 0 to 15.
        size: Image height and width in pixels.
        distractor_share: Share of scenes that get other objects, each of another class, at most
            0.6 of the labelled one's size, hiding neither its mark nor more than a strip of it.

    Returns:
        The scene, with 1 to 3 things.
    """
    anywhere = np.ones((size, size), bool)
    first = _sample_thing(rng, label, _px(rng.uniform(16.0, 19.0), size), anywhere)
    assert first is not None  # there is nothing in its way
    things, order = [first], [0]
    if rng.random() < distractor_share:
        wanted = int(rng.integers(1, MAX_DISTRACTORS + 1))
        for attempt in range(12):
            if len(things) > wanted:
                break
            taken = np.max([_body(thing, size) for thing in things], axis=0) >= 0.5
            space = cv2.distanceTransform((~taken).astype(np.uint8), cv2.DIST_L2, 5)
            other = int(rng.integers(len(CLASS_NAMES) - 1))
            other += other >= label
            radius = first.radius * rng.uniform(0.3, 0.55 - 0.02 * attempt) ** 0.5
            thing = _sample_thing(rng, other, radius, space > 0.8 * radius)
            if thing is None:
                continue
            behind = [len(things), *order] if rng.random() < 0.5 else [*order, len(things)]
            if _is_legible([*things, thing], behind, size):
                things, order = [*things, thing], behind
    return Scene(size, int(rng.integers(2**31)), tuple(things), tuple(order))


def _is_legible(things: list[Thing], order: list[int], size: int) -> bool:
    """Whether every mark and most of each thing shows, and the first is clearly the largest."""
    masks = [_body(thing, size) >= 0.5 for thing in things]
    ids = np.full((size, size), -1)
    for i in order:
        ids[masks[i]] = i
    visible = [int((ids == i).sum()) for i in range(len(things))]
    if any(visible[i] < MIN_VISIBLE * masks[i].sum() for i in range(len(things))):
        return False
    if any((ids[_part(thing, size)] != i).any() for i, thing in enumerate(things)):
        return False
    return max(visible[1:]) <= MAX_DISTRACTOR_RATIO * visible[0]


def _sample_thing(
    rng: np.random.Generator, label: int, radius: float, allowed: np.ndarray
) -> Thing | None:
    """A random thing whose centre is in allowed [h, w]; None where it does not fit the image."""
    size = len(allowed)
    family, mark = CLASS_NAMES[label].split("_")
    angle = rng.uniform(0, 2 * np.pi)
    edge = np.ceil(np.abs(_rotate(_UNIT_OUTLINES[family], angle)).max(axis=0) * radius + 0.5)
    top, left = edge.astype(int)
    centers = np.flatnonzero(allowed[top : size - top, left : size - left])
    if not len(centers):
        return None
    y, x = divmod(centers[rng.integers(len(centers))], size - 2 * left)
    jitter = rng.uniform(-0.5, 0.5, 2)
    color = list(COLORS)[rng.integers(len(COLORS))]
    r, g, b = np.array(COLORS[color]) * rng.uniform(0.9, 1.1) + rng.uniform(-0.04, 0.04, 3)
    thing = Thing(
        family=family,
        mark=mark,
        color=color,
        rgb=(float(r), float(g), float(b)),
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        texture_period=max(4.0, _px(rng.uniform(5.5, 8.0), size)),
        texture_angle=rng.uniform(0, np.pi),
        texture_phase=rng.uniform(0, 2 * np.pi),
        outlined=bool(rng.random() < 0.5),
        pale_mark=bool(rng.random() < 0.5),
        center=(float(y + top + jitter[0]), float(x + left + jitter[1])),
        radius=radius,
        angle=angle,
        mark_center=(0.0, 0.0),
        mark_radius=radius * rng.uniform(0.29, 0.32),
        mark_angle=rng.uniform(-0.4, 0.4),
        mark_stroke=rng.uniform(0.38, 0.46),
    )
    return _with_mark_off_center(rng, thing, size)


def _with_mark_off_center(rng: np.random.Generator, thing: Thing, size: int) -> Thing:
    """Puts the mark anywhere inside the thing where it misses the rim and every centre point."""
    mask = (_body(thing, size) >= 0.5).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(mask)
    box = np.s_[top : top + height, left : left + width]
    away = cv2.distanceTransform(mask, cv2.DIST_L2, 5)[box] - _px(0.5, size)
    y, x = (axis[box] for axis in _grid(size))
    box_center = (top + (height - 1) / 2, left + (width - 1) / 2)
    for point in (thing.center, box_center, ((size - 1) / 2, (size - 1) / 2)):
        away = np.minimum(away, np.hypot(y - point[0], x - point[1]))
    radius = thing.mark_radius
    while not len(fits := np.flatnonzero(away >= radius + _px(1.0, size))):
        radius *= 0.95
    row, column = divmod(int(fits[rng.integers(len(fits))]), width)
    return dataclasses.replace(thing, mark_center=(top + row, left + column), mark_radius=radius)


def _paint(image: np.ndarray, thing: Thing, body: np.ndarray, size: int) -> None:
    """Composites a thing into image [h, w, 3], in place; body is its coverage [h, w]."""
    left, top, width, height = cv2.boundingRect((body > 0).view(np.uint8))
    box = np.s_[top : top + height, left : left + width]
    y, x = (axis[box] - origin for axis, origin in zip(_grid(size), thing.center, strict=True))
    light = 1 + (0.08 / thing.radius) * (y + x)  # [h', w'], the box alone
    cos, sin = math.cos(thing.texture_angle), math.sin(thing.texture_angle)
    frequency, phase = 2 * math.pi / thing.texture_period, thing.texture_phase
    if thing.texture == "striped":
        light += 0.18 * np.clip(2 * np.sin(frequency * (cos * x + sin * y) + phase), -1, 1)
    elif thing.texture == "spotted":
        waves = np.cos(frequency * (cos * x + sin * y) + phase)
        waves += np.cos(frequency * (cos * y - sin * x) + phase)
        light += 0.18 * np.clip(3 * waves - 1.5, -1, 1)
    color = light[..., None] * np.asarray(thing.rgb, np.float32)
    if thing.outlined:
        radius = thing.radius - _px(1.6, size) / _UNIT_INRADIUS[thing.family]
        inner = _body(dataclasses.replace(thing, radius=radius), size)[box][..., None]
        color *= 0.3 + 0.7 * inner
    ink = _coverage(_mark_contours(thing), size)[box][..., None]
    color += ink * ((0.97 if thing.pale_mark else 0.04) - color)
    image[box] += body[box][..., None] * (color - image[box])


def _background(seed: int, size: int) -> np.ndarray:
    """Muted blotches, strokes and fragments, float32 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    cells = rng.uniform(0.2, 0.75, (5, 5, 1)) + rng.uniform(-0.12, 0.12, (5, 5, 3))
    image = cv2.resize(cells.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    count = 14
    points = rng.uniform(0, size, (count, 1, 2)) + rng.normal(0, _px(6, size), (count, 4, 2))
    colors = rng.uniform(0.1, 0.85, (count, 1)) + rng.uniform(-0.12, 0.12, (count, 3))
    strokes = rng.integers(0, 3, count)
    fixed = np.round(points * 16).astype(np.int32)
    for corners, color, stroke in zip(fixed, colors, strokes, strict=True):
        if stroke == 0:
            cv2.fillPoly(image, [corners[:3]], color.tolist(), shift=4)
        else:
            cv2.polylines(image, [corners[: 1 + stroke]], stroke == 2, color.tolist(), 1, shift=4)
    return image


def _body(thing: Thing, size: int) -> np.ndarray:
    """The thing's coverage, float32 [h, w]."""
    return _outline(thing.family, thing.center, thing.radius, thing.angle, size)


@functools.lru_cache(maxsize=64)
def _part(thing: Thing, size: int) -> np.ndarray:
    """The pixels of the mark's convex hull, bool [h, w]."""
    hull = cv2.convexHull(np.concatenate(_mark_contours(thing)).astype(np.float32))[:, 0]
    return _coverage([hull], size) >= 0.5


def _coverage(contours: list[np.ndarray], size: int) -> np.ndarray:
    """The share of each pixel inside the contours (even-odd), float32 [h, w]."""
    points = contours[0] if len(contours) == 1 else np.concatenate(contours)
    (top, left), (bottom, right) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    top, left = max(0, math.floor(top)), max(0, math.floor(left))
    height, width = min(size, math.ceil(bottom) + 1) - top, min(size, math.ceil(right) + 1) - left
    canvas = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
    unit = SUPERSAMPLE * 16  # fixed point with four bits
    origin = np.array([top, left]) * unit - (SUPERSAMPLE - 1) * 8 - 0.5
    fixed = [(contour * unit - origin).astype(np.int32)[:, ::-1] for contour in contours]
    cv2.fillPoly(canvas, fixed, (255,), shift=4)
    coverage = np.zeros((size, size), np.float32)
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    coverage[top : top + height, left : left + width] = small * np.float32(1 / 255)
    return coverage


@functools.lru_cache(maxsize=64)  # placing, checking and painting all ask for it
def _outline(
    family: str, center: tuple[float, float], radius: float, angle: float, size: int
) -> np.ndarray:
    """The coverage of an unmarked shape, float32 [h, w]."""
    return _coverage([_rotate(_UNIT_OUTLINES[family], angle) * radius + np.asarray(center)], size)


def _mark_contours(thing: Thing) -> list[np.ndarray]:
    """The mark's filled contours, each [p, 2]; holes count by the even-odd rule."""
    s = thing.mark_stroke / 2
    if thing.mark == "cross":
        arm = np.array([(-1, s), (-1, -s), (-s, -s)])
        shapes = [np.concatenate([_rotate(arm, -k * np.pi / 2) for k in range(4)])]
    elif thing.mark == "ring":
        shapes = [_circle(24), _circle(24) * (1 - 2 * s)]
    elif thing.mark == "bars":
        bar = np.array([(-s, -0.85), (s, -0.85), (s, 0.85), (-s, 0.85)])
        shapes = [bar + np.array((dy, 0)) for dy in (-0.55, 0.55)]
    else:
        tip, end, thick = -0.75, 0.65, 2.6 * s
        shapes = [
            np.array(
                [
                    (tip, 0),
                    (end - thick, 0.9),
                    (end, 0.9),
                    (tip + thick, 0),
                    (end, -0.9),
                    (end - thick, -0.9),
                ]
            )
        ]
    place = np.asarray(thing.mark_center)
    return [_rotate(shape, thing.mark_angle) * thing.mark_radius + place for shape in shapes]


def _rotate(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, -sin], [sin, cos]])


def _circle(count: int) -> np.ndarray:
    angles = np.arange(count) * 2 * np.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _px(length: float, size: int) -> float:
    """A length of the 64-pixel design in pixels of this image."""
    return length * size / 64


@functools.lru_cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return y, x


def _unit_outline(family: str) -> np.ndarray:
    """Outlines around (0, 0); the pointed ones a little smaller than the unit disc, to fit."""
    if family == "circle":
        return _circle(48)
    if family == "square":
        return _circle(4) * (np.pi / 2) ** 0.5
    if family == "triangle":
        return _circle(3) * (0.85 * np.pi * 4 / 27**0.5) ** 0.5
    star = _circle(10) * np.where(np.arange(10) % 2, 0.55, 1.0)[:, None]
    area = 5 * 0.55 * np.sin(np.pi / 5)
    return star * (0.85 * np.pi / area) ** 0.5


_UNIT_OUTLINES = {family: _unit_outline(family) for family in FAMILIES}
# Distance of the edges from the centre, so that shrinking moves every edge inwards alike.
_UNIT_INRADIUS = {
    family: float(
        np.min(
            [
                abs(a[0] * b[1] - a[1] * b[0]) / np.hypot(*(b - a))
                for a, b in zip(points, np.roll(points, -1, axis=0), strict=True)
            ]
        )
    )
    for family, points in _UNIT_OUTLINES.items()
}
_BITS = {
    region: sum(1 << a for a, name in enumerate(ATTRIBUTES) if DECIDED_BY[name] == region)
    for region in ("surface", "rim", "part")
}
