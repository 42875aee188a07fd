"""Made tissue: seeded images that look like H&E at 40x.

Cells and background are drawn as amounts of haematoxylin, eosin and red-cell pigment, and turned
into colours by their optical densities, so that stains vary between images as they do in a lab.
Not every nucleus is a cell of the truth: fibroblasts, red cells and nuclei out of focus are
background, as in the release. A neutrophil and a macrophage are marked with their cytoplasm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

AREAS = (692.0, 277.0, 563.0, 2044.0)
"""Median area of each class, px2 at 40x."""
SHARES = (0.38, 0.38, 0.12, 0.12)
"""Share of each class among the cells of an ordinary image."""
DENSITY = 6.5e-4
"""Cells a pixel: about 43 in an image of 256 x 256."""
_SPREADS = (0.22, 0.15, 0.12, 0.20)  # standard deviation of log(area)
_LOSSES = (1.10, 1.05, 1.06, 1.12)  # drawn larger by this, for what neighbours and borders take
_CLING = (0.45, 0.60, 0.15, 0.25)  # share of cells that are put beside one of their class
_STRAY = (0.05, 0.15, 0.40, 0.50)  # share of the others that lie anywhere
_STAINS = ((0.56, 0.74, 0.36), (0.16, 0.85, 0.49), (0.12, 0.80, 0.78))  # H, E, red cells: R, G, B


@dataclass
class _Canvas:
    """One image in the making: amounts of stain [H, W] and who lies where."""

    rng: np.random.Generator
    stains: np.ndarray  # float32 [3, H, W]: haematoxylin, eosin, red cells
    ids: np.ndarray  # int32 [H, W], 0 is background
    fine: np.ndarray  # float32 [H, W], noise of about 2 px, unit variance
    coarse: np.ndarray  # the same, about 6 px
    labels: list[int] = field(default_factory=list)  # class of id k + 1


@dataclass
class _Patch:
    """The few pixels around one cell, with its outline.

    `depth` is the distance to the outline along the ray from the centre: px, positive inside.
    """

    window: tuple[slice, slice]
    y: np.ndarray
    x: np.ndarray
    depth: np.ndarray
    radius: float

    def cover(self, softness: float = 1.6) -> np.ndarray:
        """Return how much of each pixel the cell covers, 0-1."""
        return np.clip(self.depth / softness + 0.5, 0, 1)


def _noise(rng: np.random.Generator, shape, sigma, mode: str = "reflect") -> np.ndarray:
    """Return smooth noise [H, W] with zero mean and unit variance."""
    grain = rng.standard_normal(shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(grain, sigma, mode=mode)
    return (noise - noise.mean()) / max(float(noise.std()), 1e-6)


def _outline(canvas, centre, area, *, ratio=1.0, angle=0.0, wobble=0.03) -> _Patch:
    """Return the patch of an ellipse of about `area` px2 with a wobbling outline."""
    rng = canvas.rng
    minor = np.sqrt(area / (np.pi * ratio))
    reach = int(np.ceil(minor * ratio * (1 + 3 * wobble) + 4))
    height, width = canvas.ids.shape
    top, left = int(centre[0]) - reach, int(centre[1]) - reach
    rows = slice(max(top, 0), max(min(top + 2 * reach + 1, height), 0))
    cols = slice(max(left, 0), max(min(left + 2 * reach + 1, width), 0))
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(centre[0]))[:, None]
    x = (np.arange(cols.start, cols.stop, dtype=np.float32) - np.float32(centre[1]))[None, :]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    theta = np.arctan2(across, along)
    edge = minor / np.sqrt((np.cos(theta) / ratio) ** 2 + np.sin(theta) ** 2)
    for order, phase in zip((2, 3, 4, 5), rng.uniform(0, 2 * np.pi, 4), strict=True):
        edge *= 1 + 2 * wobble / order * rng.uniform(0.5, 1.0) * np.cos(order * theta + phase)
    depth = (edge - np.hypot(along, across)).astype(np.float32)
    return _Patch((rows, cols), across, along, depth, float(minor))


def _blend(canvas: _Canvas, patch: _Patch, cover: np.ndarray, haem, eosin, red=0.0) -> None:
    """Put amounts of haematoxylin, eosin and red-cell pigment over what lies there."""
    for stain, amount in zip(canvas.stains, (haem, eosin, red), strict=True):
        stain[patch.window] += cover * (amount - stain[patch.window])


def _texture(canvas: _Canvas, patch: _Patch) -> tuple[np.ndarray, np.ndarray]:
    return canvas.fine[patch.window], canvas.coarse[patch.window]


def _epithelial(canvas: _Canvas, patch: _Patch, cover: np.ndarray) -> None:
    """Large, oval, vesicular: open chromatin, a dark rim, one or two nucleoli."""
    fine, coarse = _texture(canvas, patch)
    rng = canvas.rng
    chromatin = rng.uniform(0.42, 0.62) + 0.10 * fine + 0.07 * coarse
    chromatin += 0.50 * np.exp(-(((patch.depth - 1.2) / 1.3) ** 2))
    for _ in range(rng.integers(1, 3)):
        y, x = rng.uniform(-0.4, 0.4, 2) * patch.radius
        chromatin += 0.85 * np.exp(-((patch.y - y) ** 2 + (patch.x - x) ** 2) / 5.5)
    _blend(canvas, patch, cover, chromatin, 0.30)


def _lymphocyte(canvas: _Canvas, patch: _Patch, cover: np.ndarray) -> None:
    """Small, round, dark, with coarse clumps."""
    fine, coarse = _texture(canvas, patch)
    dark = canvas.rng.uniform(1.25, 1.65) + 0.10 * fine + 0.14 * coarse
    _blend(canvas, patch, cover, dark - 0.45 * np.exp(-np.maximum(patch.depth, 0) / 1.5), 0.25)


def _neutrophil(canvas: _Canvas, patch: _Patch, cover: np.ndarray) -> None:
    """A pale pink, grainy body with three or four dark lobes on an arc."""
    fine, _ = _texture(canvas, patch)
    rng = canvas.rng
    _blend(canvas, patch, cover, 0.10 + 0.03 * fine, 0.38 + 0.12 * fine, 0.05)
    rim = np.exp(-(((patch.depth - 1.0) / 1.1) ** 2)) * cover
    canvas.stains[1][patch.window] += 0.25 * rim
    lobes, start = int(rng.integers(3, 5)), rng.uniform(0, 2 * np.pi)
    turns = start + np.cumsum(rng.uniform(1.1, 1.7, lobes))
    near = np.full(patch.depth.shape, np.inf, np.float32)
    for turn in turns:
        ring, size = patch.radius * rng.uniform([0.42, 0.26], [0.62, 0.36])
        y, x = patch.y - ring * np.sin(turn), patch.x - ring * np.cos(turn)
        out, round_ = y * np.sin(turn) + x * np.cos(turn), y * np.cos(turn) - x * np.sin(turn)
        near = np.minimum(near, np.hypot(out * rng.uniform(1.0, 1.5), round_) - size)
    swept = np.mod(np.arctan2(patch.y, patch.x) - turns[0], 2 * np.pi) < turns[-1] - turns[0]
    strand = np.abs(np.hypot(patch.y, patch.x) - 0.5 * patch.radius) - 1.0
    lobed = np.clip(0.5 - np.minimum(near, np.where(swept, strand, np.inf)) / 1.5, 0, 1) * cover
    _blend(canvas, patch, lobed, 1.45 + 0.10 * fine, 0.25)


def _macrophage(canvas: _Canvas, patch: _Patch, cover: np.ndarray) -> None:
    """Large, pale and foamy, irregular, with an eccentric bean-shaped nucleus."""
    fine, coarse = _texture(canvas, patch)
    rng = canvas.rng
    foam, pallor = 0.5 + 0.25 * np.tanh(1.3 * fine) + 0.25 * coarse, rng.uniform(0.8, 1.3)
    _blend(canvas, patch, cover, 0.06 + 0.16 * pallor * foam, 0.12 + 0.24 * pallor * foam)
    rim = np.exp(-(((patch.depth - 1.2) / 1.2) ** 2)) * cover
    canvas.stains[0][patch.window] += 0.16 * rim
    canvas.stains[1][patch.window] += 0.26 * rim
    size, turn = patch.radius * rng.uniform(0.36, 0.44), rng.uniform(0, 2 * np.pi)
    out = patch.y * np.sin(turn) + patch.x * np.cos(turn) - patch.radius * rng.uniform(0.2, 0.45)
    side = patch.y * np.cos(turn) - patch.x * np.sin(turn)
    bean = np.hypot(out * rng.uniform(1.1, 1.4), side) - size
    notch = size * 0.6 - np.hypot(out + size * rng.uniform(1.0, 1.3), side)
    depth = -np.maximum(bean, notch)
    nucleus = np.clip(depth / 1.6 + 0.5, 0, 1) * cover
    rim = np.exp(-(((depth - 1.2) / 1.3) ** 2))
    _blend(canvas, patch, nucleus, 0.60 + 0.10 * fine + 0.10 * coarse + 0.35 * rim, 0.30)


_PAINTERS: tuple[Callable[[_Canvas, _Patch, np.ndarray], None], ...] = (
    _epithelial,
    _lymphocyte,
    _neutrophil,
    _macrophage,
)
_RATIOS = ((1.15, 1.7), (1.0, 1.35), (1.0, 1.15), (1.0, 1.45))
_WOBBLES = (0.05, 0.04, 0.03, 0.11)


def _place_cell(canvas: _Canvas, kind: int, centre, angle: float) -> bool:
    """Draw a cell if at most a tenth of it falls on cells that lie there; say whether it did."""
    rng, (y, x), (height, width) = canvas.rng, centre, canvas.ids.shape
    if not (0 <= y < height and 0 <= x < width) or canvas.ids[int(y), int(x)]:
        return False
    spread = np.exp(_SPREADS[kind] * np.clip(rng.standard_normal(), -2, 2))
    area = AREAS[kind] * _LOSSES[kind] * spread
    ratio = rng.uniform(*_RATIOS[kind])
    patch = _outline(canvas, centre, area, ratio=ratio, angle=angle, wobble=_WOBBLES[kind])
    mine, taken = patch.depth > 0, canvas.ids[patch.window] > 0
    size = int(mine.sum())
    if size < 0.3 * area or int((mine & taken).sum()) > 0.1 * size:
        return False
    mine &= ~taken
    _PAINTERS[kind](canvas, patch, patch.cover() * ~taken)
    canvas.labels.append(kind + 1)
    canvas.ids[patch.window][mine] = len(canvas.labels)
    return True


@dataclass(frozen=True)
class _Structure:
    """A gland (a ring of epithelium around a lumen) or a heap of cells."""

    y: float
    x: float
    radius: float
    gland: bool = False

    def draw(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Return a place in it and the angle of a cell there."""
        turn = rng.uniform(0, 2 * np.pi)
        if self.gland:
            far = self.radius + rng.normal(0, 7)
        else:
            far = self.radius * np.sqrt(rng.uniform(0, 1))
        spin = turn if self.gland else rng.uniform(0, np.pi)
        return self.y + far * np.sin(turn), self.x + far * np.cos(turn), spin + rng.normal(0, 0.2)


def _plan(rng: np.random.Generator, shape, cells: float) -> dict[int, list[_Structure]]:
    """Return the structures that each class (0-based) gathers in."""

    def somewhere(radius: float, gland: bool = False) -> _Structure:
        y, x = (rng.uniform(0.1, 0.9) * side for side in shape)
        return _Structure(y, x, radius, gland)

    def heaps(count: float, low: float, high: float) -> list[_Structure]:
        return [somewhere(rng.uniform(low, high)) for _ in range(max(1, round(count)))]

    glands = [somewhere(rng.uniform(30, 48), True) for _ in range(max(1, round(cells / 40)))]
    return {
        0: glands + heaps(cells / 60, 25, 45),
        1: heaps(cells / 40, 18, 32),
        2: heaps(cells / 40, 20, 45),
        3: heaps(cells / 25, 30, 60),
    }


def _background(rng: np.random.Generator, shape, glands: Sequence[_Structure]) -> np.ndarray:
    """Return the stains [3, H, W] of stroma with fibres and clefts, and of glands."""
    height, width = shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    bend, turn = 14 * _noise(rng, shape, 30), rng.uniform(0, np.pi)
    size = int(1.5 * np.hypot(height, width)) + 1
    grain = _noise(rng, (size, size), (1.3, 11), mode="wrap")
    across = np.mod(y * np.cos(turn) - x * np.sin(turn) + bend, size)
    along = np.mod(y * np.sin(turn) + x * np.cos(turn) + bend, size)
    fibres = ndimage.map_coordinates(grain, [across, along], order=1, mode="grid-wrap")
    patches = _noise(rng, shape, 18)
    cleft = np.clip((fibres + 0.6 * patches - 1.9) * 1.5, 0, 1)
    eosin = (0.58 + 0.11 * fibres + 0.12 * patches) * (1 - 0.9 * cleft)
    haem = (0.10 + 0.05 * _noise(rng, shape, 12) + 0.03 * fibres) * (1 - 0.9 * cleft)
    red = 0.06 * np.clip(patches, 0, 2)
    stains = np.maximum(np.stack([haem, eosin, red]), 0).astype(np.float32)
    for gland in glands:
        _tint(stains, gland, 6 * patches, 0.05 * fibres)
    return stains


def _tint(stains: np.ndarray, gland: _Structure, bend: np.ndarray, fibres: np.ndarray) -> None:
    """Give a gland or nest its purple cytoplasm, and the gland its white lumen, in place."""
    reach, shape = gland.radius + 50, bend.shape
    window = tuple(
        slice(max(int(middle - reach), 0), max(min(int(middle + reach), side), 0))
        for middle, side in zip((gland.y, gland.x), shape, strict=True)
    )
    y, x = np.ogrid[window]
    far = np.hypot(y - gland.y, x - gland.x) + bend[window]
    body = np.clip((gland.radius + 22 - far) / 8, 0, 1)
    lumen = np.clip((gland.radius - 15 - far) / 5, 0, 1) if gland.gland else 0
    for stain, amount in zip(stains, (0.26, 0.42), strict=False):
        part = stain[window]
        part += body * (amount + fibres[window] - part)
        part *= 1 - 0.92 * lumen


def _scatter(canvas: _Canvas, count: float, area, ratio, paint) -> None:
    """Draw things that are no cells of the truth, at random places and before the cells."""
    rng = canvas.rng
    for _ in range(round(count)):
        centre = [rng.uniform(0, side) for side in canvas.ids.shape]
        patch = _outline(
            canvas, centre, rng.uniform(*area), ratio=rng.uniform(*ratio),
            angle=rng.uniform(0, np.pi), wobble=0.05,
        )  # fmt: skip
        paint(canvas, patch)


def _smear(canvas: _Canvas, patch: _Patch) -> None:
    """A nucleus out of focus: a purple cloud without an edge or texture."""
    cover = np.clip(patch.depth / (1.2 * patch.radius), 0, 1)
    canvas.stains[0][patch.window] += canvas.rng.uniform(0.4, 0.8) * cover**1.5


def _fibroblast(canvas: _Canvas, patch: _Patch) -> None:
    """A thin spindle-shaped nucleus of the stroma."""
    fine, _ = _texture(canvas, patch)
    _blend(canvas, patch, patch.cover(2.0), canvas.rng.uniform(0.6, 1.0) + 0.1 * fine, 0.35)


def _red_cell(canvas: _Canvas, patch: _Patch) -> None:
    """A smooth red disc, paler in the middle."""
    dip = np.clip(patch.depth / patch.radius, 0, 0.7)
    _blend(canvas, patch, patch.cover(), 0.04, 0.30, 0.85 - 0.45 * dip)


def make_tissue(
    height: int,
    width: int,
    *,
    density: float = DENSITY,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Draw one image of made tissue and the maps of its cells.

    Args:
        height: of the image, px.
        width: of the image, px.
        density: cells a pixel that are aimed at; above about 1e-3 the tissue is full and fewer
            fit, unless most are lymphocytes.
        shares: share of epithelial cells, lymphocytes, neutrophils and macrophages.
        seed: the same arguments and seed give the same pixels.

    Returns:
        the image, uint8 [H, W, 3] in true RGB, and for each class 1-4 that occurs its int32 map
        [H, W]; ids run on across the classes from 1, without gaps, 0 is background.
    """
    rng = np.random.default_rng(seed)
    shape, cells = (height, width), density * height * width
    plan = _plan(rng, shape, cells)
    stains = _background(rng, shape, plan[0])
    canvas = _Canvas(
        rng, stains, np.zeros(shape, np.int32), _noise(rng, shape, 1.0), _noise(rng, shape, 2.6)
    )
    unit = height * width / 65536
    _scatter(canvas, 8 * unit, (300, 1400), (1.0, 1.8), _smear)
    _scatter(canvas, 8 * unit, (90, 170), (3.0, 5.0), _fibroblast)
    _scatter(canvas, 9 * unit, (120, 190), (1.0, 1.3), _red_cell)
    for kind in (3, 0, 2, 1):
        _fill(canvas, kind, plan[kind], round(cells * shares[kind]))
    return _develop(rng, canvas.stains), _maps_by_class(canvas)


def _fill(canvas: _Canvas, kind: int, structures: Sequence[_Structure], wanted: int) -> None:
    """Place cells of one class: beside each other, in their structures, the rest anywhere."""
    rng, placed = canvas.rng, []
    for attempt in range(30 * wanted):
        if len(placed) == wanted:
            return
        y, x, angle = structures[rng.integers(len(structures))].draw(rng)
        if attempt > 15 * wanted or rng.uniform() < _STRAY[kind]:
            y, x = (rng.uniform(0, side) for side in canvas.ids.shape)
        elif placed and rng.uniform() < _CLING[kind]:
            y, x, angle = placed[rng.integers(len(placed))]
            turn, gap = rng.uniform(0, 2 * np.pi), np.sqrt(AREAS[kind]) * rng.uniform(0.95, 1.3)
            y, x, angle = y + gap * np.sin(turn), x + gap * np.cos(turn), angle + rng.normal(0, 0.3)
        if _place_cell(canvas, kind, (y, x), angle):
            placed.append((y, x, angle))


def _develop(rng: np.random.Generator, stains: np.ndarray) -> np.ndarray:
    """Turn amounts of stain [3, H, W] into a photograph, uint8 [H, W, 3]."""
    vectors = np.array(_STAINS) + rng.normal(0, 0.025, (3, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gains = rng.uniform([0.85, 0.8, 0.9], [1.2, 1.25, 1.1])
    focus = rng.uniform(0.55, 0.85)
    amounts = [ndimage.gaussian_filter(stain, focus) for stain in stains]
    density = np.tensordot(amounts, (vectors * gains[:, None]).astype(np.float32), (0, 0))
    image = rng.uniform(238, 250) * np.exp(-np.maximum(density, 0))
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    image += 1.5 * grain + 3.0 * ndimage.gaussian_filter(grain, (0.7, 0.7, 0.5))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _maps_by_class(canvas: _Canvas) -> dict[int, np.ndarray]:
    """Return one map a class, renumbered so that ids run on from class to class."""
    labels = np.array([0, *canvas.labels])
    order = np.argsort(labels, kind="stable")
    number = np.empty(len(labels), np.int32)
    number[order] = np.arange(len(labels))
    kinds, ids = labels[canvas.ids], number[canvas.ids]
    return {k: np.where(kinds == k, ids, 0) for k in range(1, 5) if (labels == k).any()}
