"""What `sdtune sample` does with models of pixels: samplers, a picture to begin with, dynamic thresholding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.errors import UsageError
from sdtune.families.pixel import Pixel
from sdtune.sample import command, draw_pictures

DENOISER = {
    "kind": "score_concat", "size": 28, "channels": 1, "widths": [8, 8, 16, 16], "embedding": 16, "classes": ["0", "1"],
}  # fmt: skip
QUICK: dict[str, Any] = {"height": 28, "width": 28, "steps": 5}


def make_family(prediction: str) -> Pixel:
    scheduler: dict[str, Any] = {"prediction_type": prediction}
    return Pixel.from_config({"denoiser": DENOISER, "scheduler": scheduler}, seed=0)


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
