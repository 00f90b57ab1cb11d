"""The network: what the UNet of the tiny base sees in noise, and what its skips carry.

    python examples/walk/3_unet.py                      # writes walk/3_unet.png, in a few seconds
    python examples/walk/3_unet.py --name "cat face"

The network is asked for the noise, or for v (Salimans & Ho 2022), which says the same: with the noise known, what is
left is the network's guess of the clean latents,

    x0 = sqrt(alpha_bar) * x_t - sqrt(1 - alpha_bar) * v

A UNet (Ronneberger et al. 2015) halves the resolution on its way down, so that each point comes to see the whole
picture, and doubles it on its way up. What was fine is lost at the bottom; so each level of the way down hands its
feature maps over to the way up: the skips. Here they are cut, one resolution at a time. (The tiny base works on
latents of 8 x 8 points, each of which stands for 8 x 8 pixels; Stable Diffusion on 64 x 64.)
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from sdtune.data.images import to_float
from sdtune.diffusion import draws
from sdtune.evaluate import load_thumbnails
from sdtune.opening import open_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--name", default="red apple", help="one of the 285 things that the tiny base draws")
parser.add_argument("--out", type=Path, default=Path("walk/3_unet.png"))
settings = parser.parse_args()

TIMES = (100, 300, 500, 700, 900)
family = open_model("tiny", device=torch.device("cpu"))
unet, schedule = family.modules["unet"], family.schedule
torch.set_grad_enabled(False)

names, pictures = load_thumbnails()
pixels = to_float(torch.tensor(pictures[names.index(settings.name)]).permute(2, 0, 1)[None])  # (1, 3, H, W) in [-1, 1]
x0, _ = family.encode_images(pixels)  # (1, C, h, w): the VAE's latents
t = torch.tensor(TIMES)  # (B,)
x0 = x0.expand(len(t), -1, -1, -1)  # (B, C, h, w)
eps = draws.normal(x0.shape[1:], 0, "noise").expand_as(x0)  # the same noise at each t
x_t = schedule.add_noise(x0, eps, t)
text = family.encode_text([settings.name] * len(t)).text  # (B, L, D)
nothing = family.encode_text([""] * len(t)).text


def clean(v: Tensor) -> Tensor:
    """The guess of x0 that follows from the network's answer."""
    alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v


# The skips are what the way down hands over: the first convolution's answer, and all feature maps of each block.
skips: list[Tensor] = []
hooks = [unet.conv_in.register_forward_hook(lambda network, inputs, answer: skips.append(answer))]
for block in unet.down_blocks:
    hooks.append(block.register_forward_hook(lambda network, inputs, answer: skips.extend(answer)))
guess = clean(unet(x_t, t, text).sample)
for hook in hooks:
    hook.remove()
print("skips:", ", ".join(f"{skip.shape[1]} maps of {skip.shape[2]} x {skip.shape[3]}" for skip in skips))


def without_skips(size: int) -> Tensor:
    """The guess when the skips of size x size carry nothing: what is added to them takes them away."""
    cut = [-skip if skip.shape[-1] == size else torch.zeros_like(skip) for skip in skips]
    return clean(unet(x_t, t, text, down_block_additional_residuals=cut).sample)


sizes = sorted({skip.shape[-1] for skip in skips}, reverse=True)
rows = {
    "what the network is shown": x_t,
    f'its guess, told "{settings.name}"': guess,
    "its guess, told nothing": clean(unet(x_t, t, nothing).sample),
    **{f"told, the {size}×{size} skips cut": without_skips(size) for size in sizes},
}

figure, panels = plt.subplots(len(rows), len(t), figsize=(9.2, 1.75 * len(rows)), layout="constrained")
figure.suptitle("From more and more noise (left to right), what is the clean picture?")
for (name, latents), line in zip(rows.items(), panels, strict=True):
    errors = (latents - x0).square().mean(dim=(1, 2, 3))  # (B,)
    print(f"{name}: error", " ".join(f"{error:.3f}" for error in errors))
    tiles = (family.decode_images(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)  # (B, H, W, 3) in [0, 1]
    for panel, tile, error in zip(line, tiles, errors, strict=True):
        panel.imshow(tile)
        panel.set(xticks=[], yticks=[], xlabel=f"error {error:.3f}")
    line[0].set_ylabel(textwrap.fill(name, 16), rotation=0, ha="right", va="center")
for panel, time in zip(panels[0], TIMES, strict=True):
    panel.set_title(f"t = {time}\nsignal {100 * schedule.alpha_bar[time]:.0f} %")
settings.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(settings.out, dpi=80)
print(settings.out)
