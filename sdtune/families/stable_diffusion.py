"""Stable Diffusion 1.x, 2.x, inpainting, and every small model of the same build, such as the embedded tiny base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdtune.diffusion.schedule import NoiseSchedule
from sdtune.errors import UsageError, WeightsError
from sdtune.families import PARTS, fingerprints, single_file, text_encoders
from sdtune.families.base import Conditioning
from sdtune.families.inpainting import masked_channels, with_channels
from sdtune.families.loading import (
    freeze,
    make_network,
    open_network,
    open_part,
    part_folder,
    read_index,
    read_json,
    read_settings,
    vae_subfolder,
)
from sdtune.families.saving import save_network
from sdtune.families.schedulers import SAMPLER, check_settings, scheduler_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StableDiffusion:
    """Family `stable-diffusion`: one text encoder, usually CLIP's, and a UNet over the latents of a VAE.

    Args:
        modules: networks by folder name: unet, vae, text_encoder; a VAE alone is enough for autoencoding.
        tokenizer: that of the text encoder, or None without one.
        scheduler: scheduler_config.json as a dict; None without a UNet.
        clip_skip: how many of the text encoder's last layers are left out.
        max_tokens: 75, 150 or 225: longer captions are encoded in chunks up to this length.
    """

    denoiser = "unet"
    autoencoder = "vae"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    classes: tuple[str, ...] = ()
    smallest = 1  # any multiple of `factor` will do
    text_kinds: Mapping[str, tuple[str, ...]] = {"text_encoder": ("CLIPTextModel", "BertModel", "T5EncoderModel")}
    parts: tuple[str, ...] = PARTS["stable-diffusion"]
    pipeline_names: tuple[str, ...] = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        tokenizer: Any = None,
        scheduler: Mapping[str, Any] | None = None,
        clip_skip: int = 0,
        max_tokens: int = 75,
    ) -> None:
        self.modules: dict[str, Any] = dict(modules)
        self.tokenizers = {"tokenizer": tokenizer} if tokenizer is not None else {}
        self.scheduler = dict(scheduler or {})
        self.clip_skip, self.max_tokens = clip_skip, max_tokens
        freeze(self.modules)

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        base: str,
        *,
        parts: Sequence[str] | None = None,
        vae: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        allow_pickle: bool = False,
        clip_skip: int = 0,
        max_tokens: int = 75,
    ) -> "StableDiffusion":
        """Open a diffusers folder, hub id or single file; see `Family.load`.

        `vae` names another VAE: its own folder, hub id or single file. `allow_pickle` lets single files be .ckpt.
        """
        index = read_index(base, revision, allow_pickle)
        if index.get("_class_name") not in cls.pipeline_names:
            raise WeightsError(
                f"'{base}' is a {index.get('_class_name')}; this family opens {' or '.join(cls.pipeline_names)}. "
                "Set model.family to the one that fits (sdtune recipes ls shows recipes for each)"
            )
        opened = {}
        for part in parts or cls.parts:
            if part == "vae" and vae and Path(vae).is_file():
                config = cls.read_config("vae", base, revision, allow_pickle)
                opened[part] = single_file.open_vae(cls.network_class(part), Path(vae), config, allow_pickle)
            elif part == "vae" and vae:
                opened[part] = cls.open(part, vae, vae_subfolder(vae))
            elif Path(base).is_file():
                opened[part] = cls.open_from_file(part, Path(base), allow_pickle)
            else:
                opened[part] = cls.open(part, base, part, variant=variant, revision=revision)
        return cls.assemble(opened, index, clip_skip, max_tokens)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, seed: int, clip_skip: int = 0, max_tokens: int = 75
    ) -> "StableDiffusion":
        """Networks from scratch. A part given as text is a folder or hub id to open instead.

        Args:
            config: for each part its configuration (a dict) or where to load it from.
            seed: the weights are a pure function of it.
        """
        opened: dict[str, Any] = {}
        first = ("tokenizer", "text_encoder")  # a text encoder asks for its vocabulary, a UNet for the text's width
        for part, value in sorted(config.items(), key=lambda item: [name not in item[0] for name in first]):
            if isinstance(value, str):
                opened[part] = cls.open(part, value, part_folder(value, part))
            elif part == "scheduler":
                check_settings(value)
                opened[part] = SAMPLER | value
            else:
                opened[part] = cls.make(part, dict(value), seed, opened)
        return cls.assemble(opened, {}, clip_skip, max_tokens)

    @classmethod
    def assemble(
        cls, opened: Mapping[str, Any], index: Mapping[str, Any], clip_skip: int, max_tokens: int
    ) -> "StableDiffusion":
        """The family from its opened parts and model_index.json; checks that they fit together."""
        modules = {name: part for name, part in opened.items() if isinstance(part, nn.Module)}
        family = cls(modules, opened.get("tokenizer"), opened.get("scheduler"), clip_skip, max_tokens)
        if {"text_encoder", "tokenizer"} <= opened.keys():
            text_encoders.fit(opened["text_encoder"], opened["tokenizer"])
        if {"unet", "text_encoder"} <= modules.keys():
            family.check_widths()
        return family

    @classmethod
    def open(cls, part: str, base: str, subfolder: str | None, **options: Any) -> Any:
        """One part of a pipeline folder: a network, tokenizer or the scheduler's configuration."""
        if part.startswith("tokenizer"):
            from transformers import AutoTokenizer

            options.pop("variant", None)
            return open_part(AutoTokenizer, base, subfolder, **options)
        if part == "scheduler":
            return read_settings(base, subfolder, "scheduler_config.json", options.get("revision"))
        if part in cls.text_kinds:
            config = read_settings(base, subfolder, "config.json", options.get("revision"))
            kind = cls.network_class(part, config)
            is_part = kind.__name__ not in config.get("architectures", [kind.__name__])  # of a CLIPModel, for instance
            options |= text_encoders.without_dropout(kind)
            return open_network(kind, base, subfolder, is_part=is_part, **options)
        return open_network(cls.network_class(part), base, subfolder, **options)

    @classmethod
    def open_from_file(cls, part: str, file: Path, allow_pickle: bool = False) -> Any:
        """One part of a checkpoint in one file; see `open`."""
        layout = single_file.find_layout(file, allow_pickle)
        if part.startswith("tokenizer"):
            return single_file.open_tokenizer(layout, part)
        if part == "scheduler":
            return cls.open(part, str(layout), part) | single_file.read_prediction(file)
        return single_file.open_network(cls.network_class(part), file, part, allow_pickle)

    @classmethod
    def read_config(cls, part: str, base: str, revision: str | None = None, allow_pickle: bool = False) -> Any:
        """config.json of one part of a base: of a folder, hub id or single file."""
        if Path(base).is_file():
            return read_json(single_file.find_layout(Path(base), allow_pickle) / part / "config.json")
        return read_settings(base, part, "config.json", revision)

    @classmethod
    def make(cls, part: str, config: dict[str, Any], seed: int, opened: Mapping[str, Any]) -> nn.Module:
        """One network from its configuration; a text encoder takes its vocabulary from the tokenizer.

        A UNet whose cross_attention_dim is not the width of the text gets a linear layer between the two.
        """
        kind = cls.network_class(part, config)
        if part in cls.text_kinds:
            config.pop("_class_name", None)
            tokenizer = opened[part.replace("text_encoder", "tokenizer")]
            special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            special |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
            config = {"config": kind.config_class(**special | text_encoders.without_dropout(kind) | config)}
        elif part == "unet" and (width := cls.text_width(opened)) != config.get("cross_attention_dim", width):
            config = {"encoder_hid_dim": width, "encoder_hid_dim_type": "text_proj"} | config
        return make_network(kind, config, seed, part)

    @classmethod
    def build(cls, part: str, config: Mapping[str, Any]) -> Any:
        """See `Family.build`."""
        return cls.network_class(part).from_config(config)

    @staticmethod
    def inputs(config: Any, height: int, width: int, tokens: int) -> dict[str, Any]:
        """See `Family.inputs`."""
        latents = torch.empty(1, config.in_channels, height, width)
        inputs: dict[str, Any] = {"sample": latents, "timestep": torch.empty(1)}
        inputs["encoder_hidden_states"] = torch.empty(1, tokens, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        return inputs

    @classmethod
    def network_class(cls, part: str, config: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """The class of a part; that of a text encoder follows from its configuration."""
        if part == "unet":
            from sdtune.models import UNet2DConditionModel

            return UNet2DConditionModel
        if part == "vae":
            from sdtune.models import AutoencoderKL

            return AutoencoderKL
        return text_encoders.network_class(config, cls.text_kinds[part], part)

    def check_widths(self) -> None:
        """The text encoder, UNet and VAE agree in width. Raises WeightsError, or UsageError for clip skip."""
        unet, text, vae = (self.modules[name].config for name in ("unet", "text_encoder", "vae"))
        reads, given = unet.encoder_hid_dim or unet.cross_attention_dim, self.text_width(self.modules)
        if self.clip_skip >= text.num_hidden_layers:
            raise UsageError(
                f"model.clip_skip: got {self.clip_skip}, but the text encoder has {text.num_hidden_layers} layers; "
                "expected less, 1 is usual"
            )
        if reads != given:
            raise WeightsError(
                f"the UNet reads text of width {reads}, the text encoder gives {given}; take both from the same model"
            )
        if unet.out_channels != vae.latent_channels or not (self.inpaints or unet.in_channels == unet.out_channels):
            raise WeightsError(
                f"the UNet takes {unet.in_channels} channels and answers {unet.out_channels}, the VAE makes latents of "
                f"{vae.latent_channels}; expected the same number three times (or, for inpainting, a UNet that takes "
                f"{masked_channels(vae.latent_channels)})"
            )

    @classmethod
    def text_width(cls, modules: Mapping[str, Any]) -> int:
        """Width of the token embeddings that the UNet is given: of all text encoders, side by side."""
        return sum(modules[name].config.hidden_size for name in cls.text_encoders)

    @property
    def inpaints(self) -> bool:
        """See `Family.inpaints`."""
        return self.modules["unet"].config.in_channels == masked_channels(self.modules["vae"].config.latent_channels)

    # --- what the loop asks -----------------------------------------------------------------------------------------

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule the model was trained with."""
        return NoiseSchedule.from_config(self.scheduler)

    @property
    def factor(self) -> int:
        """How many pixels lie along the side of a latent."""
        return 2 ** (len(self.modules["vae"].config.block_out_channels) - 1)

    def picture_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the pictures that the model was made for. Raises WeightsError if unknown."""
        size = self.modules["unet"].config.sample_size
        if size is None:
            raise WeightsError(
                "the UNet's config.json has no sample_size, so the size of its pictures is not known; add one"
            )
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.factor, width * self.factor

    def note_size(self, height: int, width: int) -> None:
        """See `Family.note_size`."""
        unet = self.modules.get("unet")
        if unet is not None and unet.config.sample_size is None:
            unet.register_to_config(sample_size=[height // self.factor, width // self.factor])

    def unread(self, name: str) -> tuple[str, ...]:
        """See `Family.unread`: the layers that clip skip leaves out, and the input of distilled UNets for guidance."""
        if name in self.text_encoders:
            return text_encoders.unread(self.modules[name], self.clip_skip)
        return ("time_embedding.cond_proj.",)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of height x width pixels."""
        return self.modules["vae"].config.latent_channels, height // self.factor, width // self.factor

    def latent_scale(self) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale): scaled latents are (z - shift) * scale, exactly as the diffusers pipeline takes them back.

        (That pipeline passes over the `shift_factor` of a VAE, so it is not used in training either.)
        """
        return 0.0, self.modules["vae"].config.scaling_factor

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scaled latents; see `Family.encode_images`."""
        vae, (shift, scale) = self.modules["vae"], self.latent_scale()
        with torch.autocast(pixels.device.type, enabled=False):  # in half precision SDXL's VAE overflows
            posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale  # (B, C, h, w) each

    def decode_images(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), about in [-1, 1], of scaled latents (B, C, h, w)."""
        vae, (shift, scale) = self.modules["vae"], self.latent_scale()
        with torch.autocast(latents.device.type, enabled=False):
            return vae.decode((latents.float() / scale + shift).to(vae.dtype), return_dict=False)[0].float()

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Token embeddings (B, L, D); L is 77 for each chunk of 75 tokens."""
        return Conditioning(self.embed("text_encoder", "tokenizer", captions)[0])

    def embed(self, encoder: str, tokenizer: str, captions: Sequence[str]) -> tuple[Tensor, Any]:
        """Token embeddings (B, L, D) of one text encoder, and its whole answer for the first chunk."""
        network = self.modules[encoder]
        answers = text_encoders.read_text(network, self.tokenizers[tokenizer], captions, self.max_tokens)
        return torch.cat([self.hidden(network, answer) for answer in answers], dim=1), answers[0]

    def hidden(self, network: Any, answer: Any) -> Tensor:
        """The layer that the UNet reads, (B, 77, D): the last, or `clip_skip` before it, normalised as the last is."""
        return text_encoders.hidden_layer(network, answer, self.clip_skip)

    def latents_fingerprint(self) -> str:
        """See `Family.latents_fingerprint`. A VAE of which only the decoder was trained on has the same."""
        return fingerprints.of_network(
            self.modules["vae"], lambda name: name.startswith(("encoder.", "quant_conv."))
        )

    def text_fingerprint(self) -> str:
        """See `Family.text_fingerprint`."""
        tokenizers = [fingerprints.of_tokenizer(tokenizer) for tokenizer in self.tokenizers.values()]
        encoders = [fingerprints.of_network(self.modules[name]) for name in self.text_encoders]
        return fingerprints.fingerprint(type(self).__name__, tokenizers, encoders, self.clip_skip, self.max_tokens)

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[Sequence[int]]) -> Conditioning:
        """Stable Diffusion 1.x and 2.x are not told of sizes."""
        return conditioning

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's answer, (B, C, h, w)."""
        return self.modules["unet"](
            with_channels(x_t, conditioning), t, encoder_hidden_states=conditioning.text, return_dict=False
        )[0]

    # --- handing it on ----------------------------------------------------------------------------------------------

    def pipeline(self) -> "DiffusionPipeline":
        """A diffusers pipeline over these networks."""
        return self.pipeline_class()(
            **self.modules,
            tokenizer=self.tokenizers["tokenizer"],
            scheduler=self.sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def pipeline_class(self) -> Any:
        """The one of `pipeline_names` that the UNet is for: text to image, or inpainting."""
        import diffusers

        return getattr(diffusers, self.pipeline_names[int(self.inpaints)])

    def sampler(self) -> Any:
        """The scheduler that the model's folder names."""
        return scheduler_class(self.scheduler).from_config(self.scheduler)

    def save(self, folder: Path, dtype: str | None = None) -> None:
        """Write a folder that stock diffusers opens: a pipeline, or of a VAE alone the VAE.

        Args:
            dtype: of the weights, such as "float16", which halves them; None keeps each network's own.
        """
        if set(self.modules) == {"vae"}:
            save_network(self.modules["vae"], folder, dtype)
            return
        for name, network in self.modules.items():
            save_network(network, folder / name, dtype)
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save_pretrained(folder / name)
        self.sampler().save_pretrained(folder / "scheduler")
        pipeline: Any = self.pipeline()
        pipeline.save_config(folder)  # model_index.json
