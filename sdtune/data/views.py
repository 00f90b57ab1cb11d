"""Pictures in the frames that a model sees, known by their bytes and not by their names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdtune.data import images
from sdtune.data.contents import Identity, content_digest, picture_content
from sdtune.data.examples import KnownView
from sdtune.data.picture import Picture
from sdtune.data.store import Store
from sdtune.errors import DataError


@dataclass(frozen=True)
class View:
    """A picture as the model sees it where nothing is left to chance: cut out of the middle, mirrored or not.

    Attributes:
        picture: not yet read. content: digest of its bytes.
        frame: height and width in pixels.
        flip: whether it is mirrored.
        background: what shows through where it is transparent.
    """

    picture: Picture
    content: str
    frame: tuple[int, int]
    flip: bool
    background: str

    @property
    def key(self) -> str:
        """Equal for equal pixels, whatever the picture is called."""
        height, width = self.frame
        return f"{self.content}|{height}x{width}|{'mirrored' if self.flip else 'upright'}|{self.background}"

    def read(self) -> tuple[Tensor, tuple[int, int]]:
        """Pixels (3, H, W), uint8, and height and width of the whole picture.

        Raises:
            DataError: it cannot be read, or was changed just now.
        """
        content = picture_content(self.picture)
        name = f"{self.picture.origin}: {self.picture.name}" if isinstance(content, bytes) else content
        content = content if isinstance(content, bytes) else Path(content).read_bytes()
        if content_digest(content) != self.content:
            raise DataError(f"{name} was changed while the cache was filled; run the same command again.")
        rgb = images.open_rgb(content, self.background, name)
        return images.prepare(rgb, *self.frame, flip=self.flip), (rgb.height, rgb.width)


class Views:
    """The views of a data set's pictures, and which of them a store has: the `Known` of a training set.

    Args:
        store: of latents.
        digests: of the pictures' bytes.
        background: what shows through where they are transparent.
    """

    def __init__(self, store: Store, digests: Mapping[Identity, str], background: str) -> None:
        self.store, self.digests, self.background = store, digests, background

    def view(self, picture: Picture, frame: tuple[int, int], flip: bool) -> View:
        """One of a picture whose digest is known."""
        return View(picture, self.digests[picture.origin, picture.name], frame, flip, self.background)

    def __call__(self, picture: Picture, frame: tuple[int, int], flip: bool) -> KnownView | None:
        """See `Known`."""
        key = self.view(picture, frame, flip).key
        note = self.store.note(key)
        return KnownView(key, (note[0], note[1])) if note is not None else None
