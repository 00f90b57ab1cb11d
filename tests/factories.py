"""Small models with random weights, written as diffusers folders by the stock libraries, and pictures to train on.

folder = make_sd(tmp_path / "sd")           # a Stable Diffusion of 32 channels, 64 x 64 px
folder = make_sdxl(tmp_path / "sdxl")
photos = make_photos(tmp_path / "photos", 3)
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdtune.config import Recipe

ROOT = Path(__file__).parents[1]
SIZE = 64  # pixels
DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
UNET: dict[str, Any] = {
    "sample_size": SIZE // 2,
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": SIZE,
    "scaling_factor": 0.9,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 32,
}


def make_tokenizer_files(folder: Path) -> None:
    """vocab.json and merges.txt of CLIP's kind: the bytes, a few joined pairs, and the two special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = ["p h", "o t", "ph ot", "phot o</w>", "o f</w>", "d o", "do g</w>"]
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def make_tokenizer() -> Any:
    """A small CLIPTokenizer of 77 tokens a text."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer_files(Path(folder))
        return CLIPTokenizer(vocab=f"{folder}/vocab.json", merges=f"{folder}/merges.txt", model_max_length=77)


def text_config(tokenizer: Any, **others: Any) -> Any:
    """The configuration of a small CLIP text encoder for that tokenizer."""
    from transformers import CLIPTextConfig

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextConfig(vocab_size=len(tokenizer), **special, pad_token_id=tokenizer.pad_token_id, **TEXT | others)


def shake(*networks: torch.nn.Module) -> None:
    """Move every parameter off the zeros and ones it starts from, so that each one matters."""
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


def make_sd(
    folder: Path, *, seed: int = 0, prediction: str = "epsilon", text: dict[str, Any] | None = None, **unet: Any
) -> Path:
    """A Stable Diffusion pipeline folder; `unet` changes the UNet's configuration, `text` the text encoder's."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        reader = CLIPTextModel(text_config(tokenizer, **text or {}))
        networks = UNet2DConditionModel(**UNET | unet), AutoencoderKL(**VAE), reader
        shake(*networks)
    denoiser, vae, text_encoder = networks
    StableDiffusionPipeline(
        vae=vae,
        unet=denoiser,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**DDIM, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, *, seed: int = 0, **unet: Any) -> Path:
    """A Stable Diffusion XL pipeline folder: text encoders of width 32 and 24; `unet` as for `make_sd`."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        second = text_config(tokenizer, hidden_size=24, projection_dim=20, hidden_act="gelu")
        config = UNET | {
            "cross_attention_dim": 56,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        }
        denoiser, vae = UNet2DConditionModel(**config | unet), AutoencoderKL(**VAE)
        text_encoder, text_encoder_2 = CLIPTextModel(text_config(tokenizer)), CLIPTextModelWithProjection(second)
        shake(denoiser, vae, text_encoder, text_encoder_2)
    StableDiffusionXLPipeline(
        vae=vae,
        unet=denoiser,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def make_inpainting(folder: Path, family: str = "stable-diffusion") -> Path:
    """A small random model for inpainting of either family, as the Hub has them."""
    xl = family == "sdxl"
    (make_sdxl if xl else make_sd)(folder, in_channels=9)
    index = folder / "model_index.json"
    name = "StableDiffusionXLInpaintPipeline" if xl else "StableDiffusionInpaintPipeline"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    return folder


def make_photos(folder: Path, count: int, *, size: tuple[int, int] = (SIZE, SIZE), captions: bool = True) -> Path:
    """Pictures of coloured gradients, and metadata.jsonl with a caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        width, height = size
        across = np.linspace(0, 1, width)[None, :, None] * [255, 60 * (number % 4), 10]
        down = np.linspace(0, 1, height)[:, None, None] * [0, 100, 245 - 20 * (number % 8)]
        Image.fromarray((across + down).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a photo of dog {number}"})
    if captions:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def make_recipe(base: Path | str, photos: Path | str, out: Path | str, **sections: Any) -> Recipe:
    """A checked recipe of 2 steps; `sections` are merged into it: make_recipe(..., train={"steps": 4}).

    `model` and `adapter` are replaced where they are given without `base` or `kind`.
    """
    from sdtune.config.files import check

    values: dict[str, Any] = {
        "model": {"base": str(base)},
        "adapter": {"kind": "lora", "rank": 4},
        "data": [{"path": str(photos)}],
        "images": {"resolution": SIZE},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "batch_size": 2},
        "output": {"dir": str(out), "trackers": []},
    }
    whole = ("full", "textual-inversion")  # kinds of adapters without a rank
    for name, section in sections.items():
        merged = isinstance(section, dict) and "from_config" not in section and section.get("kind") not in whole
        values[name] = values.get(name, {}) | section if merged else section
    recipe, faults = check(values)
    assert recipe is not None and not faults, faults
    return recipe


def train_on_two_processes(recipe: Recipe, out: Path) -> None:
    """The command with a recipe whose output.dir is `out`, under torchrun; fails unless two processes took part."""
    from sdtune.config import dump

    file = out.with_suffix(".yaml")
    file.write_text(dump(recipe), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdtune"]
    ran = subprocess.run(
        [*launch, "train", str(file)], capture_output=True, text=True, timeout=600,
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads((out / "environment.json").read_text())["processes"] == 2


def losses(run: Path) -> list[float]:
    """The loss of each step, as a run's metrics.jsonl has them; each step stands in it once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files under a folder, by file and key."""
    from safetensors.torch import load_file

    files = sorted(folder.rglob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {f"{file.relative_to(folder)}:{key}": value for file in files for key, value in load_file(file).items()}


def make_bert(folder: Path, **config: Any) -> Path:
    """A small random BertModel with its tokenizer, 24 wide, as sentence-transformers lays them out."""
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [chr(number) for number in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "photo"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=512)
    size = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = BertModel(BertConfig(**size | {"vocab_size": len(tokenizer), "pad_token_id": 0} | config))
        shake(network)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_t5(folder: Path, **config: Any) -> Path:
    """The encoder of a small random T5 with its tokenizer, 16 wide."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = ["▁", *(chr(number) for number in range(33, 127))]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters), ("▁photo", -1.0)]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0)
    size = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = T5EncoderModel(T5Config(**size | {"vocab_size": len(tokenizer)} | config))
        shake(network)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
