"""Attention: where in the picture each word of the prompt is looked at.

    python examples/walk/4_attention.py                 # writes walk/4_attention.png, in half a minute
    python examples/walk/4_attention.py --prompt "cat face" --prompt "green car"

How do words get into a picture? At each point of its feature maps the UNet asks a question, the query q; each token of
the prompt offers a key k and a value v. Where query and key agree, the value is taken:

    weights = softmax(q k^T / sqrt(d)),    answer = weights v                            Vaswani et al. 2017, eq. 1

The weights of a point are shares that sum to 1 over the tokens. Drawn as pictures, one for each token, they are
attention maps, as in Hertz et al. 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control". Self-attention
is the same among the points of the picture: who asks, and who answers, are both points.

Behind the words stands a token for the end, and copies of it up to the length that the text encoder takes: the padding.
It was read after the words, so it knows them all; much of what a prompt says goes through it.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from sdtune.models.attention import recorded_maps
from sdtune.opening import open_model
from sdtune.sample import draw_pictures

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompt", action="append", help="what to draw; may be given several times")
parser.add_argument("--steps", type=int, default=15, help="of sampling")
parser.add_argument("--out", type=Path, default=Path("walk/4_attention.png"))
settings = parser.parse_args()

prompts = settings.prompt or ["red apple", "panda face", "cup with straw"]
MIDDLE = "the middle (x)\ntakes from"
family = open_model("tiny", device=torch.device("cpu"))
unet, tokenizer = family.modules["unet"], family.tokenizers["tokenizer"]


def mean_map(calls: list[dict[str, Tensor]], kind: str) -> Tensor:
    """Over all steps, layers of the finest resolution, and heads: who (N) takes how much from whom (M), (N, M)."""
    found = [weights for call in calls for name, weights in call.items() if name.endswith(kind)]
    finest = max(weights.shape[2] for weights in found)  # of (1, heads, N, M) each
    return torch.cat([weights for weights in found if weights.shape[2] == finest]).mean(dim=(0, 1))


def draw(prompt: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The drawing, (H, W, 3), and by its name each map of attention, (h, w)."""
    height, width = family.picture_size()
    _, h, w = family.latent_shape(height, width)
    calls: list[dict[str, Tensor]] = []  # of each step of sampling: the weights of each layer, by its name
    with recorded_maps(unet) as maps:
        hook = unet.register_forward_hook(lambda *_: calls.append(dict(maps)))
        (drawn,) = draw_pictures(family, [prompt], [0], height=height, width=width, steps=settings.steps, guidance=1)
        hook.remove()
    words = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)[1:-1]
    text = mean_map(calls, "attn2").T.unflatten(1, (h, w))  # (M, h, w)
    found = {MIDDLE: mean_map(calls, "attn1").unflatten(1, (h, w))[(h // 2) * w + w // 2], "start": text[0]}
    found |= {f'"{word.removesuffix("</w>")}"': text[1 + i] for i, word in enumerate(words)}
    found["end, padding"] = text[1 + len(words) :].sum(dim=0)
    return torch.from_numpy(np.array(drawn)), found


rows = {prompt: draw(prompt) for prompt in prompts}
columns = 1 + max(len(found) for _, found in rows.values())
size = (1.6 * columns, 1.9 * len(rows) + 0.6)
figure, panels = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
figure.suptitle("Bright in the second column: what the middle takes from. In the others: who takes from this token")
for (prompt, (picture, found)), line in zip(rows.items(), panels, strict=True):
    shares = {name: map.mean().item() for name, map in found.items() if name != MIDDLE}
    print(f"{prompt}: {', '.join(f'{name} {100 * share:.0f} %' for name, share in shares.items())}")
    for panel in line:
        panel.axis("off")
    line[0].imshow(picture)
    line[0].set_title(prompt)
    for panel, (name, map) in zip(line[1:], found.items(), strict=False):
        panel.imshow(picture.float().mean(dim=-1), cmap="gray")
        panel.imshow(map, cmap="inferno", alpha=0.7, extent=(0, picture.shape[1], picture.shape[0], 0))
        panel.set_title(f"{name}\n{100 * shares[name]:.0f} %" if name in shares else name, fontsize="medium")
        if name not in shares:
            panel.plot(picture.shape[1] * 9 / 16, picture.shape[0] * 9 / 16, "wx")
settings.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(settings.out, dpi=80)
print(settings.out)
