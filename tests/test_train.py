"""The loop and what it is made of, on a network of one parameter."""

import math

import pytest
import torch
from torch import nn

from sdtune.data.batches import Batch
from sdtune.errors import TrainingError
from sdtune.optimizers import make_optimizer
from sdtune.tasks import Draws
from sdtune.train import Ema, StepInfo, lr_factor, make_accelerator, train

STEPS = 20


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 6])
def test_learning_rate_is_that_of_transformers(schedule: str, warmup: int) -> None:
    from transformers import get_scheduler

    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    for step in range(STEPS):
        # In the warmup ours is one step ahead: theirs wastes the first step on a learning rate of 0.
        ahead = 1 if step < warmup else 0
        assert lr_factor(schedule, step, warmup, STEPS) == pytest.approx(expected[step + ahead], abs=1e-12)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="constant, linear and cosine, got polynomial"):
        lr_factor("polynomial", 0, 0, 10)


def test_ema_is_the_weighted_mean_of_what_the_parameters_were() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = Ema({"w": parameter}, decay=0.6)
    expected = 0.0
    for step in range(1, 30):
        parameter.data.fill_(math.sin(step))
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
    torch.testing.assert_close(ema.average["w"], torch.full((3,), expected))


def test_ema_and_parameters_change_places_and_back() -> None:
    parameter = nn.Parameter(torch.ones(2))
    ema = Ema({"w": parameter}, decay=0.9)
    parameter.data.fill_(5.0)
    ema.swap()
    assert parameter.tolist() == [1, 1] and ema.average["w"].tolist() == [5, 5]
    ema.swap()
    assert parameter.tolist() == [5, 5] and ema.average["w"].tolist() == [1, 1]


class Distance(nn.Module):
    """Losses (w - caption)^2, so that every number can be worked out by hand."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))

    def forward(self, batch: Batch, drawn: Draws) -> torch.Tensor:
        return (self.w - torch.tensor([float(caption) for caption in batch.captions])).square()


def batch(targets: list[float], weights: list[float] | None = None, instances: int | None = None) -> Batch:
    count = len(targets)
    return Batch(
        pixels=torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
        captions=[str(target) for target in targets],
        weights=torch.tensor(weights or [1.0] * count),
        instances=count if instances is None else instances,
        numbers=list(range(count)),
        keys=[""] * count,
        sizes=[(8, 8, 0, 0)] * count,
        frame=(8, 8),
    )


def run(batches: list[Batch], module: nn.Module | None = None, **settings: object) -> tuple[nn.Module, list[StepInfo]]:
    """Train with SGD of rate 0.1 on these batches, one a micro-batch."""
    module = module or Distance()
    optimizer = torch.optim.SGD([{"params": list(module.parameters()), "lr": 0.1, "base_lr": 0.1}])
    accelerator = make_accelerator("fp32")
    module, optimizer = accelerator.prepare(module, optimizer)
    options = {"start": 0, "steps": len(batches), "accumulate": 1, "factor": lambda step: 1.0, "clip": None}
    empty = Draws(torch.zeros(1))
    infos = list(train(module, optimizer, iter(batches), lambda b: empty, accelerator, **options | settings))
    return module, infos


def test_the_loss_of_pairs_is_the_published_one_of_two_halves() -> None:
    # mean(instance losses) + prior_loss_weight * mean(class losses), Ruiz et al. 2022 as diffusers trains it.
    prior = 0.3
    pairs = batch([1.0, 2.0, 4.0, 5.0], weights=[1.0, 1.0, prior, prior], instances=2)
    module, (info,) = run([pairs])
    w = torch.zeros((), requires_grad=True)
    published = (
        torch.stack([(w - 1) ** 2, (w - 2) ** 2]).mean() + prior * torch.stack([(w - 4) ** 2, (w - 5) ** 2]).mean()
    )
    published.backward()
    assert info.loss == pytest.approx(published.item())
    assert module.w.item() == pytest.approx(-0.1 * w.grad.item())
    assert info.samples == 2


def test_accumulated_batches_are_one_batch() -> None:
    weights = [1.0, 1.0, 0.5, 0.5]
    whole, (one,) = run([batch([1.0, 2.0, 4.0, 5.0, 7.0, 8.0, 0.5, 0.25], weights * 2, instances=4)])
    halves = [batch([1.0, 2.0, 4.0, 5.0], weights, instances=2), batch([7.0, 8.0, 0.5, 0.25], weights, instances=2)]
    parts, (two,) = run(halves, steps=1, accumulate=2)
    # the weights of the eight are laid out so that both ways weigh each picture alike
    assert two.loss == pytest.approx(one.loss) and parts.w.item() == pytest.approx(whole.w.item())
    assert two.samples == one.samples == 4


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_told() -> None:
    free, (loose,) = run([batch([3.0])])
    clipped, (info,) = run([batch([3.0])], clip=1.5)
    assert loose.grad_norm == info.grad_norm == pytest.approx(6.0)
    assert free.w.item() == pytest.approx(0.6)
    assert clipped.w.item() == pytest.approx(0.15, rel=1e-4)


def test_the_schedule_scales_each_groups_own_rate() -> None:
    module = nn.ModuleList([Distance(), Distance()])

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, some: Batch, drawn: Draws) -> torch.Tensor:
            return module[0](some, drawn) + module[1](some, drawn)

    accelerator = make_accelerator("fp32")
    groups = [([module[0].w], 1e-2), ([module[1].w], 1e-3)]
    optimizer = make_optimizer("adamw", groups, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    prepared, stepper = accelerator.prepare(Both(), optimizer)
    infos = train(
        prepared, stepper, iter([batch([1.0])]), lambda b: Draws(torch.zeros(1)), accelerator,
        start=0, steps=1, accumulate=1, factor=lambda step: 0.5, clip=None,
    )  # fmt: skip
    assert next(infos).lr == pytest.approx(5e-3)
    assert [part.w.item() for part in module] == pytest.approx([5e-3, 5e-4], rel=1e-3)  # Adam's first step is the rate


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    module = Distance()
    with pytest.raises(TrainingError, match="the loss of step 2 is nan.*optimizer.lr"):
        run([batch([1.0]), batch([math.nan])], module)
    assert math.isfinite(module.w.item())
