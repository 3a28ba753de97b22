"""What generate.py reads and draws images by."""

import dataclasses
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Images that are read or drawn; models like Janus-Pro alone have them."""

    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """An image that every prompt is about; may be given again. Prompts are put into the published
    conversation."""
    draw: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Draw images of this description instead of writing text; may be given again."""
    draw_ids: str = ""
    """The description as token ids, 1,2,3, begin-of-image last. Needs no tokenizer."""
    images: int = 1
    """Images of every description."""
    out: Path | None = None
    """Folder for the images, PNG files and a contact sheet."""
    guidance: float = 5.0
    """How far drawing goes from what is likely at all to what the description asks for; 1: as far
    as the model itself."""
    greedy: bool = False
    """Draw the most likely code every time."""
    ids_out: Path | None = None
    """Where the codes go, .npy of int32 [images, codes]."""
    pixels_out: Path | None = None
    """Where the decoded pixels go, .npy of float32 [images, 3, H, W], about -1 .. 1."""

    @property
    def draws(self) -> bool:
        """Whether images are drawn."""
        return bool(self.draw or self.draw_ids)

    def check(self, prompts: bool) -> None:
        """Raise ValueError for options that would be without effect, or contradict each other."""
        if self.draw and self.draw_ids:
            raise ValueError("--draw-ids is a single description; leave out --draw or it")
        if self.draws and (self.image or prompts):
            raise ValueError("--draw makes images; leave out --image and --prompt, or --draw")
        if self.draws and not (self.out or self.ids_out or self.pixels_out):
            raise ValueError("say where drawn images go: --out DIR, --ids-out or --pixels-out FILE")
        if self.images < 1:
            raise ValueError(f"--images is {self.images}; give at least 1")
        drawing = ("images", "out", "guidance", "greedy", "ids_out", "pixels_out")
        plain = ImageOptions()
        given = [name for name in drawing if getattr(self, name) != getattr(plain, name)]
        if given and not self.draws:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"{names}: nothing is drawn; add --draw TEXT")
        for name, path in (("ids-out", self.ids_out), ("pixels-out", self.pixels_out)):
            if path is not None and path.suffix != ".npy":
                raise ValueError(f"--{name} {path}: the name must end in .npy")
