"""From settings to objects: each function reads the part of a recipe that it is named after."""

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtune.adapters import NETWORKS, SETTINGS, adapter_class
from sdtune.adapters.base import TOKENS, Adapter
from sdtune.adapters.learned import holds_adapter, holds_lora
from sdtune.adapters.textual_inversion import TextualInversion
from sdtune.adapters.together import Together
from sdtune.adapters.tokens import Token, embedding_files, token_files
from sdtune.config import DataSource, ModelSettings, Recipe, resolve_asset
from sdtune.data.batches import Batch, collate
from sdtune.data.buckets import Buckets, Size, default_step
from sdtune.data.check_findings import Finding, about
from sdtune.data.dataset import TrainingSet, validation_examples
from sdtune.data.examples import Example, Known, nothing_known
from sdtune.data.picture import MASK
from sdtune.data.sources import Source, load_source
from sdtune.data.store import Stores
from sdtune.diffusion.objectives import PLAIN, Objective
from sdtune.diffusion.schedule import Prediction
from sdtune.errors import DataError, UsageError, WeightsError
from sdtune.families import family_class
from sdtune.families.base import Family
from sdtune.families.inpainting import widen
from sdtune.families.quantization import quantize
from sdtune.families.schedulers import adjusted
from sdtune.models.attention import use_kernel
from sdtune.run_folder import model_place, weights_folder
from sdtune.tasks import AutoencodingTask, DenoisingTask, Task

COMPILER = "inductor"  # of torch.compile
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_family(recipe: Recipe) -> Family:
    """Load the base, or make the networks from their configuration."""
    if recipe.task == "autoencoding":
        return open_family(recipe.model, seed=recipe.train.seed, parts=["vae"])
    return open_family(
        recipe.model,
        seed=recipe.train.seed,
        max_tokens=recipe.images.max_tokens,
        prediction=recipe.objective.prediction,
        zero_terminal_snr=recipe.objective.zero_terminal_snr,
        size=picture_size(recipe),
    )


def open_family(
    model: ModelSettings,
    *,
    seed: int = 0,
    max_tokens: int = 75,
    prediction: str = "auto",
    zero_terminal_snr: bool = False,
    size: tuple[int, int] | None = None,
    parts: list[str] | None = None,
) -> Family:
    """A model as a recipe's `model` section describes it.

    Args:
        seed: of the weights of parts that are made from their configuration.
        max_tokens: the recipe's images.max_tokens.
        prediction, zero_terminal_snr: of its objective; they change the scheduler.
        size: height and width of the pictures, noted in a UNet that is made without a sample_size.
        parts: limits what is loaded, for instance to ["vae"].
    """
    kind = family_class(model.family)
    options: dict[str, Any] = {"clip_skip": model.clip_skip, "max_tokens": max_tokens}
    if model.from_config is not None:
        made = {
            name: resolve_asset(part) if isinstance(part, str) else part for name, part in model.from_config.items()
        }
        family = kind.from_config(made, seed=seed, **options)
    else:
        options |= {"vae": model_place(model.vae) if model.vae else None}
        options |= {"variant": model.variant, "revision": model.revision, "allow_pickle": model.allow_pickle}
        family = kind.load(base_place(str(model.base)), parts=parts, **options)
    if model.inpaint:
        widen(family.modules[family.denoiser])
    if family.scheduler:
        family.scheduler = adjusted(family.scheduler, prediction, zero_terminal_snr)
    if size is not None:
        family.note_size(*size)
    return family


def base_place(name: str) -> str:
    """Where a base model is, as `model_place` has it. Raises WeightsError where it is an adapter, and no model."""
    place = Path(model_place(name))
    if holds_adapter(place) and not (place / "model_index.json").is_file():
        raise WeightsError(
            f"'{name}' is what an adapter learned, not a whole model; make one of it, and name that: sdtune export "
            f"{shlex.quote(name)} --format merged --out FOLDER"
        )
    return str(place) if place.exists() else name


def facts(recipe: Recipe) -> dict[str, Any]:
    """What sdtune.json notes beside weights: enough to open their model again with `open_facts`."""
    notes = {"adapter": recipe.adapter.kind, "task": recipe.task, **recipe.model.model_dump()}
    return notes | {
        "max_tokens": recipe.images.max_tokens,
        "prediction": recipe.objective.prediction,
        "zero_terminal_snr": recipe.objective.zero_terminal_snr,
        "seed": recipe.train.seed,
        "size": list(picture_size(recipe)),
    }


def open_facts(notes: Mapping[str, Any]) -> Family:
    """The model that weights were trained on, from the notes beside them."""
    model = ModelSettings(**{key: value for key, value in notes.items() if key in ModelSettings.model_fields})
    return open_family(
        model,
        seed=notes.get("seed", 0),
        max_tokens=notes.get("max_tokens", 75),
        prediction=notes.get("prediction", "auto"),
        zero_terminal_snr=notes.get("zero_terminal_snr", False),
        size=notes.get("size"),
    )


def check_size(family: Family, height: int, width: int) -> None:
    """Raises UsageError where a picture of that size is too small, has no whole number of latents, or is not of the
    size that a network of pixels draws."""
    check_smallest(family, height, width, "images.resolution")
    if height % family.factor or width % family.factor:
        raise UsageError(
            f"images.resolution: got {height} x {width}, but a latent of this VAE stands for {family.factor} x "
            f"{family.factor} pixels; expected multiples of {family.factor}"
        )
    if family.autoencoder is None and (own := family.picture_size()) != (height, width):
        raise UsageError(
            f"images.resolution: got {height} x {width}, but the network says that it is for {own[0]} x {own[1]} and "
            f"will draw that; set images.resolution=[{own[0]},{own[1]}], or anew model.from_config.denoiser.size"
        )


def check_smallest(family: Family, height: int, width: int, key: str) -> None:
    """Raises UsageError, which names `key`, where a picture of that size is too small for the network."""
    if min(height, width) < family.smallest:
        raise UsageError(
            f"{key}: got {height} x {width}, but this network halves its pictures; expected sides of "
            f"{family.smallest} or more"
        )


def frozen_dtype(device: torch.device, precision: str, adapter: Adapter | None = None) -> torch.dtype | None:
    """What weights that do not learn are rounded to: half precision on a GPU, if nobody writes them; None: nothing."""
    if device.type != "cuda" or (adapter is not None and adapter.writes_base):
        return None
    return HALVES.get(precision)


def quantize_frozen(recipe: Recipe, family: Family, device: torch.device) -> None:
    """Pack what `model.quantize` names, on the device where it will be used. Call it before the adapter is attached."""
    if recipe.model.quantize is not None:
        for name in (family.denoiser, *family.text_encoders):
            quantize(family.modules[name], recipe.model.quantize, device)


def choose_attention(recipe: Recipe, family: Family, device: torch.device) -> None:
    """Let the networks attend as `train.attention` says. Raises UsageError where that cannot run."""
    if recipe.train.attention != "sdpa":
        dtype = HALVES.get(recipe.train.precision, torch.float32)
        for network in family.modules.values():
            use_kernel(network, recipe.train.attention, device, dtype)


def place(family: Family, device: torch.device, half: torch.dtype | None) -> None:
    """Networks to their device, what does not learn as `half`, but for the VAE, whose pictures suffer from it.

    Call it after the adapter is attached.
    """
    for name, network in family.modules.items():
        move(network, device, None if name == family.autoencoder else half)


def move(network: nn.Module, device: torch.device, half: torch.dtype | None) -> None:
    """A network to its device, frozen weights as `half`: one by one, so that no second copy stands beside it."""
    for parameter in network.parameters():
        frozen = half is not None and not parameter.requires_grad
        parameter.data = parameter.data.to(device=device, dtype=half if frozen else parameter.dtype)
    network.to(device)  # the buffers


@contextmanager
def decoding(family: Family, device: torch.device) -> Iterator[None]:
    """Within: the autoencoder, if there is one, is on that device; afterwards where it was."""
    if family.autoencoder is None:
        yield
        return
    network = family.modules[family.autoencoder]
    before = network.device
    network.to(device)
    try:
        yield
    finally:
        network.to(before)


def make_adapter(recipe: Recipe) -> Adapter:
    """What learns: the adapter, and tokens beside it if there are some."""
    settings = recipe.adapter
    values = {name: getattr(settings, name) for name in SETTINGS[settings.kind] if name not in NETWORKS}
    tokens = [Token(**one.model_dump()) for one in values.pop("tokens", None) or ()]
    if values.get("init_from") is not None:
        values["init_from"] = weights_folder(Path(resolve_asset(values["init_from"])))
    place = values.get("init_from")
    if settings.kind == "textual-inversion":
        if place and place.is_dir() and holds_lora(place):
            raise UsageError(
                f"adapter.init_from: '{place}' has a LoRA beside its tokens, which textual inversion would leave out; "
                "let both learn on with adapter.kind=lora (or what it was), or name the one file to begin with: "
                "adapter.init_from=FILE"
            )
        return TextualInversion(tokens, place)
    adapter = adapter_class(settings.kind)(**values)
    if not tokens and not (place and embedding_files(place)):
        return adapter
    return Together([adapter, TextualInversion(tokens, place if place and token_files(place) else None)])


def check_tokens(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raises DataError where a token that shall learn stands in no caption."""
    captions = all_captions(sources)
    for one in recipe.adapter.tokens or ():
        if not any(one.token.lower() in caption.lower() for caption in captions):
            raise DataError(
                f"'{one.token}' shall learn (adapter.tokens) and stands in none of the {len(captions)} captions, the "
                f"first of which is '{captions[0]}'; write it where the thing is, or give every picture one caption: "
                f"data.0.prompt='a photo of {one.token}'"
            )


def all_captions(sources: Sequence[Source]) -> list[str]:
    """Every caption of every picture."""
    return [caption for source in sources for picture in source.pictures for caption in picture.captions]


def check_classes(family: Family, sources: Sequence[Source]) -> None:
    """Raises DataError where a caption is none of the classes that the model knows."""
    if not family.classes:
        return
    captions, known = all_captions(sources), set(family.classes)
    unknown = [caption for caption in captions if caption not in known]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(captions)} captions are no class of the model, the first is '{unknown[0]}'; it "
            f"knows {', '.join(family.classes)} (model.from_config.denoiser.classes)"
        )


def learning_networks(recipe: Recipe, family: Family) -> list[str]:
    """Names of the networks that the adapter is attached to. (Tokens find their text encoders by themselves.)"""
    if recipe.task == "autoencoding" and family.autoencoder is not None:
        return [family.autoencoder]
    return [family.denoiser, *(family.text_encoders if recipe.adapter.text_encoder else ())]


def gradient_networks(recipe: Recipe, family: Family) -> list[str]:
    """Names of the networks that gradients go through, though not all of them may learn."""
    if recipe.adapter.tokens:
        return [family.denoiser, *family.text_encoders]
    return learning_networks(recipe, family)


def learning_rates(recipe: Recipe, family: Family, groups: Iterable[str]) -> dict[str, float]:
    """The learning rate of each group of parameters that an adapter attaches, by the group's name."""
    settings = recipe.optimizer
    text_lr = settings.lr if settings.text_encoder_lr is None else settings.text_encoder_lr
    own = dict.fromkeys(family.text_encoders, text_lr)
    own[TOKENS] = settings.lr if settings.token_lr is None else settings.token_lr
    return {group: own.get(group, settings.lr) for group in groups}


def phases(recipe: Recipe) -> list[tuple[int, int]]:
    """The parts of a run in which the same networks learn: steps [first, stop) each."""
    steps = recipe.train.steps
    changes = (recipe.adapter.text_encoder_until, recipe.adapter.denoiser_from)
    return list(pairwise(sorted({0, steps, *(step for step in changes if step is not None and step < steps)})))


def learns_at(recipe: Recipe, family: Family, name: str, step: int) -> bool:
    """Whether what the adapter attached to a network learns at a step (from 0)."""
    if name == family.denoiser:
        return step >= (recipe.adapter.denoiser_from or 0)
    until = recipe.adapter.text_encoder_until
    return name not in family.text_encoders or until is None or step < until


def make_task(recipe: Recipe, family: Family, stores: Stores | None = None) -> Task:
    """What is learned; call it after the adapter is attached. `stores` hold what was encoded before."""
    if recipe.task == "autoencoding":
        settings = recipe.reconstruction
        return AutoencodingTask(family, l1=settings.l1, l2=settings.l2, kl=settings.kl)
    if recipe.images.masks is not None and not family.inpaints:
        raise UsageError(
            "images.masks says what an inpainting model does not see, and this model is one of text to image; remove "
            "it, or make it one for inpainting: model.inpaint=true adapter.kind=full"
        )
    return DenoisingTask(
        family,
        objective=make_objective(recipe, family),
        cache=recipe.train.cache,
        cache_text=recipe.train.ema is None or not recipe.adapter.text_encoder,
        own_masks=recipe.images.masks == "given",
        stores=stores,
    )


def make_objective(recipe: Recipe, family: Family) -> Objective:
    """How a denoiser's answers are judged; what the network predicts is the family's.

    Raises:
        UsageError: it predicts the score, whose loss is one of its own, and there are settings of other losses.
    """
    settings = recipe.objective.model_dump(exclude={"prediction", "zero_terminal_snr"})
    objective = Objective(**settings)
    if family.schedule.prediction is Prediction.SCORE and objective != PLAIN:
        given = [f"objective.{name}" for name, value in settings.items() if value != getattr(PLAIN, name)]
        raise UsageError(
            f"{given[0]}: the model predicts {Prediction.SCORE.value}, whose loss is the squared error summed over the "
            f"pixels, as it stands; remove {' and '.join(given)}"
        )
    return objective


def make_source(recipe: Recipe, settings: DataSource) -> Source:
    """Find the pictures of one entry of the recipe's `data`."""
    return load_source(
        path=resolve_asset(settings.path) if settings.path else None,
        hub=settings.hub,
        split=settings.split,
        image_column=settings.image_column,
        text_column=settings.text_column,
        prompt=settings.prompt,
        role=settings.role,
        repeats=settings.repeats,
        weight=settings.weight,
        key=f"data.{recipe.data.index(settings)}",
        without=other_folders(recipe, settings),
    )


def other_folders(recipe: Recipe, settings: DataSource) -> list[str]:
    """Real paths of what is no part of an entry of `data`, though it lie in its folder: pictures of other roles."""
    others = [each.path for each in recipe.data if each.path is not None and each.role != settings.role]
    return [os.path.realpath(resolve_asset(path)) for path in (*others, recipe.train.cache_dir) if path is not None]


def make_buckets(recipe: Recipe, factor: int) -> Buckets | None:
    """The sizes that pictures may have; None where all have one.

    Args:
        factor: how many pixels lie along the side of a latent.

    Raises:
        UsageError: a size would have no whole number of latents.
    """
    settings, (height, width) = recipe.images, picture_size(recipe)
    if not settings.buckets:
        return None
    step = settings.bucket_step or default_step(height, width, factor)
    if step % factor:
        raise UsageError(
            f"images.bucket_step: got {step}, but a latent of this VAE stands for {factor} x {factor} pixels; expected "
            f"a multiple of {factor}"
        )
    return Buckets(height, width, step, settings.bucket_aspect, settings.upscale)


def make_training_set(
    recipe: Recipe,
    sources: Sequence[Source],
    buckets: Buckets | None = None,
    processes: int = 1,
    known: Known = nothing_known,
) -> TrainingSet:
    """The samples of a run of so many processes; those of `known` latents have no pixels."""
    height, width = picture_size(recipe)
    return TrainingSet(
        sources,
        height=height,
        width=width,
        buckets=buckets,
        together=recipe.train.batch_size * recipe.train.accumulate * processes,
        crop=recipe.images.crop,
        flip=recipe.images.flip,
        caption_dropout=recipe.images.caption_dropout,
        tag_shuffle=recipe.images.tag_shuffle,
        keep_tags=recipe.images.keep_tags,
        seed=recipe.train.seed,
        background=recipe.images.background,
        masks=reads_masks(recipe),
        known=known,
    )


def make_held_out(
    recipe: Recipe,
    sources: Sequence[Source],
    count: int,
    batch_size: int,
    buckets: Buckets | None = None,
    known: Known = nothing_known,
) -> list[Batch]:
    """Batches of at most `count` pictures, as they are measured: without chance, each of one size."""
    masks, size = reads_masks(recipe), picture_size(recipe)
    examples = validation_examples(sources, *size, count, recipe.images.background, masks, buckets, known)
    frames: dict[Size, list[Example]] = {}
    for example in examples:
        frames.setdefault(example.frame, []).append(example)
    return [
        collate([[example] for example in some[first : first + batch_size]])
        for some in frames.values()
        for first in range(0, len(some), batch_size)
    ]


def check_masks(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raises DataError where masks are asked for and no instance picture has one."""
    if reads_masks(recipe) and not any(p.mask for s in sources if s.role == "instance" for p in s.pictures):
        key = "objective.outside_mask" if recipe.objective.outside_mask is not None else "images.masks"
        raise DataError(
            f"{key} is set, and no picture has a mask, which is a picture of the same size, white where the subject "
            "is; name one in each row of metadata.jsonl (mask_file_name), put a .mask.png beside each picture of a "
            f"shard, or a column {MASK!r} of pictures into a table, or remove {key}"
        )


def unused_masks(recipe: Recipe, sources: Sequence[Source]) -> list[Finding]:
    """A note on the masks of instance pictures that a denoising run does not read."""
    if recipe.task != "denoising" or reads_masks(recipe):
        return []
    names = [p.name for s in sources if s.role == "instance" for p in s.pictures if p.mask is not None]
    return about(
        "note",
        "unused masks",
        names,
        "pictures with a mask that is not used",
        "to learn less of what is outside of it set objective.outside_mask=0.1; for inpainting images.masks=given",
    )


def make_shown(recipe: Recipe, sources: Sequence[Source], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the samples of an inpainting run start from: pictures, (count, 3, H, W), and masks, (count, 1, H, W).

    What is hidden of each is what its own mask says, or the middle, where masks are drawn at random.
    """
    height, width = picture_size(recipe)
    examples = validation_examples(sources, height, width, count, recipe.images.background, reads_masks(recipe))
    middle = torch.zeros(1, height, width, dtype=torch.uint8)
    middle[:, height // 4 : -(height // 4), width // 4 : -(width // 4)] = 255
    pixels = [example.pixels for example in examples if example.pixels is not None]
    masks = [middle if recipe.images.masks != "given" or e.mask is None else e.mask for e in examples]
    turns = [i % len(pixels) for i in range(count)]
    return torch.stack(pixels)[turns], torch.stack(masks)[turns]


def reads_masks(recipe: Recipe) -> bool:
    """Whether the masks of pictures are used."""
    return recipe.objective.outside_mask is not None or recipe.images.masks == "given"


def picture_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the training pictures, in pixels."""
    size = recipe.images.resolution
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def compile_denoiser(family: Family) -> None:
    """Let torch.compile translate the denoiser when it is first called; its names and weights stay."""
    family.modules[family.denoiser].compile(backend=COMPILER)


def save_memory(networks: Sequence[nn.Module]) -> None:
    """Gradient checkpointing: activations are computed again in the backward pass instead of kept.

    Raises:
        UsageError: a network has nothing that could be.
    """
    for network in networks:
        kind: Any = network.train()  # in evaluation mode they are kept
        if not getattr(kind, "_supports_gradient_checkpointing", True):
            raise UsageError(f"train.gradient_checkpointing: {type(kind).__name__} is too small to have it; remove it")
        if hasattr(kind, "enable_gradient_checkpointing"):
            kind.enable_gradient_checkpointing()  # diffusers' models
        elif hasattr(kind, "activation_checkpointing_enable"):
            kind.activation_checkpointing_enable()  # transformers' since 5.22
        else:
            kind.gradient_checkpointing_enable()
