"""Train the captioner that is shipped with sdtune: a BLIP of 5.6 million parameters that names emoji.

    python examples/tiny_base/build_data.py     # once: the pictures, in data/tiny_base
    python examples/tiny_blip/train.py          # on 2 CPU cores; the same command goes on after a stop

transformers' own `BlipForConditionalGeneration` from random weights, with its own WordPiece vocabulary. It sees all
emoji of both styles but the 16 Fluent pictures of the demo. Two losses: BLIP's own, the next token of the caption, and
the cross entropy of a linear layer, thrown away afterwards, that tells the 1,911 concepts apart. Through the decoder
alone the vision part learns slowly; with the second loss it learns what the two styles of a concept have in common.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

from sdtune import checkpoint
from sdtune.checkpoint import forget_old
from sdtune.run_folder import all_checkpoints
from sdtune.train import Ema, lr_factor
from sdtune.writing import written_aside

SIZE = 64  # px
PREFIX = "a picture of"  # a fifth of the captions begin with it, so that `--prompt "a picture of"` is understood
# What must not be mirrored or turned far, because its name would be wrong.
FIXED = re.compile(r"left|right|east|west|clock|keycap|letter|latin|squared|flag|arrow|mark|sign|button|input")
# What must keep its colours.
COLOURED = re.compile(
    r"flag|red|green|blue|yellow|orange|purple|brown|black|white|grey|pink|heart|circle|square|apple|book|diamond|button"
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]


@dataclass
class Pictures:
    """Pictures and their names: `pixels` uint8 (N, 3, 64, 64), `concept` a number for each that both styles share."""

    pixels: Tensor
    names: list[str]
    concept: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, some: slice) -> Pictures:
        return Pictures(self.pixels[some], self.names[some], self.concept[some])


def read_pictures(folders: list[Path], keep: Any) -> Pictures:
    """Those rows of the imagefolders for which `keep(row)` is true."""
    rows = [
        (folder, json.loads(line))
        for folder in folders
        for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [(folder, row) for folder, row in rows if keep(row)]
    pixels = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for folder, row in rows]
    return Pictures(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        [row["text"] for _, row in rows],
        [row["concept"] for _, row in rows],
    )


def make_processor(names: list[str], folder: Path) -> BlipProcessor:
    """A vocabulary learned from the names, in the format of BERT's, and BLIP's picture preparation for 64 px."""
    if not (folder / "vocab.txt").exists():  # it comes out in another order each time, and the weights go with one
        learner = BertWordPieceTokenizer(lowercase=True, strip_accents=True)
        learner.train_from_iterator(
            [*names, PREFIX], vocab_size=2048, min_frequency=1, special_tokens=SPECIAL, show_progress=False
        )
        folder.mkdir(parents=True, exist_ok=True)
        learner.save_model(str(folder))
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), bos_token="[DEC]", model_max_length=32)
    pictures = BlipImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=Image.Resampling.BICUBIC,
    )
    return BlipProcessor(pictures, tokenizer)


def make_model(tokenizer: Any) -> BlipForConditionalGeneration:
    """A BLIP of 5.6 million parameters: 6 layers that see 8 x 8 patches, 2 that write."""
    vision = {"image_size": SIZE, "patch_size": 8, "hidden_size": 256, "intermediate_size": 768,
              "num_hidden_layers": 6, "num_attention_heads": 4}
    # of the size of 1 / sqrt(width); transformers' default, 1e-10, is meant for loading
    vision["initializer_range"] = 0.06
    text = {"vocab_size": len(tokenizer), "hidden_size": 192, "encoder_hidden_size": 256, "intermediate_size": 768,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"), "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id, "label_smoothing": 0.1,
            "initializer_range": 0.05}
    config = BlipConfig(vision_config=vision, text_config=text, projection_dim=64)
    return BlipForConditionalGeneration(config)


# --- a batch ----------------------------------------------------------------------------------------------------------


def choose(concepts: list[list[int]], count: int, step: int) -> tuple[list[int], Tensor]:
    """Indices of both styles of `count` concepts, and the concept of each."""
    passes, offset = divmod(step * count, len(concepts))
    order = [int(i) for some in (passes, passes + 1)
             for i in torch.randperm(len(concepts), generator=torch.Generator().manual_seed(some))]
    numbers = order[offset : offset + count]
    chosen = [(i, number) for number in numbers for i in concepts[number]]
    return [i for i, _ in chosen], torch.tensor([number for _, number in chosen])


def augment(pixels: Tensor, names: list[str], strength: float, generator: torch.Generator) -> Tensor:
    """What may differ between two drawings of one thing: place, size, turn, shape, colours, light, sharpness.

    Args:
        pixels: uint8 (B, 3, H, W), on white. names: of the pictures, for what must not be mirrored or coloured.
        strength: 0 leaves all as it is (but for mirroring), 1 is all.

    Returns:
        Floats in [-1, 1], (B, 3, H, W).
    """
    count = len(pixels)

    def between(low: float, high: float, *shape: int) -> Tensor:
        middle = 1.0 if low > 0 else 0.0  # of a factor, of something added
        return middle + strength * (low - middle + (high - low) * torch.rand(count, *shape, generator=generator))

    def chance(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    upright = torch.tensor([FIXED.search(name) is not None for name in names])
    coloured = torch.tensor([COLOURED.search(name) is not None for name in names])
    x = 1 - pixels.float() / 255  # white is 0, as outside of the picture
    angle = between(-0.6, 0.6) * torch.where(upright, 0.3, 1.0)
    scale, stretch, shift = between(0.8, 1.3), between(0.8, 1.25), between(-0.15, 0.15, 2)
    flip = torch.where(chance(0.5) & ~upright, -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    affine = torch.stack([
        torch.stack([cos * flip * stretch, -sin, shift[:, 0]], 1),
        torch.stack([sin * flip * stretch, cos, shift[:, 1]], 1),
    ], 1)  # (B, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)  # (B, H, W, 2)
    bend = F.interpolate(between(-0.1, 0.1, 2, 4, 4), x.shape[-2:], mode="bicubic", align_corners=True)
    x = 1 - F.grid_sample(x, grid + bend.permute(0, 2, 3, 1), align_corners=False)

    mixed = torch.stack([torch.eye(3)[torch.randperm(3, generator=generator)] for _ in range(count)])  # (B, 3, 3)
    mixed = torch.where(chance(0.3)[:, None, None], torch.full((3, 3), 1 / 3), mixed)  # grey
    share = torch.where(coloured, 0.0, strength * torch.rand(count, generator=generator))[:, None, None]
    x = torch.einsum("bij,bjhw->bihw", torch.eye(3) * (1 - share) + mixed * share, x)  # white stays white
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * between(0.4, 1.6, 1, 1, 1)  # saturation
    light = F.interpolate(between(-0.3, 0.3, 1, 3, 3), x.shape[-2:], mode="bicubic", align_corners=True)
    x = 1 - (1 - x) * (1 + light) * between(0.6, 1.4, 1, 1, 1)  # light on the thing, contrast to the white
    x = x + between(-0.1, 0.1, 1, 1, 1) + between(-0.06, 0.06, 3, 1, 1)
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = x + (x - blurred) * between(-1.0, 1.0, 1, 1, 1)  # softer or sharper
    return x.clamp(0, 1) * 2 - 1


def tokens_of(processor: BlipProcessor, names: list[str], told: Tensor) -> dict[str, Tensor]:
    """Token ids as BLIP learns them: [DEC] caption [SEP].

    Where `told`, the caption begins with the prefix, which is given and not learned: else a model that does not know a
    thing would begin to write the prefix again and again.
    """
    captions = [f"{PREFIX} {name}" if tell else name for name, tell in zip(names, told.tolist(), strict=True)]
    tokens = processor.tokenizer(captions, padding=True, return_tensors="pt")
    ids = tokens["input_ids"].clone()
    ids[:, 0] = processor.tokenizer.bos_token_id
    labels = ids.masked_fill(tokens["attention_mask"] == 0, -100)
    given = len(processor.tokenizer(PREFIX, add_special_tokens=False)["input_ids"])
    labels[told, : 1 + given] = -100
    return {"input_ids": ids, "attention_mask": tokens["attention_mask"], "labels": labels}


# --- the optimizer ----------------------------------------------------------------------------------------------------


class Together:
    """Two optimizers, each with its own parameters, that look like one to `sdtune.checkpoint`."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        owner = {parameter: part for part in parts for group in part.param_groups for parameter in group["params"]}
        self.state = StateOf(owner)
        self.defaults = {key: value for part in parts for key, value in part.defaults.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


class StateOf:
    """What an optimizer keeps for a parameter, found by asking the one that moves it."""

    def __init__(self, owner: dict[nn.Parameter, torch.optim.Optimizer]) -> None:
        self.owner = owner

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self.owner[parameter].state[parameter]

    def get(self, parameter: nn.Parameter, _: Any = None) -> dict[str, Tensor]:
        return self[parameter]


def make_optimizer(parameters: dict[str, nn.Parameter], lr: float) -> Any:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for the rest: it needs far fewer steps."""
    hidden = [p for name, p in parameters.items() if p.ndim == 2 and "layer" in name]
    rest = [p for name, p in parameters.items() if not (p.ndim == 2 and "layer" in name)]
    return Together(
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.05, betas=(0.9, 0.98)),
    )


# --- the run ----------------------------------------------------------------------------------------------------------


def learn(model: nn.Module, processor: BlipProcessor, pictures: Pictures, settings: Any) -> None:
    """Train for `settings.steps`; the model ends with its averaged weights."""
    by_concept: dict[str, list[int]] = {}
    for i, concept in enumerate(pictures.concept):
        by_concept.setdefault(concept, []).append(i)
    concepts = list(by_concept.values())
    head = nn.Linear(model.config.vision_config.hidden_size, len(concepts))
    parameters = dict(nn.ModuleDict({"blip": model, "head": head}).named_parameters())
    optimizer = make_optimizer(parameters, settings.lr)
    ema = Ema(parameters, 0.998)
    done = all_checkpoints(settings.work)
    step = checkpoint.restore(
        done[-1], parameters=parameters, optimizer=optimizer, averages=ema.average, scaler=None
    ) if done else 0
    began = time.monotonic()
    while step < settings.steps:
        generator = torch.Generator().manual_seed(1_000_003 * (settings.seed + 1) + step)
        chosen, concept = choose(concepts, settings.batch, step)
        names = [pictures.names[i] for i in chosen]
        part = step / settings.steps
        # Easy first; little in the last fifth, so that what is there is learned as it is.
        strength = min(1.0, 0.2 + 2.4 * part, 0.25 + 3.75 * max(0.0, 0.8 - part))
        pixels = augment(pictures.pixels[chosen], names, strength, generator)
        told = torch.rand(len(chosen), generator=generator) < 0.2
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor("cosine", step, 100, settings.steps)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(pixel_values=pixels, **tokens_of(processor, names, told))
            told_apart = F.cross_entropy(head(out.image_embeds.mean(1)).float(), concept, label_smoothing=0.1)
        (out.loss + told_apart).backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        ema.update(step)
        if step % 50 == 0:
            seconds = time.monotonic() - began
            values = f"caption {out.loss.item():.3f}  concept {told_apart.item():.3f}"
            print(f"step {step}  {values}  {seconds:.0f} s", flush=True)
        if step % 250 == 0 or step == settings.steps:
            checkpoint.save(
                settings.work / "checkpoints" / f"step-{step:06d}", step=step, parameters=parameters,
                optimizer=optimizer, averages=ema.average, scaler=None, save_weights=lambda folder: None,
            )
            forget_old(settings.work, 1)
            model.eval()
            with ema.applied():
                share, _ = share_named(model, processor, pictures[::20])
                print(f"    {share:.0%} of every 20th picture named right", flush=True)
            model.train()
    ema.swap()


@torch.no_grad()
def share_named(model: Any, processor: BlipProcessor, pictures: Pictures, prompt: str = "") -> tuple[float, list[str]]:
    """Share of the pictures whose caption is their name, and all captions."""
    captions: list[str] = []
    for i in range(0, len(pictures), 100):
        shots = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures.pixels[i : i + 100]]
        inputs = processor(images=shots, text=[prompt] * len(shots) if prompt else None, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=24, num_beams=1)
        captions += processor.batch_decode(out, skip_special_tokens=True)
    tokenizer = processor.tokenizer
    names = tokenizer.batch_decode(tokenizer(pictures.names)["input_ids"], skip_special_tokens=True)
    right = [caption.removeprefix(prompt).strip() == name for caption, name in zip(captions, names, strict=True)]
    return sum(right) / len(right), captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/tiny_base"), help="what build_data.py wrote")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-blip"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-blip/final"), help="the model, in fp16")
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--batch", type=int, default=48, help="concepts a step; most have two pictures")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()

    lines = (settings.data / "demo" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    demo = {json.loads(line)["concept"] for line in lines}
    folders = [settings.data / "vae", settings.data / "vae_held_out"]
    seen = read_pictures(folders, lambda row: not (row["style"] == "fluent" and row["concept"] in demo))
    unseen = read_pictures([settings.data / "demo"], lambda row: True)

    torch.manual_seed(settings.seed)
    processor = make_processor(sorted(set(seen.names)), settings.work / "tokenizer")
    model = make_model(processor.tokenizer)
    print(f"{len(seen)} pictures, {model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens", flush=True)
    learn(model, processor, seen, settings)

    model.eval().half().float()  # as it will be read
    known, _ = share_named(model, processor, seen)
    told, _ = share_named(model, processor, seen, PREFIX)
    new, captions = share_named(model, processor, unseen)
    for name, caption in zip(unseen.names, captions, strict=True):
        print(f"  {name}: {caption}")
    result = {"seen": known, "seen_with_prompt": told, "unseen": new, "pictures": len(seen)}
    with written_aside(settings.out) as aside:
        model.half().save_pretrained(aside)
        processor.save_pretrained(aside)
        (aside / "training.json").write_text(json.dumps(result | {"steps": settings.steps}) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
