"""Drawn scenes: coloured shapes on a grid of cells, captions, questions, and rules for pixels.

Two shapes stand in two neighbouring cells of a 2 x 2 grid, so a scene is four choices of two things
and a relation between them. Some combinations are never shown; what is asked and drawn at the end
are these alone. The image tokenizer learns from crowds: any number of shapes, none of these pairs.

Letters: H W height and width, C colours.
"""

import dataclasses
import functools
import itertools
from collections.abc import Container, Iterator

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 200, 40),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "below", "left of", "right of")
BACKGROUND = (245, 245, 245)
PLACES = tuple(itertools.product(range(2), range(2)))
"""Cells, (row, column)."""
CROWDED = 0.6
"""Share of a crowd's cells that are not empty."""
HELD_OUT = 6
"""One combination in so many is held out."""
FAR = 80.0
"""Distance in RGB beyond which a pixel is of none of the colours."""
REACH = 0.8
"""Half the side of a square, in halves of its cell."""
SHARE = 0.8
"""Overlap over union of a cell's coloured pixels and a shape's, from which on it is that shape."""


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


Cells = dict[tuple[int, int], Thing]
"""(row, column) -> what stands there."""


@dataclasses.dataclass(frozen=True, order=True)
class Scene:
    """`first` stands in the relation to `second`; `lane` is the row or column of the two."""

    first: Thing
    relation: str
    second: Thing
    lane: int = 0

    @property
    def caption(self) -> str:
        """The scene in words; the lane is not told."""
        return f"a {self.first} {self.relation} a {self.second}"

    @property
    def question(self) -> str:
        """A question about the first thing."""
        return f"what is {self.relation} the {self.second}?"

    @property
    def answer(self) -> str:
        """Its answer."""
        return f"a {self.first}"

    @property
    def cells(self) -> Cells:
        """What stands where."""
        vertical = self.relation in ("above", "below")
        places = (0, 1) if self.relation in ("above", "left of") else (1, 0)
        at = [(place, self.lane) if vertical else (self.lane, place) for place in places]
        return dict(zip(at, (self.first, self.second), strict=True))

    def draw(self, side: int) -> np.ndarray:
        """The picture, uint8 [side, side, 3]."""
        return draw_cells(self.cells, side)


def draw_cells(cells: Cells, side: int) -> np.ndarray:
    """The picture of things in their cells, uint8 [side, side, 3]."""
    picture = np.empty((side, side, 3), np.uint8)
    picture[:] = BACKGROUND
    cell = side // 2
    for (row, column), thing in cells.items():
        part = picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        part[mask_of(thing.shape, cell)] = COLOURS[thing.colour]
    return picture


@functools.cache
def mask_of(shape: str, cell: int) -> np.ndarray:
    """Pixels of a shape in its cell, bool [cell, cell]; round ones are smaller than squares."""
    y, x = (np.mgrid[0:cell, 0:cell] + 0.5) / cell * 2 - 1
    if shape == "circle":
        return x * x + y * y <= 0.65**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= REACH
    return (abs(x) <= (y + REACH) / 2) & (y <= REACH)


THINGS = [Thing(*pair) for pair in itertools.product(COLOURS, SHAPES)]


def all_scenes() -> list[Scene]:
    """Every scene of two different things, in lane 0."""
    pairs = itertools.permutations(THINGS, 2)
    return [Scene(a, relation, b) for (a, b), relation in itertools.product(pairs, RELATIONS)]


def split(seed: int) -> tuple[list[Scene], list[Scene]]:
    """(shown in training, held out). A picture has two descriptions; both are on one side."""
    opposite = dict(zip(RELATIONS, ("below", "above", "right of", "left of"), strict=True))
    once = [scene for scene in all_scenes() if scene.relation in ("above", "left of")]
    order = np.random.default_rng([seed, 7]).permutation(len(once))
    count = len(once) // HELD_OUT
    sides: tuple[list[Scene], list[Scene]] = ([], [])
    for place, number in enumerate(order):
        scene = once[number]
        mirrored = Scene(scene.second, opposite[scene.relation], scene.first)
        sides[place < count].extend([scene, mirrored])
    return sides


def crowd(rng: np.random.Generator, hidden: Container[Scene]) -> Cells:
    """A thing or nothing in every cell, each drawn for itself, but not all empty; neighbours that
    stand as in one of the `hidden` scenes (of lane 0) are drawn again."""
    while True:
        drawn = {place: THINGS[rng.integers(len(THINGS))] for place in PLACES}
        cells = {place: thing for place, thing in drawn.items() if rng.random() < CROWDED}
        if cells and not any(scene in hidden for scene in neighbours(cells)):
            return cells


def neighbours(cells: Cells) -> Iterator[Scene]:
    """Every two things in neighbouring cells as a scene of lane 0."""
    for (row, column), thing in cells.items():
        for relation, place in (("above", (row + 1, column)), ("left of", (row, column + 1))):
            if place in cells:
                yield Scene(thing, relation, cells[place])


def read_scene(picture_HWC: np.ndarray) -> dict[tuple[int, int], Thing | None]:
    """What stands in each cell by the pixels alone; None: something that is no thing. Cells without
    coloured pixels are left out."""
    cell = picture_HWC.shape[0] // 2
    names = list(COLOURS)
    palette = np.array([BACKGROUND, *COLOURS.values()], np.float64)
    found: dict[tuple[int, int], Thing | None] = {}
    for row, column in PLACES:
        part = picture_HWC[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        distances = np.linalg.norm(part[:, :, None].astype(np.float64) - palette, axis=-1)
        nearest = np.where(distances.min(-1) <= FAR, distances.argmin(-1), -1)
        drawn = nearest != 0
        if drawn.mean() < 0.05:
            continue
        counts = np.bincount(nearest[nearest > 0], minlength=len(palette))
        colour = int(counts.argmax())
        shares = {shape: _overlap(nearest == colour, mask_of(shape, cell)) for shape in SHAPES}
        best = max(shares, key=lambda shape: shares[shape])
        sure = counts[colour] > 0 and shares[best] >= SHARE
        found[row, column] = Thing(names[colour - 1], best) if sure else None
    return found


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def shows(picture_HWC: np.ndarray, scene: Scene) -> bool:
    """Whether a picture is the scene, in either lane: both things, their places, and no other."""
    found = read_scene(picture_HWC)
    lanes = (dataclasses.replace(scene, lane=lane) for lane in (0, 1))
    return any(found == lane.cells for lane in lanes)
