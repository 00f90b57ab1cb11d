"""Pictures from a model, through diffusers pipelines; and the command `sdtune sample`."""

import contextlib
import io
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdtune.adapters.tokens import learned_words, strange_words
from sdtune.building import check_smallest
from sdtune.data.images import to_float
from sdtune.diffusion import draws
from sdtune.errors import RunError, UsageError
from sdtune.families.base import Conditioning, Family
from sdtune.families.inpainting import hidden_and_rest
from sdtune.families.loading import token_ids
from sdtune.families.schedulers import LateStart, make_sampler

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNKS = 3  # of a prompt that are read, of 75 tokens each
PIXELS = 512 * 512  # about as many are drawn at a time, in up to 16 pictures


def initial_noise(family: Family, seeds: Sequence[int], height: int, width: int) -> Tensor:
    """Where sampling starts, one pure function of each seed: (N, C, h, w), standard normal."""
    shape = family.latent_shape(height, width)
    return torch.stack([draws.normal(shape, seed, "initial sample noise") for seed in seeds])


@torch.no_grad()
def draw_pictures(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    steps: int = 25,
    guidance: float = 7.5,
    negative_prompt: str = "",
    sampler: str | None = None,
    dynamic_thresholding: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    shown: tuple[Tensor, Tensor] | None = None,
    begun: Tensor | None = None,
    strength: float = 0.8,
    noise: Tensor | None = None,
) -> Iterator["Image"]:
    """One picture for each prompt and seed, in order, drawn in batches.

    Args:
        family: the model; its networks are used as they are, adapters and all.
        prompts, seeds: of equal length; a picture depends on its own prompt and seed alone.
        height, width: in pixels, multiples of what the VAE divides by.
        steps: denoising steps. guidance: classifier-free guidance scale; 1 or less is off.
        negative_prompt: what guidance leads away from.
        sampler: a name of `SAMPLERS`; None is the model's own.
        dynamic_thresholding: as `make_sampler` has it, for models of pixels.
        batch_size: pictures at a time; None chooses by their size.
        progress: show a bar on stderr.
        shown: for inpainting models: a picture for each prompt, uint8, (N, 3, height, width), and masks, (N, 1, height,
            width), white where it is to be painted anew; None hides everything, as for text to image.
        begun: image to image: a picture for each prompt, as in `shown`, from which, noisy, drawing begins.
        strength: how far it may go from there: the share of the steps that are taken, in (0, 1].
        noise: of each picture, standard normal, (N, C, h, w), in place of `initial_noise` of its seed.

    Raises:
        UsageError: the sampler is not known, or cannot draw what this network predicts; or as `check_thresholding`.
    """
    pipeline: Any = family.pipeline()
    if sampler is not None or dynamic_thresholding is not None:
        check_thresholding(family, dynamic_thresholding)
        pipeline.scheduler = make_sampler(family.scheduler, sampler, dynamic_thresholding)
    if begun is not None:
        pipeline.scheduler = LateStart(pipeline.scheduler, strength)
    pipeline.set_progress_bar_config(disable=not progress)
    network = family.modules[family.denoiser]
    size = batch_size or max(1, min(16, PIXELS // (height * width)))
    with evaluating(family):
        for start in range(0, len(prompts), size):
            some, numbers = list(prompts[start : start + size]), seeds[start : start + size]
            words = pipeline_words(family, some, "")
            if guidance > 1:
                words |= pipeline_words(family, [negative_prompt] * len(some), "negative_")
            if family.inpaints:
                parts = None if shown is None else (shown[0][start : start + size], shown[1][start : start + size])
                words |= pipeline_pictures(family, parts, numbers, height, width)
            first = initial_noise(family, numbers, height, width) if noise is None else noise[start : start + size]
            first = first.to(network.device)
            if begun is not None:
                x0 = encoded(family, begun[start : start + size], numbers).to(network.device)
                first = pipeline.scheduler.begin(x0, first, steps)
            latents = pipeline(
                **words,
                latents=first.to(network.dtype),
                generator=[draws.generator(seed, "sampler noise") for seed in numbers],  # some samplers add noise
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                output_type="latent",
            ).images  # (B, C, h, w)
            # Not left to the pipeline, which wants VAE and UNet in one precision.
            yield from pipeline.image_processor.postprocess(family.decode_images(latents), output_type="pil")


def pipeline_words(family: Family, prompts: list[str], kind: str) -> dict[str, Tensor]:
    """Prompts as a pipeline's keyword arguments, encoded exactly as in training."""
    conditioning: Conditioning = family.encode_text(prompts)
    network = family.modules[family.denoiser]
    text = conditioning.text  # class numbers stay whole
    words = {f"{kind}prompt_embeds": text.to(network.dtype) if text.is_floating_point() else text}
    if conditioning.pooled is not None:
        words[f"{kind}pooled_prompt_embeds"] = conditioning.pooled.to(network.dtype)
    return words


def pipeline_pictures(
    family: Family, shown: tuple[Tensor, Tensor] | None, seeds: Sequence[int], height: int, width: int
) -> dict[str, Any]:
    """Pictures and masks as an inpainting pipeline's keyword arguments, encoded exactly as in training."""
    pixels, masks = shown or (
        torch.full((len(seeds), 3, height, width), 127, dtype=torch.uint8),
        torch.full((len(seeds), 1, height, width), 255, dtype=torch.uint8),
    )
    device, shape = family.modules["vae"].device, family.latent_shape(height, width)
    posterior = torch.stack([draws.normal(shape, seed, "posterior of the rest") for seed in seeds]).to(device)
    beside = hidden_and_rest(family, to_float(pixels.to(device)), masks.to(device), posterior)
    return {
        "image": pixels / 255,  # only its size is read, for the latents of what is shown are here
        "mask_image": (masks >= 128).float(),
        "masked_image_latents": beside[:, 1:],
        "strength": 1.0,
    }


def encoded(family: Family, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Pictures, uint8 (B, 3, H, W), as scaled latents (B, C, h, w), drawn from their posterior as in training."""
    coder = family.modules[family.autoencoder or family.denoiser]
    mean, std = family.encode_images(to_float(pixels.to(coder.device)))
    posterior = torch.stack([draws.normal(mean.shape[1:], seed, "posterior of the beginning") for seed in seeds])
    return mean + std * posterior.to(mean.device)


def check_thresholding(family: Family, quantile: float | None) -> None:
    """Raises UsageError for dynamic thresholding of latents, of which nobody knows between which bounds they lie."""
    if quantile is not None and family.autoencoder is not None:
        raise UsageError(
            "dynamic thresholding keeps pixels within [-1, 1], and this model draws latents of a VAE, which have no "
            "such bounds; expected a model of family pixel. Against colours that are too strong, lower --guidance"
        )


@contextlib.contextmanager
def evaluating(family: Family) -> Iterator[None]:
    """Every network in evaluation mode; afterwards as before."""
    training = {name: network.training for name, network in family.modules.items()}
    try:
        for network in family.modules.values():
            network.eval()
        yield
    finally:
        for name, network in family.modules.items():
            network.train(training[name])


# --- the command ----------------------------------------------------------------------------------------------------


def command(
    model: str,
    prompts: Sequence[str],
    *,
    negative_prompt: str = "",
    loras: Sequence[str] = (),
    seed: int = 0,
    steps: int = 25,
    guidance: float = 7.5,
    sampler: str | None = None,
    dynamic_thresholding: float | None = None,
    init_image: Path | None = None,
    strength: float | None = None,
    mask: Path | None = None,
    height: int | None = None,
    width: int | None = None,
    init_noise_optimization: bool = False,
    subjects: str | None = None,
    count: int = 1,
    out: str | Path = "samples",
    as_json: bool = False,
) -> int:
    """`sdtune sample`: draw pictures into a folder and print their paths; returns the exit code.

    Args:
        model: run folder, its final/ or a checkpoint, diffusers folder, hub id, or tiny.
        prompts: `count` pictures of each, with the seeds `seed`, `seed` + 1, ...
        loras: LoRA files, or folders or runs that hold one, with weights: see `open_model`.
        steps, guidance, sampler, dynamic_thresholding: as `draw_pictures` has them.
        init_image, strength, mask: see `sdtune.init_image`.
        height, width: in pixels; None is the model's own.
        init_noise_optimization, subjects: see `sdtune.init_noise`; subjects are parted by commas.
        out: folder for the pictures; what is there stays.
        as_json: print one JSON object instead of the paths.

    Raises:
        SdtuneError: no such model, a LoRA that does not fit, a folder that cannot be written, options that are not for
            this model.
    """
    from sdtune import init_image as beginning
    from sdtune import init_noise
    from sdtune.libraries import prepare
    from sdtune.opening import open_model

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: '{out}' is a file; expected a folder for the pictures")
    beginning.check_options(init_image, strength, mask)
    init_noise.check_options(init_noise_optimization, subjects, init_image is not None)
    prepare()
    device, precision = torch.device("cuda" if torch.cuda.is_available() else "cpu"), "fp16"
    family = open_model(model, *loras, device=device, precision=precision)
    tell_unread_words(family, [*prompts, negative_prompt])
    levels = family.schedule.levels
    if levels is not None and steps > levels:
        raise UsageError(f"--steps: got {steps}, but this model knows {levels} noise levels; 20 to 50 are usual")
    check_thresholding(family, dynamic_thresholding)
    first = make_sampler(family.scheduler, sampler, dynamic_thresholding)  # refused here, if at all
    lengthen(family, [*prompts, negative_prompt])
    height, width = picture_size(family, height, width)
    wanted = [(prompt, seed + number) for prompt in prompts for number in range(count)]
    texts, seeds = [prompt for prompt, _ in wanted], [number for _, number in wanted]
    begins = beginning.read(family, init_image, strength, mask, height, width, len(wanted))
    if init_noise_optimization:
        with evaluating(family):
            begins["noise"] = init_noise.first_noise(family, first, texts, seeds, height, width, steps, subjects)
    pictures = draw_pictures(
        family,
        texts,
        seeds,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        sampler=sampler,
        dynamic_thresholding=dynamic_thresholding,
        progress=sys.stderr.isatty(),
        **begins,
    )
    began = time.perf_counter()
    rows = write(pictures, wanted, out, show=not as_json)
    if as_json:
        print(json.dumps({"pictures": rows, "model": model, "seconds": round(time.perf_counter() - began, 2)}))
    return 0


def write(
    pictures: Iterator["Image"], wanted: Sequence[tuple[str, int]], out: Path, show: bool
) -> list[dict[str, Any]]:
    """Save each picture, of a prompt and a seed, as soon as it is drawn; `show` prints its path."""
    rows = []
    for (prompt, number), picture in zip(wanted, pictures, strict=True):
        path = save_new(picture, out, f"{file_name(prompt)}-{number}")
        rows.append({"path": str(path), "prompt": prompt, "seed": number})
        if show:
            print(path, flush=True)
    return rows


def picture_size(family: Family, height: int | None, width: int | None) -> tuple[int, int]:
    """The size asked for, or the model's own. Raises UsageError for one that the model cannot draw."""
    own = family.picture_size()
    size = height or own[0], width or own[1]
    check_smallest(family, *size, "--height, --width")
    # diffusers' pipelines over latents take multiples of 8 only, whatever the VAE
    step = math.lcm(8, family.factor) if family.autoencoder is not None else family.factor
    if any(side % step for side in size):
        raise UsageError(
            f"--height, --width: got {size[0]} x {size[1]}; expected multiples of {step}, such as --height "
            f"{max(step, size[0] // step * step)} --width {max(step, size[1] // step * step)}"
        )
    return size


def tell_unread_words(family: Family, prompts: Sequence[str]) -> None:
    """Say on stderr which prompts are not read, and which of their words look like learned ones and are not."""
    if (given := next(filter(None, prompts), "")) and not family.text_encoders and not family.classes:
        print(f"'{given}' is not read: this model knows no classes, and draws any picture", file=sys.stderr)
    if strange := strange_words(family, prompts):
        print(
            f"{', '.join(strange)}: no word that this model has learned; it is read as its letters. It has learned "
            f"{', '.join(learned_words(family)) or 'none'}; others, and LoRAs, come in by --lora FILE",
            file=sys.stderr,
        )


def lengthen(family: Family, prompts: Sequence[str]) -> None:
    """Let a family that reads tokens read as many chunks of them as the longest prompt has, up to 3."""
    if not family.tokenizers:
        return
    longest = max(
        len(ids)
        for tokenizer in family.tokenizers.values()
        for ids in token_ids(tokenizer, prompts)
    )
    first = next(iter(family.tokenizers.values()))
    width = first.model_max_length - first.num_special_tokens_to_add()  # of a chunk; 75 for CLIP
    chunks = math.ceil(longest / width)
    if chunks > CHUNKS:
        print(f"a prompt has {longest} tokens; the first {CHUNKS * width} are read", file=sys.stderr)
    family.max_tokens = max(family.max_tokens, 75 * min(CHUNKS, chunks))


def file_name(prompt: str) -> str:
    """A prompt as the beginning of a file's name: its letters and digits, at most 60 characters."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:60].rstrip("-") or "picture"


def save_new(picture: "Image", folder: Path, name: str) -> Path:
    """Write a PNG under a name that is free: name.png, name-2.png, ... Raises RunError when it cannot be written."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    number = 1
    while True:
        path = folder / (f"{name}.png" if number == 1 else f"{name}-{number}.png")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                try:
                    file.write(content.getvalue())
                    file.flush()
                except OSError:
                    path.unlink()
                    raise
            return path
        except FileExistsError:
            number += 1
        except OSError as fault:
            raise RunError(
                f"'{path}' could not be written ({fault.strerror}); make room, or name another folder with --out"
            ) from fault
