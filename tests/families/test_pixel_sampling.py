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


@pytest.mark.parametrize("sampler", [None, "ddpm", "dpm-solver++", "euler"])
def test_it_begins_with_a_picture(sampler: str | None) -> None:
    """A little strength leaves it as it is; as in x-space there is no autoencoder between."""
    family, picture = make_family("sample"), torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    picture[..., 8:20, 8:20] = 255
    options = QUICK | {"steps": 20, "sampler": sampler, "guidance": 1.0, "begun": picture}
    near, far = (
        np.asarray(next(iter(draw_pictures(family, ["1"], [0], **options, strength=strength)))).astype(float)
        for strength in (0.1, 1.0)
    )
    target = picture[0].permute(1, 2, 0).numpy()
    assert np.abs(near - target).mean() <= np.abs(far - target).mean()


def test_dynamic_thresholding_keeps_pixels_from_saturating() -> None:
    family = make_family("epsilon")  # untrained: its pictures are far beyond black and white
    options = QUICK | {"guidance": 1.0, "sampler": "ddim"}

    def saturated(quantile: float | None) -> float:
        drawn = draw_pictures(family, ["1"] * 4, [0, 1, 2, 3], **options, dynamic_thresholding=quantile)
        pixels = np.stack([np.asarray(picture) for picture in drawn])
        return float(((pixels == 0) | (pixels == 255)).mean())

    plain, thresholded = saturated(None), saturated(0.9)
    assert thresholded < plain


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
