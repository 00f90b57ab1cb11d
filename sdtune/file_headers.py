"""What exported files say of themselves: the headers that A1111, ComfyUI and others read and show."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdtune.adapters.lora_files import WIDTHS
from sdtune.errors import WeightsError
from sdtune.families.base import Family
from sdtune.families.single_file import PREDICTIONS, V_PRED, ZERO_SNR

ARCHITECTURES = {
    "SD1": "stable-diffusion-v1",
    "SD2": "stable-diffusion-v2",
    "SDXL": "stable-diffusion-xl-v1-base",
}
KOHYA_BASES = {"SD1": "sd_v1", "SD2": "sd_v2", "SDXL": "sdxl_base_v1-0"}


def kind_of(unet: Mapping[str, Any]) -> str | None:
    """SD1, SD2 or SDXL, from a UNet's config.json; None for models of other sizes."""
    if unet.get("addition_embed_type") == "text_time":
        return "SDXL"
    return WIDTHS.get(unet["cross_attention_dim"])


def model_header(family: Family, title: str) -> dict[str, str]:
    """The header of a checkpoint in one file, as the ModelSpec of Stability AI has it."""
    header = {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": title}
    if "unet" in family.modules:
        kind = kind_of(family.modules["unet"].config)
        height, width = family.picture_size()
        header |= {"modelspec.resolution": f"{width}x{height}"}
        prediction = family.scheduler.get("prediction_type", "epsilon")
        header |= {"modelspec.prediction_type": PREDICTIONS[prediction]} if prediction in PREDICTIONS else {}
        header |= {"modelspec.architecture": ARCHITECTURES[kind]} if kind else {}
    return header


def model_marks(scheduler: Mapping[str, Any]) -> dict[str, Tensor]:
    """Empty tensors by which other programs know what the UNet of a checkpoint in one file predicts.

    Args:
        scheduler: scheduler_config.json of the model.

    Raises:
        WeightsError: it predicts the clean latents, which no program knows from such a file.
    """
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise WeightsError(
            f"a checkpoint in one file cannot say that its UNet predicts '{prediction}', so every program would draw "
            "noise with it; export it with --format merged"
        )
    marks = [V_PRED] * (prediction == "v_prediction") + [ZERO_SNR] * bool(scheduler.get("rescale_betas_zero_snr"))
    return {name: torch.zeros(0) for name in marks}


def kohya_header(
    notes: Mapping[str, Any],
    recipe: Mapping[str, Any],
    kind: str | None,
    name: str,
    scheduler: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What kohya's header says about training, as far as a run knows it; A1111 and others show it.

    Args:
        notes, recipe: sdtune.json and run.yaml of the run; empty where there is none.
        kind: of the base: SD1, SD2 or SDXL, if known. name: of the file.
        scheduler: scheduler_config.json of the model that was trained, if known.
    """
    size, skip = notes.get("size"), notes.get("clip_skip")
    asked = (scheduler or {}).get("prediction_type")
    version = KOHYA_BASES.get(kind or "")
    header: dict[str, Any] = {
        "ss_output_name": name,
        "ss_base_model_version": f"{version}_v" if version and asked == "v_prediction" and kind != "SDXL" else version,
        "ss_v2": kind == "SD2" if version else None,
        "ss_zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr")) if scheduler else None,
        "ss_sd_model_name": notes.get("base"),
        "ss_clip_skip": skip + 1 if skip else None,  # kohya counts the last layer too
        "ss_seed": notes.get("seed"),
        "ss_steps": notes.get("step"),
        "ss_resolution": f"({size[1]}, {size[0]})" if size else None,
        "ss_training_comment": "trained with sdtune",
    }
    if recipe:
        rates = recipe.get("optimizer", {})
        header |= {
            "ss_learning_rate": rates.get("lr"),
            "ss_text_encoder_lr": rates.get("text_encoder_lr"),
            "ss_lr_scheduler": rates.get("schedule"),
            "ss_optimizer": rates.get("name"),
            "ss_mixed_precision": recipe["train"].get("precision"),
            "ss_batch_size_per_device": recipe["train"].get("batch_size"),
            "ss_max_train_steps": recipe["train"].get("steps"),
        }
    return {key: str(value) for key, value in header.items() if value is not None}
