"""What a run will take before it is begun: time, disk, memory. Told from the shapes of its model, without weights.

The floating point operations of a step are counted on a model without weights; how many this machine does in a second
is measured on a convolution, for a moment. It is an estimate: within a factor of two of the truth where it was tried.
"""

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sdtune import building
from sdtune.config import Recipe, resolve_asset
from sdtune.data.captions import counted
from sdtune.data.check import Report
from sdtune.data.check_findings import Finding, about
from sdtune.data.check_report import megabytes
from sdtune.data.check_sizes import Frame
from sdtune.data.dataset import VARIANTS
from sdtune.data.tags import orders
from sdtune.families import family_class
from sdtune.families.quantization import BYTES
from sdtune.local_models import named_models
from sdtune.optimizers import STATE_BYTES

MEASURED = 0.3  # seconds
FLOATS = 4  # bytes of a float32
Facts = list[tuple[str, str]]


def learning_part(recipe: Recipe) -> str:
    """The name of the network that learns, or of the one beside text encoders that does."""
    family = family_class(recipe.model.family)
    return "vae" if recipe.task == "autoencoding" else family.denoiser


def network_config(recipe: Recipe) -> dict[str, Any] | None:
    """The configuration of the network that learns; None where it is not on this machine."""
    part = learning_part(recipe)
    made = (recipe.model.from_config or {}).get(part)
    if isinstance(made, dict):
        return made
    folders = [Path(resolve_asset(made))] if isinstance(made, str) else []
    folders += [each.folder for each in named_models(recipe) if each.key == "model.base" and each.folder]
    for folder in folders:
        for file in (folder / part / "config.json", folder / "config.json"):
            if file.is_file():
                return dict(json.loads(file.read_text(encoding="utf-8")))
    return None


def make_empty(recipe: Recipe, config: dict[str, Any]) -> Any:
    """The network that learns, without memory for its weights."""
    with torch.device("meta"):
        return family_class(recipe.model.family).build(learning_part(recipe), config)


def sample_flops(recipe: Recipe, network: Any) -> int:
    """Floating point operations of the forward pass of one sample."""
    height, width = building.picture_size(recipe)
    config = network.config
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        if recipe.task == "autoencoding":
            network(torch.empty(1, config.in_channels, height, width))
        else:
            _, factor = latents_of(recipe)
            inputs = family_class(recipe.model.family).inputs
            network(**inputs(config, height // factor, width // factor, recipe.images.max_tokens + 2))
    return int(counter.get_total_flops())


def machine_speed(precision: str) -> float:
    """Floating point operations a second of this machine: a convolution as they stand in a UNet, in that precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    x, weight = torch.randn(8, 256, 16, 16, device=device, dtype=dtype), torch.randn(256, 256, 3, 3).to(device, dtype)
    flops, count = 2 * x.numel() * 256 * 9, 0

    def work() -> Tensor:
        return F.conv2d(x, weight, padding=1)

    work().sum().item()  # the first call prepares
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < MEASURED:
        work().sum().item()
        count += 1
    return flops * count / passed


def run_seconds(recipe: Recipe, flops: int, speed: float) -> float:
    """Seconds of all steps.

    Forward and, of about the same cost each, backward to the activations and, in full training, to the weights; once
    more forward under gradient checkpointing. Class pictures double the samples.
    """
    passes = 2 + (recipe.adapter.kind == "full") + recipe.train.gradient_checkpointing
    paired = 1 + any(source.role == "class" for source in recipe.data)
    samples = recipe.train.steps * recipe.train.batch_size * recipe.train.accumulate * paired
    return samples * passes * flops / speed


def written_bytes(recipe: Recipe, network: nn.Module) -> int:
    """Bytes that the run folder takes at its largest: final/ and the checkpoints that are kept.

    A checkpoint holds the weights as other tools read them, the learning numbers in float32, and the optimizer's state;
    an EMA is one more. Text encoders and what stays of the base are counted for full training as the network is.
    """
    numbers = building.make_adapter(recipe).numbers(network)
    every = recipe.output.checkpoint_every
    taken = 0 if every is None else -(-recipe.train.steps // every)
    kept = taken if recipe.output.keep_last is None else min(taken, recipe.output.keep_last + 1)  # one while it is made
    checkpoint = FLOATS * (2 + (recipe.train.ema is not None)) + STATE_BYTES[recipe.optimizer.name]
    return numbers * (FLOATS + kept * checkpoint)


def held_bytes(recipe: Recipe, network: nn.Module) -> int:
    """Bytes of memory of the network from step to step: its weights, their gradients, averages and optimizer state.

    What a step needs besides, most of it for the backward pass, depends on the kernels and is not counted.
    """
    adapter = building.make_adapter(recipe)
    numbers = adapter.numbers(network)
    learning = numbers * (FLOATS * (2 + (recipe.train.ema is not None)) + STATE_BYTES[recipe.optimizer.name])
    if recipe.adapter.kind == "full":
        return learning
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = building.frozen_dtype(device, recipe.train.precision, adapter)
    frozen = (half or torch.float32).itemsize * sum(parameter.numel() for parameter in network.parameters())
    if recipe.model.quantize is not None:
        packed = sum(part.weight.numel() for part in network.modules() if type(part) is nn.Linear)
        frozen -= round(packed * ((half or torch.float32).itemsize - BYTES[recipe.model.quantize]))
    return learning + frozen


def run_cost(recipe: Recipe) -> dict[str, float | int | None]:
    """`seconds`, `memory_bytes` and `disk_written_bytes` of a run; None where its model is not on this machine."""
    config = network_config(recipe)
    if config is None:
        return {"seconds": None, "memory_bytes": None, "disk_written_bytes": None}
    network = make_empty(recipe, config)
    seconds = run_seconds(recipe, sample_flops(recipe, network), machine_speed(recipe.train.precision))
    return {
        "seconds": float(f"{seconds:.3g}"),
        "memory_bytes": held_bytes(recipe, network),
        "disk_written_bytes": written_bytes(recipe, network),
    }


# --- with the data ----------------------------------------------------------------------------------------------------


def estimate(recipe: Recipe, report: Report, class_pictures: int = 0) -> dict[str, Any]:
    """What is known of the run before it: samples, epochs, time, bytes of cached latents and of disk.

    Args:
        report: of its data. class_pictures: how many it will draw.
    """
    repeats = [each.repeats for each in recipe.data if each.role == "instance"]
    numbers = [len(reading.pictures) for reading in report.readings if reading.entry.role == "instance"]
    samples = recipe.train.steps * recipe.train.batch_size * recipe.train.accumulate
    epoch = sum(number * times for number, times in zip(numbers, repeats, strict=True))
    folder, views = recipe.train.cache_dir, (1 + recipe.images.flip) * len(report.good)
    in_memory = latents_bytes(recipe, report.frame) * views if recipe.train.cache and folder is None else 0
    captions = {caption for reading in report.readings for picture in reading.pictures for caption in picture.captions}
    texts = variants(captions, recipe.images.keep_tags, samples) if recipe.images.tag_shuffle else len(captions)
    return {
        "samples": samples,
        "epochs": round(samples / epoch, 2) if epoch else None,
        "cached_latents_bytes": in_memory,
        "cache_dir_bytes": stored_bytes(recipe, report.frame, views, texts) if folder else 0,
        "cache_dir_free_bytes": shutil.disk_usage(existing(folder)).free if folder else None,
        "disk_free_bytes": shutil.disk_usage(existing(recipe.output.dir)).free,
        **run_cost(recipe),
        "class_pictures_to_draw": class_pictures,
    }


def existing(folder: str) -> Path:
    """A folder, or the nearest one above it that is there."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return place


def stored_bytes(recipe: Recipe, frame: Frame, views: int, captions: int) -> int:
    """Bytes that `train.cache_dir` takes: latents and text embeddings in half precision.

    Text is left out where a text encoder learns, or the model is not on this machine.
    """
    latents = views * latents_bytes(recipe, frame) // 2
    config = network_config(recipe)
    if config is None or recipe.adapter.text_encoder:
        return latents
    tokens = recipe.images.max_tokens // 75 * 77
    return latents + captions * tokens * config.get("cross_attention_dim", 768) * FLOATS // 2


def variants(captions: Iterable[str], keep: int, samples: int) -> int:
    """How many captions a run of so many samples keeps on disk, about, with their tags in other orders."""
    counts = [orders(caption, keep) for caption in captions]
    return counts.count(1) + min(sum(count for count in counts if count > 1), samples, VARIANTS)


def latents_bytes(recipe: Recipe, frame: Frame) -> int:
    """Bytes that the cache in memory keeps of one picture: mean and deviation of its latents in float32."""
    if family_class(recipe.model.family).autoencoder is None:
        return 0
    channels, factor = latents_of(recipe)
    return 2 * FLOATS * channels * (frame.height // factor) * (frame.width // factor)


def latents_of(recipe: Recipe) -> tuple[int, int]:
    """Channels of the latents, and how many pixels lie along the side of one.

    Where the VAE's configuration is not here, 4 and 8, as Stable Diffusion's. Without a VAE pixels are latents.
    """
    if family_class(recipe.model.family).autoencoder is None:
        return (network_config(recipe) or {}).get("channels", 3), 1
    made = recipe.model.vae or (recipe.model.from_config or {}).get("vae") or recipe.model.base or ""
    values = made if isinstance(made, dict) else {}
    if isinstance(made, str):
        for file in (Path(resolve_asset(made)) / "vae" / "config.json", Path(resolve_asset(made)) / "config.json"):
            if file.is_file() and not values:
                values = json.loads(file.read_text(encoding="utf-8"))
    return values.get("latent_channels", 4), 2 ** (len(values.get("block_out_channels", [0] * 4)) - 1)


def recipe_facts(recipe: Recipe, known: Mapping[str, Any]) -> Facts:
    """The estimate in words."""
    size, steps = recipe.train.batch_size * recipe.train.accumulate, recipe.train.steps
    seen = f"{steps:,} steps of {size} = {known['samples']:,} samples"
    if known["epochs"] is not None:
        seen += f", each picture {known['epochs']:g} times"
    facts = [("training", f"{seen}, on one process")]
    if known["seconds"] is not None:
        what = f"roughly {_duration(known['seconds'])} on this machine, as busy as it is now"
        facts.append(("time", f"{what}; encoding, samples and saving not counted"))
        written = f"the run writes about {megabytes(known['disk_written_bytes'])}"
    else:
        facts.append(("time", "not known while the model is not here"))
        written = "how much the run writes is not known while the model is not here"
    if known["memory_bytes"] is not None:
        what = f"{megabytes(known['memory_bytes'])} for what learns, its base and the optimizer's state"
        facts.append(("memory", f"about {what}; the pass of a batch, VAE and text encoders not counted"))
    facts.append(("disk", f"{written}; {megabytes(known['disk_free_bytes'])} are free for {recipe.output.dir}"))
    if recipe.train.cache_dir is not None:
        free = f"{megabytes(known['cache_dir_free_bytes'])} are free for {recipe.train.cache_dir}"
        facts.append(("cache", f"about {megabytes(known['cache_dir_bytes'])}, of which some may be there; {free}"))
    elif recipe.task == "denoising" and known["cached_latents_bytes"]:
        latents = f"about {megabytes(known['cached_latents_bytes'])} of latents in memory, 2.1 GB at most"
        facts.append(("cache", latents))
    if known["class_pictures_to_draw"]:
        facts.append(("class", f"{counted(known['class_pictures_to_draw'], 'picture')}, which the run draws first"))
    return facts


def disk_findings(known: Mapping[str, Any]) -> list[Finding]:
    """A run folder or a cache that does not fit on its disk. (Of a cache, part or all may be made already.)"""
    found = []
    needed, free = known["disk_written_bytes"], known["disk_free_bytes"]
    if needed is not None and needed > free:
        names = [f"{megabytes(needed)} to write, {megabytes(free)} free"]
        do = "free some, choose another disk with output.dir=FOLDER, or keep fewer checkpoints (output.keep_last)"
        found += about("fatal", "disk", names, "run folders that do not fit on the disk", do)
    needed, free = known["cache_dir_bytes"], known["cache_dir_free_bytes"]
    if free is not None and needed > free:
        names = [f"{megabytes(needed)} at most, {megabytes(free)} free"]
        do = "if it is not made already, free some, choose another disk with train.cache_dir=FOLDER, or remove it"
        found += about("warning", "disk", names, "caches that may not fit on the disk", do)
    return found


def _duration(seconds: float) -> str:
    """Rounded: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
