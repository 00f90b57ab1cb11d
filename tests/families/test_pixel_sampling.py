"""What `sdtune sample` does with models of pixels: samplers, a picture to begin with, dynamic thresholding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune import building
from sdtune.errors import UsageError
from sdtune.families.pixel import Pixel
from sdtune.families.schedulers import make_sampler
from sdtune.models import DENOISERS
from sdtune.sample import command, draw_pictures

SCORE_UNET: dict[str, Any] = {"widths": [8, 8, 16, 16], "embedding": 16}
SMALL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("score_concat", "score_add"), SCORE_UNET),
    "score_attention": SCORE_UNET | {"heads": 2},
    "resnet_decoder": {"width": 8, "groups": 4},
    "segnet": {"widths": [8, 12, 16], "groups": 4},
    "unet": {"widths": [8, 16], "attention": [False, True], "head_width": 8, "context": 12, "groups": 4},
}
QUICK: dict[str, Any] = {"height": 28, "width": 28, "steps": 5}


def make_family(prediction: str, kind: str = "score_concat", **scheduler: Any) -> Pixel:
    denoiser = {"kind": kind, "size": 28, "channels": 1, "classes": ["0", "1"], **SMALL[kind]}
    return Pixel.from_config({"denoiser": denoiser, "scheduler": {"prediction_type": prediction, **scheduler}}, seed=0)


def pixels(family: Pixel, **options: Any) -> np.ndarray:
    """What it draws of "1" and of "0", (2, H, W, 3)."""
    drawn = draw_pictures(family, ["1", "0"], [0, 1], **QUICK | options)
    return np.stack([np.asarray(picture, dtype=float) for picture in drawn])


@pytest.mark.parametrize("scheduler", [{"prediction": "ve_score"}, {"prediction": "ve_score", "data_std": 0.3},
                                       {"prediction": "v_prediction"}])  # fmt: skip
@pytest.mark.parametrize("kind", DENOISERS)
def test_in_half_precision_as_on_a_gpu_it_draws_the_same(kind: str, scheduler: dict[str, Any]) -> None:
    half, whole = (make_family(**scheduler, kind=kind) for _ in range(2))
    building.place(half, torch.device("cpu"), torch.float16)
    assert half.modules["denoiser"].dtype == torch.float16
    off = np.abs(pixels(half, guidance=2.0) - pixels(whole, guidance=2.0)).mean()
    assert off < (50 if kind == "segnet" else 1)  # untrained, its maxima change their places with every rounding


def test_guidance_goes_on_from_the_negative_prompt_to_the_prompt() -> None:
    family, noise = make_family("ve_score"), torch.randn(1, 1, 28, 28)
    pipeline: Any = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def drawn(prompt: str, guidance: float) -> torch.Tensor:
        asked, none = (family.encode_text([text]).text for text in (prompt, ""))
        words = {"prompt_embeds": asked, "negative_prompt_embeds": none}
        options: dict[str, Any] = {"latents": noise, "generator": [torch.Generator()], "guidance_scale": guidance}
        return pipeline(**words, **options, num_inference_steps=1).images  # one step is linear in the score

    asked, plain = drawn("1", 1.0), drawn("", 1.0)
    assert not torch.allclose(asked, plain, atol=1e-3)
    torch.testing.assert_close(drawn("1", 3.0), plain + 3 * (asked - plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", [None, "ddpm", "dpm-solver++", "euler"])
def test_it_begins_with_a_picture(sampler: str | None) -> None:
    """A network that finds no noise in anything leaves the picture as it is, beneath the noise that strength adds."""
    family, picture = make_family("epsilon"), torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    picture[..., 8:20, 8:20] = 255
    for parameter in family.modules["denoiser"].to_picture.parameters():
        parameter.data.zero_()
    options: dict[str, Any] = {"steps": 20, "sampler": sampler, "begun": picture}
    near, far = (
        np.abs(pixels(family, **options, strength=strength) - picture.permute(0, 2, 3, 1).numpy()).mean()
        for strength in (0.05, 1.0)
    )
    assert near < 25 < 90 < far


def test_dynamic_thresholding_keeps_pixels_from_saturating() -> None:
    family = make_family("epsilon")  # untrained: its pictures are far beyond black and white
    options = QUICK | {"guidance": 1.0, "sampler": "ddim"}

    def saturated(quantile: float | None) -> float:
        drawn = draw_pictures(family, ["1"] * 4, [0, 1, 2, 3], **options, dynamic_thresholding=quantile)
        pixels = np.stack([np.asarray(picture) for picture in drawn])
        return float(((pixels == 0) | (pixels == 255)).mean())

    plain, thresholded = saturated(None), saturated(0.9)
    assert thresholded < plain


SMALLEST = {"score_concat": 25, "segnet": 8, "unet": 1, "resnet_decoder": 1}


@pytest.mark.parametrize(("kind", "smallest"), SMALLEST.items())
def test_the_smallest_picture_is_drawn_and_a_smaller_one_refused(kind: str, smallest: int, tmp_path: Path) -> None:
    family = make_family("v_prediction", kind)
    family.save(tmp_path / "model")
    assert pixels(family, height=smallest, width=smallest + 3).shape == (2, smallest, smallest + 3, 3)
    if smallest > 1:
        with pytest.raises(UsageError, match=f"--width: got 28 x {smallest - 1}, .*sides of {smallest} or"):
            command(str(tmp_path / "model"), ["1"], out=tmp_path / "out", width=smallest - 1)


def test_ddim_thresholds_the_picture_and_the_noise_with_it() -> None:
    """DDIM as published, on the thresholded x0: what is taken from the picture's excess goes to the noise's part."""
    family, noise = make_family("v_prediction"), torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    sampler = make_sampler(family.scheduler, "ddim", 0.9)
    sampler.set_timesteps(5)
    alpha_bar = [*sampler.alphas_cumprod[sampler.timesteps].tolist(), sampler.alphas_cumprod[0].item()]
    words, x_t = family.encode_text(["1"]), noise
    for i, t in enumerate(sampler.timesteps):
        signal, noisy = alpha_bar[i] ** 0.5, (1 - alpha_bar[i]) ** 0.5
        x0 = signal * x_t - noisy * family.predict(x_t, t.expand(1), words).detach()
        s = x0.abs().quantile(0.9).clamp(min=1)
        x0 = x0.clamp(-s, s) / s
        eps = (x_t - signal * x0) / noisy
        x_t = alpha_bar[i + 1] ** 0.5 * x0 + (1 - alpha_bar[i + 1]) ** 0.5 * eps
    options: dict[str, Any] = {"sampler": "ddim", "guidance": 1.0, "dynamic_thresholding": 0.9, "noise": noise}
    (drawn,) = draw_pictures(family, ["1"], [0], **QUICK | options)
    expected = ((x_t[0, 0] + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(np.asarray(drawn)[..., 0] - expected).max() <= 1


def test_a_prompt_that_is_not_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"denoiser": {"kind": "score_concat", **SCORE_UNET}, "scheduler": {"prediction_type": "ve_score"}}
    Pixel.from_config(config, seed=0).save(tmp_path / "model")
    for prompt, told in (("7", "'7' is not read: this model knows no classes"), ("", "")):
        command(str(tmp_path / "model"), [prompt], steps=1, out=tmp_path / "out")
        assert told in (words := capsys.readouterr().err) and bool(told) == ("not read" in words)


def test_a_score_model_refuses_what_it_cannot(tmp_path: Path) -> None:
    make_family("ve_score").save(tmp_path / "model")
    Image.new("RGB", (28, 28)).save(tmp_path / "picture.png")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dynamic_thresholding": 0.9}, "ScoreSampler has none; leave it out with this model"),
        ({"init_image": tmp_path / "picture.png"}, "a score model begins in noise alone"),
        ({"init_noise_optimization": True}, "attends to each word of its prompt; expected a model of text to image"),
    ]
    for options, match in cases:
        with pytest.raises(UsageError, match=match):
            command(str(tmp_path / "model"), ["1"], steps=2, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
