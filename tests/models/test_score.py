"""The score networks: sizes, skips, classes, and what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune.errors import WeightsError
from sdtune.models.score import GaussianFourierFeatures, ScoreAdd, ScoreConcat

SMALL: dict[str, Any] = {"widths": [8, 8, 16, 16], "embedding": 16}


def test_features_are_waves_of_the_time() -> None:
    features = GaussianFourierFeatures(6, scale=2.0)
    t = torch.tensor([0.0, 0.3])
    answer = features(t)
    assert answer.shape == (2, 6) and not list(features.parameters())
    torch.testing.assert_close(answer[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(answer[1, 0], (2 * torch.pi * 0.3 * features.frequencies[0]).sin())


@pytest.mark.parametrize(("kind", "parameters"), [(ScoreConcat, 1_115_297), (ScoreAdd, 1_022_849)])
def test_as_published_they_have_a_million_parameters(kind: Any, parameters: int) -> None:
    network = kind()
    assert sum(p.numel() for p in network.parameters()) == parameters
    seen: list[tuple[int, ...]] = []
    for level in [*network.down, *network.up]:
        level.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    assert network(torch.randn(2, 1, 28, 28), torch.rand(2)).shape == (2, 1, 28, 28)
    assert seen == [
        *((32, 26, 26), (64, 12, 12), (128, 5, 5), (256, 2, 2)),
        *((128, 5, 5), (64, 12, 12), (32, 26, 26)),
    ]


@pytest.mark.parametrize("kind", [ScoreConcat, ScoreAdd])
@pytest.mark.parametrize("size", [(28, 28), (25, 25), (64, 32), (33, 26)])
def test_any_size_comes_back(kind: Any, size: tuple[int, int]) -> None:
    network = kind(channels=3, **SMALL)
    assert network(torch.randn(1, 3, *size), torch.rand(1)).shape == (1, 3, *size)


def test_pictures_that_are_too_small_are_refused() -> None:
    with pytest.raises(WeightsError, match="got a size of 24, expected 25 or more"):
        ScoreConcat(size=24)


@pytest.mark.parametrize("kind", [ScoreConcat, ScoreAdd])
def test_every_parameter_learns_and_samples_do_not_see_each_other(kind: Any) -> None:
    network = kind(classes=["a", "b"], **SMALL)
    x_t, t, labels = torch.randn(3, 1, 28, 28), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    network(x_t, t, labels).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    with torch.no_grad():
        together, alone = network(x_t, t, labels), network(x_t[1:2], t[1:2], labels[1:2])
        torch.testing.assert_close(together[1:2], alone)
        assert not torch.allclose(alone, network(x_t[1:2], t[1:2], labels[:1]))
        assert not torch.allclose(alone, network(x_t[1:2], t[:1], labels[1:2]))
        torch.testing.assert_close(network(x_t[2:], t[2:]), together[2:])  # no labels: none of the classes


def test_what_is_saved_answers_the_same(tmp_path: Path) -> None:
    network = ScoreConcat(**SMALL)
    network.save_pretrained(tmp_path)
    opened = ScoreConcat.from_pretrained(tmp_path)
    x_t, t = torch.randn(1, 1, 28, 28), torch.rand(1)
    torch.testing.assert_close(opened(x_t, t), network(x_t, t))
