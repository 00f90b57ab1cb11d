"""What the settings of a recipe demand of each other and of this machine, checked before any work starts."""

from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path

from sdtune.config.memory_checks import is_installed, saving_memory, unread_by_optimizer
from sdtune.config.messages import Fault, show
from sdtune.config.recipe import TARGET_PRESETS, DataSource, Images, Recipe, Section
from sdtune.config.shipped import TINY, resolve_asset
from sdtune.errors import nearest
from sdtune.hub_access import looks_like_hub_id

DENOISING_ONLY = (
    "objective",
    "model.clip_skip",
    "model.vae",
    "model.inpaint",
    "images.masks",
    "adapter.text_encoder",
    "adapter.text_encoder_until",
    "adapter.denoiser_from",
    "optimizer.text_encoder_lr",
    "images.caption_dropout",
    "images.tag_shuffle",
    "images.keep_tags",
    "images.max_tokens",
)
DRAWING = ("prompts", "seed", "steps", "guidance", "sampler")  # of validate.samples: what a VAE has no use for
TEXT_ENCODERS_ONLY = (
    "model.clip_skip",
    "adapter.text_encoder",
    "adapter.tokens",
    "optimizer.text_encoder_lr",
    "images.max_tokens",
)
BUCKETS_ONLY = ("images.bucket_step", "images.bucket_aspect", "images.upscale")
LOADING_ONLY = ("model.inpaint", "model.variant", "model.revision", "model.vae", "model.allow_pickle")
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def impossible(recipe: Recipe) -> list[Fault]:
    """All faults of settings that are well formed one by one."""
    checks = (
        *(_names, _start, _parts, _paths, _unused, _adapter, _phases, _objective, _sources, _measurements, _schedule),
        *(_images, _cache, saving_memory, _trackers, _hub, _machine),
    )
    return [fault for check in checks for fault in check(recipe)]


def doubtful(recipe: Recipe) -> list[Fault]:
    """Settings with which a run trains, but hardly as was meant. Told, not refused: short runs try a recipe out."""
    steps, warmup = recipe.train.steps, recipe.optimizer.warmup
    if warmup <= steps:
        return []
    what = f"got {warmup} steps, and the run has {steps} (train.steps), so that its learning rate ends at"
    return [("optimizer.warmup", f"{what} {steps / warmup:.0%} of optimizer.lr; set optimizer.warmup={steps // 10}")]


def unused_keys(recipe: Recipe) -> dict[str, str]:
    """Dotted keys that this run would not read, and why. They are refused in a recipe and left out of run.yaml."""
    keys: dict[str, str] = {}
    if recipe.task == "autoencoding":
        why = "an autoencoding run has no text and no timesteps; remove it"
        keys |= dict.fromkeys(DENOISING_ONLY, why)
        keys["train.compile"] = "is for a denoiser, and an autoencoding run has none; remove it"
        if recipe.validation.samples is not None:
            keys |= dict.fromkeys((f"validate.samples.{name}" for name in DRAWING), why)
        keys["train.cache_dir"] = "an autoencoding run changes the VAE in each step, and the latents with it; remove it"
    else:
        keys["reconstruction"] = "is read by task: autoencoding only; remove it"
        keys["adapter.decoder_only"] = "is read by task: autoencoding only; remove it"
        if recipe.validation.samples is not None:
            keys["validate.samples.count"] = "is read by task: autoencoding only; remove it"
        if not recipe.adapter.text_encoder:
            why = "is read with adapter.text_encoder=true only; set that or remove it"
            keys |= dict.fromkeys(("adapter.text_encoder_until", "adapter.denoiser_from"), why)
        if recipe.objective.loss != "huber":
            keys["objective.huber_delta"] = "is read by objective.loss: huber only; remove it"
    keys |= _unread_without(recipe)
    keys |= _unread_by(recipe.adapter.kind)
    keys |= unread_by_optimizer(recipe)
    if not recipe.images.buckets:
        keys |= dict.fromkeys(BUCKETS_ONLY, "is read with images.buckets: true only; remove it")
    if not recipe.images.tag_shuffle:
        keys.setdefault("images.keep_tags", "is read with images.tag_shuffle: true only; remove it")
    if recipe.output.push_to_hub is None:
        keys["output.private"] = "is read with output.push_to_hub only; remove it"
    if recipe.model.from_config is not None:
        keys |= dict.fromkeys(LOADING_ONLY, "is read with model.base only; remove it")
    if recipe.adapter.decoder_only:
        keys["reconstruction.kl"] = "the encoder, which it is for, does not learn (adapter.decoder_only); remove it"
    return keys


def _unread_without(recipe: Recipe) -> dict[str, str]:
    """Settings of text encoders and VAEs, where the family has none."""
    from sdtune.families import PARTS

    family = recipe.model.family
    parts, keys = PARTS.get(family, ("text_encoder", "vae")), dict[str, str]()
    if "text_encoder" not in parts:
        keys |= dict.fromkeys(TEXT_ENCODERS_ONLY, f"a model of family {family} has no text encoder; remove it")
    if "vae" not in parts:
        keys |= dict.fromkeys(("model.vae", "train.cache_dir"), f"a model of family {family} has no VAE; remove it")
    return keys


def _unread_by(kind: str) -> dict[str, str]:
    """Settings of other kinds of adapters than this."""
    from sdtune.adapters import SETTINGS

    readers = {name: [kind for kind, names in SETTINGS.items() if name in names] for name in sum(SETTINGS.values(), ())}
    return {
        f"adapter.{name}": f"is read by adapter.kind: {', '.join(kinds)} only; remove it"
        for name, kinds in readers.items()
        if kind in SETTINGS and kind not in kinds
    }


def is_given(section: Section, key: str) -> bool:
    """Whether a dotted key stands in the file, and not as null."""
    first, _, rest = key.partition(".")
    name = next((n for n, field in type(section).model_fields.items() if (field.alias or n) == first), first)
    if name not in section.model_fields_set or getattr(section, name) is None:
        return False
    return is_given(getattr(section, name), rest) if rest else True


def _unused(recipe: Recipe) -> Iterator[Fault]:
    for key, why in unused_keys(recipe).items():
        if is_given(recipe, key):
            yield key, why


def known_names() -> dict[str, list[str]]:
    """The settings that name something of a dict, and what they can name."""
    from sdtune.adapters import ADAPTERS
    from sdtune.families import FAMILIES, SAMPLERS

    return {
        "model.family": list(FAMILIES),
        "adapter.kind": list(ADAPTERS),
        "validate.samples.sampler": list(SAMPLERS),
    }


def _names(recipe: Recipe) -> Iterator[Fault]:
    given = {"model.family": recipe.model.family, "adapter.kind": recipe.adapter.kind}
    samples = recipe.validation.samples
    if samples is not None and samples.sampler is not None:
        given["validate.samples.sampler"] = samples.sampler
    for key, got in given.items():
        known = known_names()[key]
        if got not in known:
            yield key, f"got '{got}', expected one of {', '.join(known)}; {nearest(got, known)}"


def _start(recipe: Recipe) -> Iterator[Fault]:
    model = recipe.model
    if model.base is None and model.from_config is None:
        expected = "a hub id, a diffusers folder, a .safetensors file or tiny (from scratch: model.from_config)"
        yield "model.base", f"missing; expected {expected}"
    for key in ("variant", "revision"):
        if str(model.base).endswith(FILES) and getattr(model, key) is not None:
            yield f"model.{key}", "is read with a folder or hub id only, and model.base is a single file; remove it"
    if model.allow_pickle and not any(str(name).endswith(FILES[1:]) for name in (model.base, model.vae)):
        yield "model.allow_pickle", "is read with a pickle (.ckpt, .pt) as base or vae only; remove it"
    if model.base is not None and model.from_config is not None:
        yield "model.base", "got both model.base and model.from_config, expected one of them"


def _parts(recipe: Recipe) -> Iterator[Fault]:
    from sdtune.families import PARTS

    parts = recipe.model.from_config
    if parts is None or recipe.model.family not in PARTS:
        return
    needed: tuple[str, ...] = PARTS[recipe.model.family]
    if recipe.task == "autoencoding":
        needed = ("vae",)
    for name in parts:
        if name not in needed:
            yield f"model.from_config.{name}", f"unknown key; {nearest(name, needed)}"
    learner = next((name for name in ("unet", "denoiser") if isinstance(parts.get(name), dict)), None)
    if recipe.adapter.kind != "full" and learner is not None:
        what = f"got {recipe.adapter.kind}, but model.from_config.{learner} makes random weights, which only full"
        yield "adapter.kind", f"{what} training changes; set adapter.kind=full, or name a model with model.base"
    for name in needed:
        if name not in parts:
            yield f"model.from_config.{name}", "missing; expected configuration values, or a folder or hub id to load"


def _paths(recipe: Recipe) -> Iterator[Fault]:
    model = recipe.model
    names: dict[str, object] = {"model.base": model.base, "model.vae": model.vae}
    names |= {f"model.from_config.{part}": value for part, value in (model.from_config or {}).items()}
    for key, name in names.items():
        if isinstance(name, str) and not could_be_model(name):
            yield key, f"'{name}' does not exist, and is no hub id (user/name); name another with: {key}={_meant(name)}"


def could_be_model(name: str) -> bool:
    """Whether a name is the embedded base, a path that exists, a web address or has the form of a hub id."""
    if name == TINY or Path(resolve_asset(name)).exists() or "://" in name:
        return True
    return looks_like_hub_id(name)


def _meant(name: str, otherwise: str = "FOLDER") -> str:
    """A path that is not there as it is with slashes, where it has backslashes, as Windows writes them; or a word."""
    slashed = name.replace("\\", "/")
    return slashed if slashed != name and Path(slashed).exists() else otherwise


def _adapter(recipe: Recipe) -> Iterator[Fault]:
    adapter = recipe.adapter
    if recipe.task == "autoencoding" and adapter.kind != "full":
        yield "adapter.kind", f"got '{adapter.kind}', expected full: an autoencoding run trains the VAE itself"
    if adapter.init_from is not None and not Path(resolve_asset(adapter.init_from)).exists():
        what = f"'{adapter.init_from}' does not exist; name a LoRA file, or a folder or run"
        yield "adapter.init_from", f"{what}: adapter.init_from={_meant(adapter.init_from)}"
    if adapter.factor < 2 and adapter.factor != -1:
        yield "adapter.factor", f"got {adapter.factor}, expected at least 2, or -1 for near the square root"
    if recipe.model.inpaint and adapter.kind != "full":
        yield "model.inpaint", "the new input channels learn with adapter.kind=full only; or take an inpainting base"
    if adapter.targets == [] or isinstance(adapter.targets, str) and adapter.targets not in TARGET_PRESETS:
        expected = f"one of {', '.join(TARGET_PRESETS)}, or a list of module names"
        yield "adapter.targets", f"got {show(adapter.targets)}, expected {expected}"
    tokens = [one.token for one in adapter.tokens or ()]
    if adapter.kind == "textual-inversion" and not tokens:
        yield "adapter.tokens", "missing; expected the words to learn, such as 'adapter.tokens=[{token: <cat>}]'"
    for number, token in enumerate(tokens):
        if token.split() != [token] or token in tokens[:number]:
            expected = "one word without spaces, that is not there twice"
            yield f"adapter.tokens.{number}.token", f"got '{token}', expected {expected}"
    if is_given(recipe, "optimizer.token_lr") and not tokens:
        yield "optimizer.token_lr", "no token learns; set adapter.tokens or remove it"
    if is_given(recipe, "optimizer.text_encoder_lr") and not adapter.text_encoder and recipe.task == "denoising":
        yield "optimizer.text_encoder_lr", "the text encoder does not learn; set adapter.text_encoder=true or remove it"


def _phases(recipe: Recipe) -> Iterator[Fault]:
    until, begin, optimizer = recipe.adapter.text_encoder_until, recipe.adapter.denoiser_from, recipe.optimizer.name
    steps = recipe.train.steps
    if begin is not None and begin >= steps:
        what = f"got {begin}, but train.steps is {steps}, so that the denoiser would never learn"
        yield "adapter.denoiser_from", f"{what}; expected less than that, or set train.steps={2 * begin}"
    elif until is not None and begin is not None and begin > until:
        what = f"got {begin}, expected at most {until} (adapter.text_encoder_until)"
        yield "adapter.denoiser_from", f"{what}: between the two nothing would learn"
    if (until or begin) and optimizer in ("prodigy", "schedulefree"):
        key = "text_encoder_until" if begin is None else "denoiser_from"
        yield f"adapter.{key}", f"{optimizer} counts the steps of all networks together; expected optimizer.name=adamw"


def _objective(recipe: Recipe) -> Iterator[Fault]:
    objective = recipe.objective
    if objective.debiased and objective.snr_gamma is not None:
        yield "objective.debiased", "got snr_gamma too; both weigh the timesteps, expected one of them"
    if objective.zero_terminal_snr and objective.prediction == "epsilon":
        why = "epsilon says nothing of the picture where there is nothing but noise"
        yield "objective.zero_terminal_snr", f"{why}; expected objective.prediction=v_prediction (or sample)"


def _sources(recipe: Recipe) -> Iterator[Fault]:
    for number, source in enumerate(recipe.data):
        for key, what in _source(source, number):
            yield f"data.{number}.{key}", what
        other = _same_folder(recipe, source.path, but=source)
        if source.generate and other is not None:
            what = f"got '{source.path}', the folder of data.{other}, and class pictures would be drawn into it"
            yield f"data.{number}.path", f"{what}; name one of its own: data.{number}.path=FOLDER"
    if not any(source.role == "instance" for source in recipe.data):
        yield "data", "no source has role: instance; expected at least one, it is what the run learns"


def _source(source: DataSource, number: int) -> Iterator[Fault]:
    if (source.path is None) == (source.hub is None):
        got = "nothing" if source.path is None else "both path and hub"
        yield "path", f"got {got}, expected a path (folder on this machine) or a hub id, one of the two"
    if source.prompt is not None and source.prompts is not None:
        yield "prompts", "got both prompt and prompts, expected one of them"
    if source.role != "class":
        for key in ("generate", "prompts"):
            if getattr(source, key) is not None:
                yield key, f"is read with role: class only, got role: {source.role}; remove it"
    elif source.prompt is None and source.prompts is None and (source.generate or not _has_captions(source)):
        yield "prompt", "missing; expected a prompt (or prompts, a text file) that says what the class pictures show"
    if source.drawing and not source.generate:
        yield "drawing", "is read with generate only; remove it"
    if source.generate and source.hub:
        yield "generate", "pictures are drawn into a folder, got a hub data set; set path"
    if source.prompts is not None and not Path(resolve_asset(source.prompts)).is_file():
        what = f"'{source.prompts}' does not exist; expected a text file with one prompt a line"
        yield "prompts", f"{what}: data.{number}.prompts={_meant(source.prompts, 'FILE')}"
    if source.path is not None and not source.generate and not _could_be_data(source.path):
        exists = Path(resolve_asset(source.path)).exists()
        what = "is a file, expected a folder, .tar shards or .parquet files" if exists else "does not exist"
        what = f"'{source.path}' {what}; name a folder of pictures and metadata.jsonl"
        yield "path", f"{what}: data.{number}.path={_meant(source.path)}"


def _same_folder(recipe: Recipe, folder: str | None, but: DataSource | None = None) -> int | None:
    """Number of an entry of `data` that has its pictures in that folder."""
    paths = [None if each is but or each.path is None else Path(resolve_asset(each.path)) for each in recipe.data]
    same = [number for number, path in enumerate(paths) if folder and path and path.resolve() == Path(folder).resolve()]
    return same[0] if same else None


def _could_be_data(name: str) -> bool:
    """Whether a name is a folder, an archive, a pattern that finds some, or has the form of a hub id."""
    path = Path(resolve_asset(name))
    if path.exists():
        return path.is_dir() or _is_archive(name)
    return any(map(_is_archive, glob(str(path)))) if has_magic(name) else looks_like_hub_id(name)


def _is_archive(name: str) -> bool:
    return name.lower().endswith((".tar", ".parquet"))


def _has_captions(source: DataSource) -> bool:
    """Whether the captions come from the data set itself, as far as a look at its names tells."""
    path = Path(resolve_asset(source.path or ""))
    if source.hub is not None or not path.is_dir():
        return True
    return any(next(path.rglob(pattern), None) for pattern in ("metadata.*", "*.txt", "*.tar", "*.parquet"))


def _measurements(recipe: Recipe) -> Iterator[Fault]:
    validation = recipe.validation
    held_out = validation.fraction > 0 or any(source.role == "validation" for source in recipe.data)
    if validation.every is not None and not held_out and validation.samples is None:
        ways = "validate.fraction, validate.samples.prompts or a source with role: validation"
        yield "validate.every", f"there is nothing to measure; set {ways}, or validate.every=null for none"


def _schedule(recipe: Recipe) -> Iterator[Fault]:
    scheduler = (recipe.model.from_config or {}).get("scheduler")
    length = scheduler.get("num_train_timesteps", 1000) if isinstance(scheduler, dict) else 1000
    samples = recipe.validation.samples
    if samples is not None and not samples.prompts and recipe.task == "denoising":
        yield "validate.samples.prompts", "missing; expected a list of texts (at least 1)"
    if samples is not None and isinstance(length, int) and samples.steps > length:
        what = f"got {samples.steps}, expected at most {length}: the noise schedule of model.from_config has no more"
        yield "validate.samples.steps", what


def _images(recipe: Recipe) -> Iterator[Fault]:
    from PIL import ImageColor

    from sdtune.families import SIDES

    resolution, step = recipe.images.resolution, SIDES.get(recipe.model.family, 1)
    if any(side % step for side in ([resolution] if isinstance(resolution, int) else resolution)):
        yield "images.resolution", f"got {show(resolution)}, expected a multiple of {step}, or [height, width]"
    try:
        ImageColor.getrgb(recipe.images.background)
    except ValueError:
        yield "images.background", f"got '{recipe.images.background}', expected a colour such as white or '#808080'"
    if recipe.images.buckets:
        yield from _buckets(recipe.images)


def _buckets(images: Images) -> Iterator[Fault]:
    sides = [images.resolution] if isinstance(images.resolution, int) else images.resolution
    step, most = images.bucket_step, max(sides) / min(sides)
    if step is not None and any(side % step for side in sides):
        got = " x ".join(map(str, sides))
        yield "images.bucket_step", f"got {step}, but images.resolution is {got}; expected a number that divides it"
    if most > images.bucket_aspect:
        what = f"got {images.bucket_aspect:g}, but the sides of images.resolution are as 1 to {most:.3g}"
        yield "images.bucket_aspect", f"{what}; expected at least that"


def _cache(recipe: Recipe) -> Iterator[Fault]:
    if recipe.train.cache_dir is None:
        return
    if not recipe.train.cache:
        yield "train.cache_dir", "got a folder and train.cache: false; remove one of them"
    number = _same_folder(recipe, recipe.train.cache_dir)
    if number is not None:
        what = f"got '{recipe.train.cache_dir}', which holds the pictures of data.{number}; expected one of its own"
        yield "train.cache_dir", f"{what}: train.cache_dir=FOLDER"
    if recipe.images.crop == "random":
        what = "each sample is cut out anew, so its latents cannot be made before; set images.crop=center or remove it"
        yield "train.cache_dir", what
    if Path(recipe.train.cache_dir).exists() and not Path(recipe.train.cache_dir).is_dir():
        yield "train.cache_dir", f"'{recipe.train.cache_dir}' is a file, expected a folder; it is made if it is missing"


def _trackers(recipe: Recipe) -> Iterator[Fault]:
    for name in recipe.output.trackers:
        if not is_installed(name):
            yield "output.trackers", f"{name} is not installed; install it with: pip install {name.replace('_', '-')}"


def _hub(recipe: Recipe) -> Iterator[Fault]:
    repo = recipe.output.push_to_hub
    if repo is None:
        return
    if not looks_like_hub_id(repo):
        yield "output.push_to_hub", f"got '{repo}', expected user/name, such as ann/my-dog"
    from huggingface_hub import get_token

    if get_token() is None:
        what = "you are not logged in to the Hub; log in with: hf auth login (or push later: sdtune push RUN user/name)"
        yield "output.push_to_hub", what


def _machine(recipe: Recipe) -> Iterator[Fault]:
    if recipe.train.precision != "fp16":
        return
    import torch

    if not torch.accelerator.is_available():
        yield "train.precision", "got fp16, which needs a GPU, and this machine has none; expected bf16 or fp32"
