# %% [markdown]
# # A hundred pictures of COCO, and ten of them learned
#
# From COCO's files to a small data set, a look at it, a training on ten of its pictures with their captions, drawings
# before and after, and a folder that is ready for the Hub. The same steps stand in `coco_subset.py` and in the notebook
# `coco_subset.ipynb`.
#
#     python examples/coco_subset/coco_subset.py COCO                          # with the tiny base, on a CPU
#     python examples/coco_subset/coco_subset.py COCO --recipe lora_sd15       # on a GPU of 8 GB
#
# `COCO` is a folder with `train2017` and `annotations`, unpacked from `train2017.zip` and
# `annotations_trainval2017.zip` of <https://cocodataset.org/#download>.

# %%
import argparse
import json
import shutil
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from data_tools.coco import command as coco
from sdtune.config import load
from sdtune.data.images import open_rgb, prepare, to_float
from sdtune.data.metadata import read_rows, write_rows
from sdtune.evaluate import nearest, share
from sdtune.hub import push
from sdtune.opening import open_model
from sdtune.run import Run
from sdtune.sample import draw_pictures

parser = argparse.ArgumentParser(description="COCO to a small data set, to a model that has learned ten pictures")
parser.add_argument("coco", type=Path, nargs="?", default=Path("coco"), help="folder of train2017 and annotations")
parser.add_argument("--pictures", type=int, default=100, help="in the data set")
parser.add_argument("--learned", type=int, default=10, help="of them that are learned")
parser.add_argument("--recipe", default="full_tiny", help="a file, or a name of `sdtune recipes ls`")
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
parser.add_argument("--out", type=Path, default=Path("runs/coco_subset"), help="a new folder for all of it")
parser.add_argument("--push", metavar="USER/NAME", help="upload the result; without it, only write what would go up")
settings = parser.parse_args([] if "get_ipython" in globals() else None)  # a notebook has no command line

# %% [markdown]
# ## The data set
#
# `sdtune coco` reads COCO's captions, draws pictures by a seed and writes a folder in the `imagefolder` layout:
# pictures, and `metadata.jsonl` with one row a caption. COCO has five captions of a picture (six or seven of very few),
# so 100 pictures make 500 rows.

# %%
whole = settings.out / "pictures"
coco(
    captions=settings.coco / "annotations" / "captions_train2017.json",
    images=settings.coco / "train2017",
    out=whole,
    limit=settings.pictures,
)
rows = read_rows(whole)
print(json.dumps(rows[0]))

# %% [markdown]
# Ten of them become a data set of their own, with all their captions. A training takes another caption of a picture
# each time it comes by.

# %%
names = list(dict.fromkeys(row["file_name"] for row in rows))[: settings.learned]
ten = settings.out / "learned"
ten.mkdir()
for name in names:
    shutil.copyfile(whole / name, ten / name)
write_rows(ten, [row for row in rows if row["file_name"] in names])
captions = {row["file_name"]: row["text"] for row in reversed(rows) if row["file_name"] in names}  # the first of each
captions = {name: captions[name] for name in names}

# %% [markdown]
# ## A look at them
#
# As the model will see them: scaled and cut to the size that it was made for.


# %%
def sheet(lines: dict[str, list[np.ndarray]], file: str) -> None:
    """Pictures in lines with a name each, under their captions, as a figure and in a file."""
    size = (1.5 * len(names) + 1, 1.6 * len(lines) + 0.9)
    figure, panels = plt.subplots(len(lines), len(names), figsize=size, squeeze=False, layout="constrained")
    for (name, tiles), line in zip(lines.items(), panels, strict=True):
        for panel, tile in zip(line, tiles, strict=True):
            panel.imshow(tile)
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    for panel, caption in zip(panels[0], captions.values(), strict=True):
        panel.set_title(textwrap.fill(caption, 22, max_lines=4), fontsize=7)
    figure.savefig(settings.out / file, dpi=100)


def changes() -> list[str]:
    """What this training changes in the recipe."""
    return [
        f"data=[{{path: {json.dumps(str(ten))}}}]",
        f"output.dir={json.dumps(str(settings.out / 'run'))}",
        f"validate.samples.prompts={json.dumps(list(captions.values()))}",
        *settings.set,
    ]


recipe = load(settings.recipe, changes())
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
base = open_model(recipe.model.base, device=device)
height, width = base.picture_size()
pixels = torch.stack([prepare(open_rgb(ten / name), height, width) for name in names])  # (N, 3, H, W), uint8
photographs = list(pixels.permute(0, 2, 3, 1).numpy())  # (H, W, 3) each
sheet({"photograph": photographs}, "photographs.png")

# %% [markdown]
# A model draws through its VAE, so no drawing can be better than what the VAE gives back of a photograph. That of the
# tiny base has only ever seen emoji; those of Stable Diffusion keep all that one sees.

# %%
with torch.no_grad():
    mean, _ = base.encode_images(to_float(pixels.to(device)))  # (N, C, h, w)
    restored = base.decode_images(mean).cpu()  # (N, 3, H, W), about in [-1, 1]
kept = list(((restored / 2 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy())
del base  # the training needs its memory

# %% [markdown]
# ## Before
#
# What does the model draw for these captions now? The seeds are the same before and after, so that all that changes is
# the model.


# %%
def draw(model: str) -> list[np.ndarray]:
    """A picture for the first caption of each photograph, (H, W, 3)."""
    family, texts = open_model(model, device=device), list(captions.values())
    guidance = recipe.validation.samples.guidance  # as in the samples of the training
    drawn = draw_pictures(family, texts, range(len(texts)), height=height, width=width, guidance=guidance)
    return [np.asarray(picture) for picture in drawn]


before = draw(recipe.model.base)

# %% [markdown]
# ## Training
#
# The same as `sdtune train full_tiny data.0.path=...`; the loss of each step is in `run/metrics.jsonl`, the report with
# its curve and samples is `run/report.html`.

# %%
run = Run(recipe).complete()

# %% [markdown]
# ## After
#
# A drawing counts as right when, of the ten photographs, its own is the nearest to it: by chance that is one in ten.

# %%
after = draw(str(run))
sheet({"photograph": photographs, "through the VAE": kept, "before": before, "after": after}, "drawn.png")
right = {
    when: share(nearest(np.stack(drawn), np.stack(photographs)), list(range(len(names))))
    for when, drawn in (("before", before), ("after", after))
}
print(json.dumps({"pictures": len(set(row["file_name"] for row in rows)), "rows": len(rows), "right": right}))

# %% [markdown]
# ## To the Hub
#
# Weights, a card with the drawings and the code to load them, and the settings without anything personal. `--push
# USER/NAME` uploads the folder (log in before, with `hf auth login`); without it, have a look at what would go up.

# %%
pushed = push(run, settings.push or "your-name/coco-subset", dry_run=settings.push is None)
print(f"{pushed.url if settings.push else pushed.folder}: {', '.join(pushed.files)}")
