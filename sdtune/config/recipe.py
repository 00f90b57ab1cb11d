"""The settings of a run. Each is described at its field; the reference page is made from here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Count = Annotated[int, Field(ge=1)]
Part = dict[str, Any] | str
SMALLEST_SIDE = 8  # pixels
TARGET_PRESETS = ("attention", "attention+feedforward", "all")


class Section(BaseModel):
    """Settings that belong together: unknown keys are refused, values are taken as they are written."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


class ModelSettings(Section):
    """Which model is trained. Exactly one of `base` and `from_config`."""

    family: str = Field("stable-diffusion", description="Kind of model: a name of sdtune.families.FAMILIES.")
    base: str | None = Field(
        None,
        description="Where to start: a hub id, a diffusers folder, a single .safetensors file (SD 1.x, 2.x, XL), or "
        "`tiny`, the small model that comes along.",
    )
    from_config: dict[str, Part] | None = Field(
        None,
        description="Start from scratch: for each of unet, vae, text_encoder, tokenizer and scheduler (family pixel: "
        "denoiser and scheduler) its configuration values, or the folder or hub id to load that part from. A text "
        "encoder is a CLIPTextModel, or what its `_class_name` or its own config.json says: BertModel, T5EncoderModel.",
    )
    vae: str | None = Field(None, description="Folder, hub id or single file of another VAE than the base's.")
    variant: str | None = Field(None, description="Variant of the weight files, such as fp16.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    allow_pickle: bool = Field(
        False, description="Whether base and vae may be pickles (.ckpt, .pt); only tensors are read from them."
    )
    inpaint: bool = Field(
        False,
        description="Make a base of text to image one for inpainting: its UNet gets the input channels for a mask and "
        "the masked picture, with weights of zero.",
    )
    clip_skip: int = Field(0, ge=0, description="Layers left out at the end of the text encoder.")
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="Keep the frozen linear layers of the denoiser and the text encoders in 4 or 8 bits while a LoRA "
        "or a relative learns; null: as they are.",
    )


class LearnedToken(Section):
    """A new word, which learns its embedding."""

    token: str = Field(min_length=1, description="How it is written in captions and prompts.", examples=["<cat>"])
    initializer: str | None = Field(
        None, description="A word whose embedding it begins with; null: drawn like the embeddings that there are."
    )
    vectors: int = Field(1, ge=1, le=75, description="Embeddings it has; they stand where so many words would.")


class AdapterSettings(Section):
    """Which parameters learn."""

    kind: str = Field("lora", description="A name of sdtune.adapters.ADAPTERS; full: every parameter.")
    init_from: str | None = Field(
        None,
        description="File, folder or run with the factors, and the tokens (adapter.tokens names each), to begin with, "
        "in any format that `sdtune sample` reads.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        validate_default=True,
        description="LoRA and its relatives: width of the factors; null: 16, or that of adapter.init_from.",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        validate_default=True,
        description="LoRA and its relatives: the update is scaled by alpha / rank (rslora: alpha / sqrt(rank)); null: "
        "the rank, or that of adapter.init_from.",
    )
    targets: str | list[str] = Field(
        "attention",
        description="LoRA and its relatives: attention, attention+feedforward, all (convolutions too), or a list of "
        "module names of the denoiser.",
    )
    factor: int = Field(-1, description="LoKr: about the side of the first matrix, at most; -1: near the square root.")
    text_encoder: bool = Field(False, description="Whether the text encoder learns too.")
    text_encoder_until: int | None = Field(
        None, ge=1, description="Step after which the text encoder no longer learns; null: it learns to the end."
    )
    denoiser_from: int | None = Field(
        None, ge=1, description="Step after which the denoiser begins to learn; null: it learns from the start."
    )
    decoder_only: bool = Field(
        False, description="Task autoencoding: only the VAE's decoder learns, so that its latents stay what they are."
    )
    tokens: list[LearnedToken] | None = Field(
        None,
        min_length=1,
        description="Words that are learned: alone with kind textual-inversion, or beside LoRA and its relatives "
        "(pivotal tuning).",
    )

    @field_validator("rank")
    @classmethod
    def _rank_is_16(cls, rank: int | None, info: ValidationInfo) -> int | None:
        return 16 if rank is None and info.data.get("init_from") is None else rank

    @field_validator("alpha")
    @classmethod
    def _alpha_is_rank(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        rank, begins = info.data.get("rank"), info.data.get("init_from") is not None
        return float(rank) if alpha is None and rank is not None and not begins else alpha


class Objective(Section):
    """What the loss of a denoiser is."""

    prediction: Literal["auto", "epsilon", "v_prediction", "sample", "ve_score"] = Field(
        "auto",
        description="What the network predicts (sample: the clean latents; ve_score: the score under variance "
        "exploding noise, family pixel); auto: what its scheduler says.",
    )
    loss: Literal["l2", "l1", "huber"] = Field("l2", description="Squared or absolute error, or Huber's mixture.")
    huber_delta: float = Field(0.1, gt=0, description="Error at which Huber's loss turns from a parabola into a line.")
    snr_gamma: float | None = Field(None, gt=0, description="Clamp of min-SNR weighting, 5.0 in the paper; null: none.")
    debiased: bool = Field(False, description="Weigh timesteps by 1 / sqrt(SNR) (of the error of epsilon).")
    offset_noise: float = Field(
        0.0, ge=0, description="Noise that is one number for a whole channel, added to the noise; 0.05 to 0.1 is usual."
    )
    input_perturbation: float = Field(
        0.0, ge=0, description="Noise that the network sees and is not asked for; 0.1 in the paper."
    )
    zero_terminal_snr: bool = Field(
        False,
        description="Let the noise schedule end in pure noise, and sample so (DDIM, trailing); not with epsilon.",
    )
    outside_mask: float | None = Field(
        None, ge=0, le=1, description="Weight of the loss outside of the pictures' masks; null: masks are not used."
    )


class Reconstruction(Section):
    """What the loss of an autoencoder is: a weighted sum."""

    l1: float = Field(1.0, ge=0, description="Weight of the absolute error.")
    l2: float = Field(1.0, ge=0, description="Weight of the squared error.")
    kl: float = Field(1e-4, ge=0, description="Weight of the KL divergence, mean over the latent elements.")


class Drawing(Section):
    """How the base draws class pictures."""

    steps: int = Field(25, ge=1, le=1000, description="Sampling steps.")
    guidance: float = Field(7.5, ge=0, description="Guidance scale.")


class DataSource(Section):
    """Pictures, on this machine or on the hub. Exactly one of `path` and `hub`."""

    path: str | None = Field(
        None,
        description="Folder of pictures with metadata.jsonl, .csv or .txt files, WebDataset shards, parquet files, or "
        "a hub id; assets:demo is the set that ships with sdtune.",
    )
    hub: str | None = Field(None, description="Id of a data set on the hub.")
    split: str = Field("train", description="Split of the data set.")
    image_column: str = Field("image", description="Column of the pictures (hub).")
    text_column: str = Field("text", description="Column of the captions, or of classes, whose names are captions.")
    prompt: str | None = Field(None, description="The caption of every picture, in place of the data set's own.")
    role: Literal["instance", "class", "validation"] = Field(
        "instance",
        description="instance: what is learned; class: what is kept (prior preservation); validation: only measured.",
    )
    repeats: int = Field(1, ge=1, description="How often each picture comes in an epoch.")
    weight: float = Field(1.0, ge=0, description="Weight of these pictures in the loss.")
    generate: int | None = Field(
        None, ge=1, description="Role class: the base draws pictures into `path` until there are so many."
    )
    drawing: Drawing | None = Field(None, description="How they are drawn; null: in 25 steps with guidance 7.5.")
    prompts: str | None = Field(None, description="Role class: text file, one prompt a line, used in turn.")


class Images(Section):
    """How a picture becomes pixels, and a caption becomes tokens."""

    resolution: int | list[int] = Field(512, description="Side of the training crop, or [height, width], in pixels.")
    crop: Literal["center", "random"] = Field("center", description="Where the crop is taken.")
    flip: bool = Field(False, description="Mirror half of the pictures, drawn anew each epoch.")
    buckets: bool = Field(
        False, description="Train pictures in several shapes of about the resolution's area: less is cut away."
    )
    bucket_step: int | None = Field(
        None, ge=8, multiple_of=8, description="Sides of these shapes are multiples of it; null: 64, less below 512 px."
    )
    bucket_aspect: float = Field(2.0, ge=1, description="Longest side of these shapes, in shorter sides.")
    upscale: bool = Field(False, description="Enlarge pictures that are too small for the area, with buckets.")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="Share of captions that are emptied.")
    tag_shuffle: bool = Field(False, description="Captions are tags with commas between: shuffle them each time.")
    keep_tags: int = Field(0, ge=0, description="How many of the first tags stay where they are.")
    max_tokens: Literal[75, 150, 225] = Field(75, description="Tokens of a caption that are read, in chunks of 75.")
    masks: Literal["random", "given"] | None = Field(
        None,
        description="What an inpainting model does not see of a picture: rectangles and strokes at random, or what is "
        "white in its mask (mask_file_name); null: random. What it sees is encoded at every step, never cached.",
    )
    background: str = Field("white", description="Colour behind transparent pictures: a name or #rrggbb.")

    @field_validator("resolution")
    @classmethod
    def _sides(cls, resolution: int | list[int]) -> int | list[int]:
        sides = [resolution] if isinstance(resolution, int) else resolution
        if len(sides) != (1 if isinstance(resolution, int) else 2) or min(sides) < SMALLEST_SIDE:
            raise ValueError(f"expected at least {SMALLEST_SIDE}, or [height, width]")
        return resolution


class OptimizerSettings(Section):
    """How the parameters move."""

    name: Literal["adamw", "adamw8bit", "lion8bit", "adafactor", "prodigy", "schedulefree"] = Field(
        "adamw",
        description="The optimizer; adamw8bit and lion8bit keep their state in 8 bits, adafactor hardly any; prodigy "
        "finds the rate itself; schedulefree is an AdamW that averages instead of lowering its rate.",
    )
    lr: float = Field(
        gt=0,
        description="Learning rate: with prodigy 1.0, with lion8bit a third to a tenth of AdamW's.",
        examples=[1e-4],
    )
    text_encoder_lr: float | None = Field(None, gt=0, description="Learning rate of the text encoder; null: lr.")
    token_lr: float | None = Field(None, gt=0, description="Learning rate of adapter.tokens; null: lr.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=lambda values: [0.9, 0.99 if values.get("name") == "lion8bit" else 0.999],
        min_length=2,
        max_length=2,
        description="Decay of the two running means; by default 0.9 and 0.999, with lion8bit 0.99.",
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after the warmup; linear and cosine end at 0."
    )
    warmup: int = Field(0, ge=0, description="Steps in which the rate rises from 0.")
    clip: float | None = Field(1.0, gt=0, description="Largest norm of the gradient; null: not clipped.")


class TrainSettings(Section):
    """How long and how a run trains."""

    steps: int = Field(ge=1, description="Optimizer steps of the run.", examples=[1000])
    batch_size: int = Field(1, ge=1, description="Samples of a micro-batch, on each process.")
    accumulate: int = Field(1, ge=1, description="Micro-batches of a step.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Number format of the computation.")
    seed: int = Field(0, ge=0, description="Every random number of the run follows from it.")
    gradient_checkpointing: bool = Field(False, description="Less memory for more time.")
    attention: Literal["sdpa", "xformers"] = Field(
        "sdpa", description="What computes attention: torch's own kernels, or those of xformers (NVIDIA GPUs)."
    )
    compile: bool = Field(
        False,
        description="Let torch.compile make faster code of the denoiser, which takes minutes, on a CPU many; each new "
        "size of pictures takes its own.",
    )
    cache: bool = Field(True, description="Keep latents and text embeddings in memory instead of encoding them anew.")
    cache_dir: str | None = Field(
        None,
        description="Folder where latents and text embeddings are kept on disk, made before the training and shared by "
        "runs; null: none.",
    )
    ema: float | None = Field(None, gt=0, lt=1, description="Decay of the running mean of the weights; null: none.")
    workers: int = Field(0, ge=0, description="Processes that read pictures.")


class Samples(Section):
    """Pictures drawn while training."""

    prompts: list[str] = Field(
        default_factory=list,
        description="One picture each; must be given but for a VAE.",
        examples=[["a photo of a dog"]],
    )
    count: int = Field(
        8,
        ge=1,
        description="Task autoencoding: how many held-out pictures (else of the data) are shown as the VAE gives them "
        "back.",
    )
    seed: int = Field(0, ge=0, description="Seed of the first noise.")
    steps: int = Field(25, ge=1, le=1000, description="Sampling steps.")
    guidance: float = Field(7.5, ge=0, description="Guidance scale.")
    sampler: str | None = Field(None, description="Sampler; null: the model's own.")
    every: int | None = Field(None, ge=1, description="Steps between them; null: validate.every.")


class Validation(Section):
    """What is measured while training."""

    every: int | None = Field(
        None, ge=1, description="Steps between measurements; null: only before the first step and after the last."
    )
    fraction: float = Field(0.0, ge=0, lt=1, description="Share of the instance pictures that is held out.")
    count: int = Field(64, ge=1, description="At most so many held-out pictures are measured.")
    samples: Samples | None = Field(None, description="Pictures drawn while training.")

    @model_validator(mode="after")
    def _samples_follow(self) -> "Validation":
        if self.samples is not None and self.samples.every is None:
            self.samples.every = self.every
        return self


class Output(Section):
    """Where the run is written."""

    dir: str = Field(min_length=1, description="Run folder; it must not exist yet.", examples=["runs/my-run"])
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between checkpoints; null: none.")
    keep_last: int | None = Field(2, ge=1, description="Checkpoints that are kept; null: all.")
    push_to_hub: str | None = Field(
        None, description="Where the result goes on the hub when the training has ended: user/name; null: nowhere."
    )
    private: bool = Field(False, description="Whether nobody else may see it there.")
    trackers: list[
        Literal["tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"]
    ] = Field(["tensorboard"], description="Where the numbers also go, through Accelerate.")
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")


class Recipe(Section):
    """Everything a run is made of. `validate` in the file is `recipe.validation` here: pydantic owns the other name."""

    task: Literal["denoising", "autoencoding"] = Field(
        "denoising", description="denoising: text to image; autoencoding: a VAE, without text."
    )
    model: ModelSettings = Field(description="Which model is trained.", examples=[{"base": "tiny"}])
    adapter: AdapterSettings = Field(default_factory=AdapterSettings, description="Which parameters learn.")
    objective: Objective = Field(default_factory=Objective, description="The loss of a denoiser.")
    reconstruction: Reconstruction = Field(default_factory=Reconstruction, description="The loss of an autoencoder.")
    data: list[DataSource] = Field(min_length=1, description="The pictures.", examples=[[{"path": "photos"}]])
    images: Images = Field(default_factory=Images, description="How pictures and captions are prepared.")
    optimizer: OptimizerSettings = Field(description="How the parameters move.", examples=[{"lr": 1e-4}])
    train: TrainSettings = Field(description="How long and how.", examples=[{"steps": 1000}])
    validation: Validation = Field(default_factory=Validation, alias="validate", description="What is measured.")
    output: Output = Field(description="Where the run is written.", examples=[{"dir": "runs/my-run"}])

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        """`validate:` with nothing below it, or null, is as if it were not there, as other sections are."""
        if not isinstance(values, dict):
            return values
        optional = {f.alias or name for name, f in cls.model_fields.items() if f.default_factory is not None}
        return {key: value for key, value in values.items() if value is not None or key not in optional}
