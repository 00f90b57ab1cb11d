"""What a run keeps on disk, made before it trains: latents of its pictures, and embeddings of its captions.

FOLDER/latents-<fingerprint of the VAE>/     shards: mean and deviation, by the picture's bytes, frame and mirroring
FOLDER/text-<fingerprint of the encoders>/   shards: embeddings, by caption
FOLDER/pictures/                             digests of picture files, so that a file is read again only if it changed
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from sdtune.config import Recipe
from sdtune.data.contents import content_digests
from sdtune.data.examples import Known, nothing_known
from sdtune.data.filling import fill_latents, fill_text
from sdtune.data.picture import Picture
from sdtune.data.sources import Source
from sdtune.data.store import Store, Stores
from sdtune.data.views import Views
from sdtune.errors import UsageError
from sdtune.families.base import Family
from sdtune.families.fingerprints import fingerprint
from sdtune.tasks import DenoisingTask


def open_stores(recipe: Recipe, family: Family) -> Stores | None:
    """The stores of a model in `train.cache_dir`; None where the recipe names none.

    Raises:
        DataError: a shard is damaged. UsageError: the model is one for inpainting.
    """
    if recipe.train.cache_dir is None:
        return None
    if family.inpaints:
        raise UsageError(
            "train.cache_dir keeps what is encoded before the training, and an inpainting model is shown each picture "
            "with another part hidden, encoded anew; remove it with train.cache_dir=null"
        )
    folder = Path(recipe.train.cache_dir)
    text = fingerprint(family.text_fingerprint(), recipe.train.precision)
    return Stores(
        latents=Store(folder / f"latents-{family.latents_fingerprint()}", ("mean", "std")),
        text=Store(folder / f"text-{text}", ("text", "pooled")),
    )


def known_views(recipe: Recipe, stores: Stores | None, sources: Iterable[Source]) -> Known:
    """Tells which pictures need not be read; reads the bytes of those that are new or changed.

    Raises:
        DataError: a picture cannot be read.
    """
    if stores is None or recipe.train.cache_dir is None:
        return nothing_known
    pictures = (picture for source in sources for picture in source.pictures)
    digests = content_digests(pictures, Path(recipe.train.cache_dir) / "pictures")
    return Views(stores.latents, digests, recipe.images.background)


@torch.no_grad()
def fill_stores(
    stores: Stores,
    known: Known,
    task: DenoisingTask,
    views: Iterable[tuple[Picture, tuple[int, int], bool]],
    captions: Iterable[str],
) -> None:
    """Encode what the stores lack; processes share the work.

    Args:
        known: made by `known_views`, with all pictures of the views.
        task: encodes.
        views: pictures, each with its frame and whether it is mirrored.
        captions: they are left out where a text encoder learns.

    Raises:
        DataError: the disk is full, or a picture cannot be read.
    """
    assert isinstance(known, Views)
    fill_latents(stores.latents, (known.view(*view) for view in views), task.encode_pixels)
    if not task.text_learns:
        fill_text(stores.text, captions, task.embed)
