"""The forward process: from data to noise, in one dimension, where everything can be seen.

    python examples/walk/1_forward.py                   # writes walk/1_forward.png, in a few seconds

Noise is added to data, more and more with the time t, until nothing of the data can be told. There is nothing to learn
in this direction: x_t is drawn in one step from x0, for any t. Two ways are usual:

    variance preserving   x_t = sqrt(alpha_bar_t) * x0 + sqrt(1 - alpha_bar_t) * eps      Ho et al. 2020, eq. 4
    variance exploding    x_t = x0 + sigma_t * eps                                       Song et al. 2021, section 3

The first shrinks the data while noise comes in, and ends at a standard normal, whatever the data were: the way of
Stable Diffusion. The second leaves the data where they are and buries them under noise of ever larger deviation: the
way of score models. Who can go back from the last column to the first, a little at a time, makes data from noise: that
is page 2.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from two_peaks import draw, noisy

from sdtune.diffusion.schedule import NoiseSchedule
from sdtune.diffusion.ve import VarianceExploding

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--samples", type=int, default=50_000)
parser.add_argument("--out", type=Path, default=Path("walk/1_forward.png"))
settings = parser.parse_args()

preserving = NoiseSchedule.from_config({"beta_schedule": "linear", "num_train_timesteps": 1000})
exploding = VarianceExploding(sigma=25)
generator = torch.Generator().manual_seed(0)
x0 = draw(settings.samples, generator)  # (N, 1)
eps = torch.randn(x0.shape, generator=generator)


def preserve(u: float) -> tuple[Tensor, float, float]:
    """x_t at the part u of the way, and how much signal and how much noise are in it."""
    t = torch.tensor(round(u * (len(preserving) - 1)))
    alpha_bar = preserving.alpha_bar[t].item()
    return preserving.add_noise(x0, eps, t.expand(len(x0))), alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def explode(u: float) -> tuple[Tensor, float, float]:
    """The same of the other process, whose time is u itself."""
    t = torch.tensor(u)
    return exploding.add_noise(x0, eps, t.expand(len(x0))), 1.0, exploding.std(t).item()


def distance(samples: Tensor, signal: float, noise: float) -> float:
    """The largest difference of the share of numbers below x, as drawn and as it must be (Kolmogorov, Smirnov)."""
    x = samples.flatten().sort().values
    return (noisy(signal, noise).cdf(x) - torch.linspace(0, 1, len(x))).abs().max().item()


ROWS: dict[str, Callable[[float], tuple[Tensor, float, float]]] = {
    "variance preserving": preserve,
    "variance exploding": explode,
}
PARTS = (0.0, 0.1, 0.25, 0.5, 1.0)

figure, panels = plt.subplots(len(ROWS), len(PARTS), figsize=(11, 4.8), layout="constrained")
figure.suptitle("Two peaks become one: what is drawn (grey) and the exact density (blue), from data to noise")
for (name, process), line in zip(ROWS.items(), panels, strict=True):
    for u, panel in zip(PARTS, line, strict=True):
        x_t, signal, noise = process(u)
        away = distance(x_t, signal, noise)
        print(f"{name}, {u:.2f} of the way: mean {x_t.mean():.2f}, deviation {x_t.std():.2f}, off by {away:.3f}")
        edge = max(2.5, 3.5 * noise)
        x = torch.linspace(-edge, edge, 400)
        panel.hist(x_t.flatten(), bins=80, range=(-edge, edge), density=True, color="0.8")
        panel.plot(x, noisy(signal, noise).log_prob(x).exp(), color="tab:blue")
        panel.set(xlabel="$x_t$", yticks=[])
        panel.set_title(f"{100 * u:.0f} % of the way\nsignal {signal:.2f}, noise {noise:.2f}", fontsize="medium")
    line[0].set_ylabel(name)
settings.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(settings.out, dpi=80)
print(settings.out)
