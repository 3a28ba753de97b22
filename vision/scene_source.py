"""Examples of drawn scenes, for `vision/batches.py`.

Letters: N images, P codes, C colours, H W pixels.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vision.batches import Example, draw_example, read_example, text_example
from vision.config import JanusConfig
from vision.images import prepare_to_draw, prepare_to_read
from vision.prompts import Conversations
from vision.scenes import Cells, Scene, crowd, draw_cells, split

AT_ONCE = 80
"""Pictures that become codes together."""


class SceneSource:
    """Scenes that training may see, as questions, captions and drawings; the others are kept for
    the end.

    Args:
      encode: codes [N, P] of images prepared for drawing, float32 [N, 3, H, W].
      drop: share of drawing examples that lose their words.
    """

    def __init__(
        self,
        seed: int,
        config: JanusConfig,
        talk: Conversations,
        encode: Callable[[np.ndarray], np.ndarray],
        drop: float,
    ):
        self._config, self.talk, self._encode, self._drop = config, talk, encode, drop
        self._shown, self.held_out = split(seed)
        self._hidden = frozenset(self.held_out)
        self._codes: dict[Scene, np.ndarray] = {}

    @property
    def paint_side(self) -> int:
        """Pixels along a side of a drawn image."""
        return self._config.drawn_grid * self._config.tokenizer.scale

    def to_draw(self, scene: Scene) -> np.ndarray:
        """The scene for the image tokenizer, float32 [3, H, W]."""
        return self._to_draw(scene.cells)

    def to_read(self, scene: Scene) -> np.ndarray:
        """The scene for the encoder, float32 [3, H, W]."""
        side = self._config.encoder.image_size
        return prepare_to_read(scene.draw(side), side)

    def image(self, rng: np.random.Generator) -> np.ndarray:
        """A random crowd for the image tokenizer, without what is held out."""
        return self._to_draw(crowd(rng, self._hidden))

    def _to_draw(self, cells: Cells) -> np.ndarray:
        return prepare_to_draw(draw_cells(cells, self.paint_side), self.paint_side)

    def draw(self, kind: str, rng: np.random.Generator) -> Example:
        """A random example of a kind."""
        scene = self._pick(rng)
        if kind == "text":
            return text_example(self.talk.tokenizer.encode_prompt(scene.caption))
        if kind == "read":
            said = [
                {"role": "user", "content": scene.question},
                {"role": "assistant", "content": scene.answer},
            ]
            return read_example(self.talk, said, (self.to_read(scene),), system="")
        if not self._codes:
            self._encode_all()
        blank = bool(rng.random() < self._drop)
        return draw_example(self.talk, scene.caption, self._codes[scene], blank)

    def _pick(self, rng: np.random.Generator) -> Scene:
        scene = self._shown[rng.integers(len(self._shown))]
        return dataclasses.replace(scene, lane=int(rng.integers(2)))

    def _encode_all(self) -> None:
        lanes = [dataclasses.replace(s, lane=lane) for s in self._shown for lane in (0, 1)]
        for first in range(0, len(lanes), AT_ONCE):
            some = lanes[first : first + AT_ONCE]
            padded = [*some, *[some[0]] * (AT_ONCE - len(some))]
            codes_NP = self._encode(np.stack([self.to_draw(scene) for scene in padded]))
            self._codes |= dict(zip(some, codes_NP, strict=False))
