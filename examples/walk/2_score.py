"""The score: the arrow that leads from noise back to data. Learned by a small network, held against the truth.

    python examples/walk/2_score.py                     # writes walk/2_score.png, in half a minute

The score of x_t is the slope of its log density, d/dx log p_t(x): positive where larger numbers are more likely,
negative where smaller ones are. Who knows it at every t can turn noise into data by small steps along it.

Nobody knows the density of pictures. But a network that is shown x_t = sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * eps
and asked for eps, with the mean squared error as its loss, ends up at the mean of all eps that could have led to this
x_t, and that is the score in other units:

    score(x_t, t) = -eps(x_t, t) / sqrt(1 - alpha_bar_t)

That is denoising score matching (Vincent 2011), and every training of a diffusion model is just this.

Sampling starts at noise and goes backwards. With fresh noise at each step (the reverse SDE; DDPM, Ho et al. 2020) or
without any (the probability flow ODE; DDIM, Song et al. 2021): single paths differ, the distribution at the end is one.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from matplotlib import pyplot as plt
from torch import Tensor, nn
from two_peaks import draw, noisy, true_score

from sdtune.diffusion.objectives import denoising_loss
from sdtune.diffusion.schedule import NoiseSchedule
from sdtune.models.layers import sinusoid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=4000, help="of training")
parser.add_argument("--samples", type=int, default=4000)
parser.add_argument("--out", type=Path, default=Path("walk/2_score.png"))
settings = parser.parse_args()

SCHEDULE = {"beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": False}  # Ho et al. 2020
LEVELS = (100, 300, 600)  # the t at which the score is shown
schedule = NoiseSchedule.from_config(SCHEDULE)
generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)


class Denoiser(nn.Module):
    """(x_t, t) -> eps: a network of four layers. x_t: (B, 1), t: (B,)."""

    def __init__(self, width: int = 128, waves: int = 64) -> None:
        super().__init__()
        self.waves = waves
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(1 + waves, width), nn.SiLU(), *hidden, nn.Linear(width, 1))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x_t, sinusoid(t, self.waves)], dim=1))  # (B, 1)


# Training: the loop of every diffusion model.
network = Denoiser()
optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
for _ in range(settings.steps):
    x0 = draw(512, generator)  # (B, 1)
    eps = torch.randn(x0.shape, generator=generator)
    t = torch.randint(len(schedule), (len(x0),), generator=generator)  # (B,)
    loss = denoising_loss(network, x0, eps, t, schedule).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()


def levels(t: int) -> tuple[float, float]:
    """How much signal and how much noise are in x_t."""
    alpha_bar = schedule.alpha_bar[t].item()
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


@torch.no_grad()
def learned_score(x: Tensor, t: int) -> Tensor:
    """The network's answer as a score. x: (B, 1)."""
    return -network(x, torch.full((len(x),), t)) / levels(t)[1]


# How far is it from the truth, where the data are?
for t in LEVELS:
    x = noisy(*levels(t)).sample((5000, 1))
    truth = true_score(x, *levels(t))
    error = (learned_score(x, t) - truth).square().mean() / truth.square().mean()
    print(f"score at t = {t}: {100 * error.sqrt().item():.1f} % away from the true one")


@torch.no_grad()
def paths(sampler: DDPMScheduler | DDIMScheduler, count: int, steps: int = 200) -> Tensor:
    """Numbers on their way from noise to data. Shape (steps + 1, count)."""
    sampler.set_timesteps(steps)
    x = torch.randn(count, 1, generator=generator)
    way = [x]
    for t in sampler.timesteps:
        x = sampler.step(network(x, t.expand(count)), t, x, generator=generator).prev_sample
        way.append(x)
    return torch.cat(way, dim=1).T


ways = {
    "with fresh noise at each step (reverse SDE, DDPM)": paths(DDPMScheduler(**SCHEDULE), settings.samples),
    "without (probability flow ODE, DDIM)": paths(DDIMScheduler(**SCHEDULE), settings.samples),
}
asked = draw(100_000, generator)
print(f"data: mean {asked.mean():.2f}, deviation {asked.std():.2f}, near +1 {(asked > 0).float().mean():.2f}")
for name, way in ways.items():
    end = way[-1]
    print(f"{name}: mean {end.mean():.2f}, deviation {end.std():.2f}, near +1 {(end > 0).float().mean():.2f}")

# The figure: above the score at three t, below the way back.
figure = plt.figure(figsize=(11, 7.2), layout="constrained")
above, below = figure.subfigures(2, 1, hspace=0.06)
above.suptitle("The score points to the data: positive where they lie at larger $x_t$, negative where at smaller")
for panel, t in zip(above.subplots(1, 3), LEVELS, strict=True):
    x = torch.linspace(-2.5, 2.5, 400)[:, None]  # (400, 1)
    density = noisy(*levels(t)).log_prob(x).exp()
    truth = true_score(x, *levels(t))
    panel.fill_between(x[:, 0], density[:, 0] / density.max() * truth.max(), color="0.9", label="density (any units)")
    panel.axhline(0, color="0.7", linewidth=0.8)
    panel.plot(x, truth, color="tab:blue", linewidth=4, alpha=0.4, label="true score")
    panel.plot(x, learned_score(x, t), color="black", linestyle="--", label="learned score")
    panel.set(title=f"t = {t}: noise of deviation {levels(t)[1]:.2f}", xlabel="$x_t$", ylabel="score")
panel.legend(fontsize="small")
below.suptitle("The way back: 40 paths from noise (left) to data (right), coloured by their end; beside them, all ends")
panels = below.subplots(1, 4, width_ratios=(3, 1, 3, 1), sharey=True)
for (name, way), panel, end in zip(ways.items(), panels[::2], panels[1::2], strict=True):
    t = torch.linspace(len(schedule), 0, len(way))
    for path in way.T[:40]:
        panel.plot(t, path, linewidth=0.6, color="tab:blue" if path[-1] > 0 else "tab:orange")
    panel.set_title(name, fontsize="medium")
    panel.set(xlabel="t: how much noise", ylabel="$x_t$", xlim=(len(schedule), 0), ylim=(-3, 3))
    x = torch.linspace(-3, 3, 400)
    end.hist(way[-1], bins=80, range=(-3, 3), density=True, orientation="horizontal", color="0.75", label="samples")
    end.plot(noisy(1, 0).log_prob(x).exp(), x, color="tab:blue", label="data")
    end.set(xlabel="density", xticks=[])
end.legend(fontsize="small")
settings.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(settings.out, dpi=90)
print(settings.out)
