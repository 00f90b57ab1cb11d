"""Guidance: how much a prompt counts, as one number; and the whole of sampling as ten lines.

    python examples/walk/5_guidance.py                  # writes walk/5_guidance.png, in half a minute
    python examples/walk/5_guidance.py --prompt "cat face" --prompt "green car"

A model that was trained with some captions left out can be asked twice: what is the noise (here v), given the prompt,
and what is it, given none? Classifier-free guidance (Ho & Salimans 2022) goes from the second answer towards the first,
and beyond it:

    v = v_nothing + w * (v_prompt - v_nothing)

w = 0 draws anything, w = 1 what the prompt alone says, larger w what sets the prompt apart from all else: pictures fit
the prompt more and differ less, until colours glare and shapes break. What the model never saw, as a cat with wings,
no w brings out. Below each picture stands which of the 285 things that the tiny base knows is the nearest to it.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from sdtune.evaluate import load_thumbnails, nearest
from sdtune.opening import open_model
from sdtune.sample import initial_noise

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompt", action="append", help="what to draw; may be given several times")
parser.add_argument("--steps", type=int, default=25, help="of sampling")
parser.add_argument("--out", type=Path, default=Path("walk/5_guidance.png"))
settings = parser.parse_args()

SCALES = (0, 1, 2, 4, 8, 16)  # w
prompts = settings.prompt or ["red apple", "fish", "cat with wings"]
family = open_model("tiny", device=torch.device("cpu"))
names, known = load_thumbnails()  # the 285 things that it was trained on
torch.set_grad_enabled(False)


def draw(prompt: str, scales: tuple[int, ...], seed: int = 0) -> Tensor:
    """One picture for each w, all from the same noise: latents, (B, C, h, w)."""
    w = torch.tensor(scales).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    told, nothing = (family.encode_text([text] * len(scales)) for text in (prompt, ""))  # (B, L, D) each
    x = initial_noise(family, [seed] * len(scales), *family.picture_size())  # (B, C, h, w)
    sampler = family.sampler()
    sampler.set_timesteps(settings.steps)
    for t in sampler.timesteps:  # from 1000, all noise, to 0, none
        v_prompt, v_nothing = family.predict(x, t, told), family.predict(x, t, nothing)
        v = v_nothing + w * (v_prompt - v_nothing)
        x = sampler.step(v, t, x).prev_sample  # a little less noise
    return x


figure, panels = plt.subplots(len(prompts), len(SCALES), figsize=(9.2, 2 * len(prompts)), layout="constrained")
figure.suptitle("One noise, one prompt, guidance $w$ from none to far too much")
for prompt, line in zip(prompts, panels.reshape(len(prompts), -1), strict=True):
    pictures = family.decode_images(draw(prompt, SCALES))  # (B, 3, H, W), about in [-1, 1]
    tiles = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    found = [names[i] for i in nearest(tiles, known)]
    print(f"{prompt}: nearest to {', '.join(found)}")
    for panel, tile, name in zip(line, tiles, found, strict=True):
        panel.imshow(tile)
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(f"nearest: {name}", fontsize="small")
    line[0].set_ylabel(prompt, rotation=0, ha="right", va="center")
for panel, w in zip(panels.reshape(len(prompts), -1)[0], SCALES, strict=True):
    panel.set_title(f"w = {w}")
settings.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(settings.out, dpi=80)
print(settings.out)
