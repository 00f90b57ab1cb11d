"""The training loop by hand: what `sdtune train` does at its heart, without everything around it.

    python examples/minimal_loop.py                  # teaches the embedded tiny model 16 pictures, for 20 steps
    python examples/minimal_loop.py MODEL            # another diffusers folder or hub id
"""

import sys

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPTextModel, CLIPTokenizer

from sdtune.config import resolve_asset
from sdtune.data.images import open_rgb, prepare, to_float
from sdtune.data.metadata import read_rows
from sdtune.diffusion.schedule import NoiseSchedule
from sdtune.models import AutoencoderKL, UNet2DConditionModel

base = sys.argv[1] if len(sys.argv) > 1 else resolve_asset("tiny")
photos, size, steps, out = resolve_asset("assets:demo"), 64, 20, "runs/minimal_loop/unet"
torch.manual_seed(0)

unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)
schedule = NoiseSchedule.from_config(DDIMScheduler.load_config(base, subfolder="scheduler"))

rows = read_rows(photos)  # metadata.jsonl: {"file_name": ..., "text": ...}
pictures = [prepare(open_rgb(f"{photos}/{row['file_name']}"), size, size) for row in rows]
pixels = to_float(torch.stack(pictures))  # (N, 3, H, W) in [-1, 1]
captions = [row["text"] for row in rows]
tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():  # neither the VAE nor the text encoder learns: what they say is computed once
    latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor  # (N, C, h, w)
    text = text_encoder(tokens.input_ids).last_hidden_state  # (N, L, D)

accelerator = Accelerator()
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
loader = DataLoader(TensorDataset(latents, text), batch_size=8, shuffle=True)
unet, optimizer, loader = accelerator.prepare(unet.train(), optimizer, loader)

step = 0
while step < steps:
    for x0, words in loader:  # (B, C, h, w), (B, 77, D)
        eps = torch.randn_like(x0)
        t = torch.randint(len(schedule), (len(x0),), device=x0.device)  # (B,)
        x_t = schedule.add_noise(x0, eps, t)  # sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * eps
        target = schedule.target(x0, eps, t)  # eps, or v = sqrt(alpha_bar) * eps - sqrt(1 - alpha_bar) * x0
        loss = mse_loss(unet(x_t, t, encoder_hidden_states=words).sample, target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(f"step {step}: loss {loss.item():.4f}")

accelerator.unwrap_model(unet).save_pretrained(out)
print(f"saved in {out}; draw with it: python examples/load_pretrained.py --unet {out}")
