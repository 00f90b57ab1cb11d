"""Initial noise optimisation: subjects, scores, and noise of which both fall."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.config.shipped import resolve_asset
from sdtune.errors import UsageError
from sdtune.families.sdxl import StableDiffusionXL
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.init_noise import (
    Scorer,
    Settings,
    level_of,
    map_level,
    optimised_noise,
    scores,
    subjects_in,
    token_positions,
)
from sdtune.sample import command, draw_pictures
from tests.factories import make_sd

SHORT = Settings(rounds=1, steps=3, response=0.0)


@pytest.mark.parametrize(
    ("prompt", "subjects"),
    [
        ("a cat and a dog", ["cat", "dog"]),
        ("A photo of a red apple and the dog, in a garden", ["red apple", "dog", "garden"]),
        ("tiger with octopus", ["tiger", "octopus"]),
        ("a cat and a cat", ["cat"]),
        ("the", []),
    ],
)
def test_subjects_are_found_between_the_small_words(prompt: str, subjects: list[str]) -> None:
    assert subjects_in(prompt) == subjects


def test_their_tokens_stand_where_the_text_encoder_has_them() -> None:
    family = StableDiffusion.load(resolve_asset("tiny"), parts=["tokenizer", "text_encoder"])
    assert token_positions(family, "a red apple and a dog", "red apple") == [2, 3]
    assert token_positions(family, "a red apple and a dog", "dog") == [6]
    assert token_positions(family, "a goldfish and a Fish", "fish") == [7]  # not the end of gol d fish
    assert token_positions(family, "two  red\tapples, red apple", "red apple") == [7, 8]
    family.max_tokens = 150
    far = "a " * 30 + "dog"  # 30 tokens fit into a chunk of 32
    assert token_positions(family, far, "dog") == [32 + 1]
    with pytest.raises(UsageError, match="'cat' is not in the prompt 'a dog'"):
        token_positions(family, "a dog", "cat")
    with pytest.raises(UsageError, match="'dog' ends at token 61 of the prompt, of which 60 are read"):
        token_positions(family, "a " * 60 + "dog", "dog")


def test_which_layers_are_read() -> None:
    """16 x 16 of Stable Diffusion's 64 x 64, as the authors do; the finest where there are fewer positions."""
    assert map_level((64, 64), range(4)) == (2, (16, 16))
    assert map_level((64, 96), range(4)) == (2, (16, 24))
    assert map_level((8, 8), range(2)) == (0, (8, 8))
    assert map_level((64, 64), [0, 1]) == (1, (32, 32))  # of those that have attention
    assert map_level((8, 8), [1]) == (1, (4, 4))
    names = ["down_blocks.2.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.2", "up_blocks.3.x"]
    assert [level_of(name, 4) for name in names] == [2, 3, 2, 0]


def maps(first: int, second: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of 8 x 8 positions: two tokens of five are looked at from one place each, which look around them."""
    cross, itself = torch.full((64, 5), 0.2), torch.zeros(64, 64)
    for token, place in ((1, first), (3, second)):
        cross[place - 1 : place + 2, token] = 0.9
    for place in range(64):
        itself[place, max(0, place - 3) : place + 4] = 1 / 7
    return cross, itself


def test_the_scores_say_who_is_forgotten_and_who_is_in_the_way() -> None:
    words = range(1, 5)
    apart = scores(*maps(9, 54), (8, 8), [[1], [3]], words)
    together = scores(*maps(9, 9), (8, 8), [[1], [3]], words)
    assert apart[0] < 0.2 and apart[1] < 0.1
    assert together[1] == pytest.approx(0.5)
    forgotten = scores(*maps(9, 54), (8, 8), [[1], [2]], words)
    assert forgotten[0] > 0.6
    assert scores(*maps(9, 54), (8, 8), [[1]], words)[1] == 0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_both_scores_together_fall(kind: str, request: pytest.FixtureRequest) -> None:
    base = str(request.getfixturevalue(kind))
    family: Any = StableDiffusion.load(base) if kind == "sd" else StableDiffusionXL.load(base)
    options: dict[str, Any] = {"subjects": ["photo", "dog"], "settings": SHORT}
    (found,) = optimised_noise(family, ["a photo of dog"], [0], 32, 32, 999, **options)
    assert found.response + found.conflict < sum(found.before)
    assert 0.9 < found.noise.std() < 1.1 and not found.reached


def test_on_the_tiny_base_they_fall_and_what_stands_beside_does_not_matter() -> None:
    family = StableDiffusion.load(resolve_asset("tiny"))
    for network in family.modules.values():
        network.float().eval()
    prompts, options = ["a red apple and a dog", "a cat and a banana"], {"words_only": True, "settings": SHORT}
    found = optimised_noise(family, prompts, [3, 4], 64, 64, 999, **options)  # type: ignore[arg-type]
    for each in found:
        assert each.response + each.conflict < sum(each.before) - 0.005
    (alone,) = optimised_noise(family, prompts[1:], [4], 64, 64, 999, **options)  # type: ignore[arg-type]
    assert torch.allclose(alone.noise, found[1].noise, atol=1e-4)


def test_the_command_draws_with_it(sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"steps": 2, "height": 32, "width": 32}
    command(
        str(sd), ["a photo of dog"], out=tmp_path, init_noise_optimization=True, subjects="photo, dog", **options
    )  # fmt: skip
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert re.search(r"initial noise: \d of 1 met both bars \(response 0\.", capsys.readouterr().err)
    (plain,) = draw_pictures(StableDiffusion.load(str(sd)), ["a photo of dog"], [0], **options)
    assert (np.asarray(plain) != np.asarray(Image.open(next(tmp_path.glob("*.png"))))).any()


def test_of_the_levels_of_stable_diffusion_the_authors_is_read(tmp_path: Path) -> None:
    """Its layout at full depth, in narrow: 64 x 64 latents, attention on three levels and in the middle."""
    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    layout = {"block_out_channels": [32] * 4, "down_block_types": down, "up_block_types": up, "layers_per_block": 2}
    family = StableDiffusion.load(str(make_sd(tmp_path / "base", sample_size=64, **layout)))
    scorer = Scorer(family, ["a photo of dog"], ["photo", "dog"], 128, 128, 999)
    read = [name for name, _ in scorer.unet.named_modules() if name.endswith("attn2") and scorer.read(name)]
    assert [name.partition(".attn")[0][:13] for name in read] == ["down_blocks.2"] * 2 + ["up_blocks.1.a"] * 3
    with torch.no_grad():
        ((response, conflict),) = scorer(torch.randn(1, 4, 64, 64))
    assert 0 < response < 1 and 0 < conflict <= 0.5


def test_the_level_that_has_attention_is_read(tmp_path: Path) -> None:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    family = StableDiffusion.load(str(make_sd(tmp_path / "base", down_block_types=down, up_block_types=up)))
    scorer = Scorer(family, ["a photo of dog"], ["photo", "dog"], 64, 64, 999)
    with torch.no_grad():
        ((response, conflict),) = scorer(torch.randn(1, *family.latent_shape(64, 64)))
    assert 0 < response < 1 and 0 < conflict <= 0.5


def test_what_it_is_not_for_is_refused(sd: Path, photos: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"subjects": "dog"}, "--subjects: is read with --init-noise-optimization only"),
        ({"init_noise_optimization": True, "init_image": photos / "0.png"}, "is not made of noise alone"),
        ({"init_noise_optimization": True, "subjects": "cat"}, "'cat' is not in the prompt"),
    ]
    for options, match in cases:
        with pytest.raises(UsageError, match=match):
            command(str(sd), ["a dog"], steps=2, out=tmp_path / "out", **options)
    with pytest.raises(UsageError, match="no subject found in 'the'; name some with --subjects"):
        command(str(sd), ["the"], steps=2, out=tmp_path / "out", init_noise_optimization=True)
    assert not (tmp_path / "out").exists()
