"""Our UNet and VAE in a stock diffusers pipeline: any Stable Diffusion 1.x or 2.x folder or hub id.

    python examples/load_pretrained.py                                   # the embedded tiny model
    python examples/load_pretrained.py stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a photo of a dog"
    python examples/load_pretrained.py --unet runs/minimal_loop/unet     # what minimal_loop.py made of its UNet
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from sdtune.config import resolve_asset
from sdtune.models import AutoencoderKL, UNet2DConditionModel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny", help="diffusers folder or hub id")
parser.add_argument("--unet", help="folder of another UNet for it")
parser.add_argument("--prompt", default="red apple")
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--out", type=Path, default=Path("samples/load_pretrained.png"))
settings = parser.parse_args()
base = resolve_asset(settings.model)

if settings.unet:
    unet = UNet2DConditionModel.from_pretrained(settings.unet)
else:
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
pipeline = DiffusionPipeline.from_pretrained(base, unet=unet, vae=vae, torch_dtype=torch.float32)
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

generator = torch.Generator().manual_seed(0)
drawn = pipeline(settings.prompt, num_inference_steps=settings.steps, guidance_scale=3.0, generator=generator)
settings.out.parent.mkdir(parents=True, exist_ok=True)
picture = drawn.images[0]
picture.save(settings.out)
print(f"{settings.out}: '{settings.prompt}', {picture.width} x {picture.height} pixels")
