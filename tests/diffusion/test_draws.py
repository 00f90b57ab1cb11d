"""Draws: pure, independent of order and of everything global."""

import pytest
import torch

from sdtune.diffusion import draws

KINDS = [
    lambda *key: draws.normal((3, 2), *key).tolist(),
    lambda *key: draws.uniform(*key),
    lambda *key: draws.integer(10**9, *key),
    lambda *key: draws.permutation(50, *key),
    lambda *key: torch.rand(4, generator=draws.generator(*key)).tolist(),
]


@pytest.mark.parametrize("draw", KINDS)
def test_a_draw_depends_on_its_names_alone(draw):
    names = [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0), (0, "a", 0, 0), (0, "a"), (0, "a", 10), (-1, "a", 0)]
    forward = [draw(*name) for name in names]
    torch.rand(7)
    backward = [draw(*name) for name in reversed(names)][::-1]
    assert forward == backward
    assert all(forward[i] != forward[j] for i in range(len(names)) for j in range(i))


@pytest.mark.parametrize("draw", KINDS)
def test_the_global_generator_is_neither_read_nor_changed(draw):
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), draw(5, "x", 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert draw(5, "x", 1) == first


def test_the_numbers_stay_as_they_are():
    """A change here changes every run that is repeated from its recipe."""
    assert draws.key(0, "noise", 1, 2) == 11877563320319208542
    assert draws.uniform(0, "crop", 3) == draws.key(0, "crop", 3) // 2**11 / 2**53


def test_tensors_and_numpy_numbers_name_the_same_draw():
    assert draws.key(torch.tensor(3), "a", torch.tensor(4)) == draws.key(3, "a", 4)


def test_distributions():
    uniform = torch.tensor([draws.uniform(0, "u", i) for i in range(4000)])
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.01
    counts = torch.bincount(torch.tensor([draws.integer(5, 0, "i", i) for i in range(5000)]), minlength=5)
    assert len(counts) == 5 and counts.min() > 900
    normal = draws.normal((100, 100), 0, "n")
    assert normal.dtype == torch.float32 and normal.device.type == "cpu"
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    with pytest.raises(ValueError, match="at least 1"):
        draws.integer(0, 0, "i")


@pytest.mark.parametrize("n", [0, 1, 2, 999])
def test_permutation_is_one(n):
    order = draws.permutation(n, 0, "p", 7)
    assert sorted(order) == list(range(n))
    assert n < 900 or order != sorted(order)


def test_seeded_globals_seeds_and_puts_back():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with draws.seeded_globals(0, "dropout", 5):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    with pytest.raises(KeyError), draws.seeded_globals(0, "dropout", 5):
        assert torch.equal(torch.rand(3), inside)
        raise KeyError
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(4)))
    with draws.seeded_globals(0, "dropout", 6):
        assert not torch.equal(torch.rand(3), inside)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seeded_globals_covers_the_gpu():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    with draws.seeded_globals(0, "dropout", 5):
        inside = torch.rand(3, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    with draws.seeded_globals(0, "dropout", 5):
        assert torch.equal(torch.rand(3, device="cuda"), inside)
