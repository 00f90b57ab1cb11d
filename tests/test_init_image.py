"""Image to image and inpainting with `sdtune sample`: as diffusers' own pipelines do it."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.diffusion import draws
from sdtune.errors import UsageError
from sdtune.families.schedulers import make_sampler
from sdtune.families.sdxl import StableDiffusionXL
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.init_image import read_pictures
from sdtune.sample import command, draw_pictures, encoded, initial_noise
from tests.factories import make_inpainting

SIZE = 32
QUICK: dict[str, Any] = {"height": SIZE, "width": SIZE, "steps": 5, "guidance": 2.0}


@pytest.fixture(scope="module")
def picture(photos: Path) -> torch.Tensor:
    return read_pictures(photos / "0.png", None, SIZE, SIZE)[0]


@pytest.mark.parametrize("sampler", [None, "ddpm", "dpm-solver++", "euler", "heun", "pndm"])
def test_it_is_what_diffusers_draws_from_the_same_noise(
    sampler: str | None, sd: Path, picture: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = StableDiffusion.load(str(sd))
    options = {"sampler": sampler, "begun": picture, "strength": 0.6}
    (ours,) = draw_pictures(family, ["a dog"], [3], **QUICK | options)

    parts: Any = family.pipeline()
    stock = diffusers.StableDiffusionImg2ImgPipeline(**parts.components)
    stock.scheduler = make_sampler(family.scheduler, sampler)
    stock.set_progress_bar_config(disable=True)
    x0, noise = encoded(family, picture, [3]), initial_noise(family, [3], SIZE, SIZE)
    answers = iter([noise])  # the first noise asked for is that of the beginning
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(answers))
    generator = draws.generator(3, "sampler noise")
    theirs = stock(
        "a dog", image=x0, strength=0.6, num_inference_steps=5, guidance_scale=2.0, generator=generator
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_less_strength_stays_nearer(kind: str, request: pytest.FixtureRequest, picture: torch.Tensor) -> None:
    base = str(request.getfixturevalue(kind))
    family: Any = StableDiffusion.load(base) if kind == "sd" else StableDiffusionXL.load(base)
    with torch.no_grad():
        back = family.decode_images(encoded(family, picture, [0])).clamp(-1, 1).add(1).mul(127.5)  # through the VAE
    target = back[0].permute(1, 2, 0).numpy()

    def distance(strength: float) -> float:
        (drawn,) = draw_pictures(family, ["a dog"], [0], **QUICK, begun=picture, strength=strength)
        return float(np.abs(np.asarray(drawn).astype(float) - target).mean())

    assert distance(0.2) < distance(1.0)


def test_the_command_begins_with_a_picture_of_any_shape(sd: Path, tmp_path: Path) -> None:
    Image.new("RGB", (70, 30), "red").save(tmp_path / "wide.png")
    options: dict[str, Any] = {"steps": 2, "init_image": tmp_path / "wide.png"}
    assert command(str(sd), ["a dog"], count=2, out=tmp_path / "out", height=24, width=40, **options) == 0
    with Image.open(tmp_path / "out" / "a-dog-1.png") as drawn:
        assert drawn.size == (40, 24)


@pytest.mark.parametrize("kind", [StableDiffusion, StableDiffusionXL])
def test_a_mask_hides_what_is_painted_anew(kind: Any, tmp_path: Path, photos: Path) -> None:
    base = make_inpainting(tmp_path / "base", "sdxl" if kind is StableDiffusionXL else "stable-diffusion")
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    pixels, hidden = read_pictures(photos / "0.png", tmp_path / "mask.png", SIZE, SIZE)
    assert hidden is not None and hidden[..., :16].min() == 255 and hidden[..., 16:].max() == 0
    (expected,) = draw_pictures(kind.load(str(base)), ["a dog"], [0], **QUICK, shown=(pixels, hidden))
    options: dict[str, Any] = QUICK | {"init_image": photos / "0.png", "mask": tmp_path / "mask.png"}
    command(str(base), ["a dog"], out=tmp_path / "whole", **options)
    with Image.open(tmp_path / "whole" / "a-dog-0.png") as drawn:
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1
    command(str(base), ["a dog"], out=tmp_path / "half", strength=0.4, **options)
    with Image.open(tmp_path / "half" / "a-dog-0.png") as drawn:
        assert not np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_what_does_not_go_together_is_refused_with_the_way_out(sd: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    picture = photos / "0.png"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mask": picture}, "--mask: there is no picture that it is for; name one with --init-image"),
        ({"strength": 0.5}, "--strength: there is no picture"),
        ({"init_image": tmp_path / "none.png"}, "--init-image: '.*none.png' does not exist"),
        ({"init_image": tmp_path / "text.png"}, "text.png cannot be read as a picture .*expected a picture"),
        ({"init_image": picture, "strength": 1.5}, "--strength: got 1.5, expected more than 0 and at most 1"),
        ({"init_image": picture, "mask": picture}, "--mask: this model cannot inpaint.*sdtune train inpainting"),
        ({"height": 30}, "got 30 x 64; expected multiples of 8, such as --height 24 --width 64"),
        ({"dynamic_thresholding": 0.995}, "dynamic thresholding keeps pixels .*latents of a VAE.*lower --guidance"),
    ]
    for options, match in cases:
        with pytest.raises(UsageError, match=match):
            command(str(sd), ["dog"], steps=2, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
