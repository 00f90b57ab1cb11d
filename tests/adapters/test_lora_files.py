"""LoRA files: those that fit are applied as diffusers does, all others are refused before it passes over them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtune.adapters.lora_files import WEIGHTS_NAME, check_fit, find_lora, load_lora, named_weights, read_lora
from sdtune.errors import WeightsError
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.models import UNet2DConditionModel
from sdtune.run import Run
from tests.factories import make_recipe

LEGACY = "axes_legacy_processor_keys.safetensors"


@pytest.fixture(scope="module")
def trained(sd: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that taught a LoRA of alpha != rank, in UNet and text encoder."""
    adapter = {"rank": 4, "alpha": 10.0, "targets": "all", "text_encoder": True}
    recipe = make_recipe(sd, photos, tmp_path_factory.mktemp("runs") / "lora", adapter=adapter, optimizer={"lr": 1e-2})
    run = Run(recipe)
    run.complete()
    return run


@torch.no_grad()
def answers(family: Any) -> torch.Tensor:
    """What UNet and text encoder say, in one tensor."""
    x_t = torch.linspace(-1, 1, 4 * 32 * 32).reshape(1, 4, 32, 32)
    return family.predict(x_t, torch.tensor([300]), family.encode_text(["a photo of dog"]))


def test_what_was_trained_is_what_is_loaded(trained: Any, sd: Path) -> None:
    family = StableDiffusion.load(str(sd))
    plain = answers(family)
    load_lora(family, find_lora(trained.folder.final))
    expected = answers(trained.family)
    torch.testing.assert_close(answers(family), expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.05


def test_keys_are_those_that_other_tools_know(trained: Any) -> None:
    keys = load_file(trained.folder.final / WEIGHTS_NAME).keys()
    assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder"}
    assert all(key.startswith("text_encoder.text_model.") for key in keys if key.startswith("text_encoder."))
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert any(".conv1." in key for key in keys) and any(".ff.net." in key for key in keys)


def test_two_loras_add_up(trained: Any, sd: Path) -> None:
    one, both = StableDiffusion.load(str(sd)), StableDiffusion.load(str(sd))
    file = find_lora(trained.folder.final)
    before = {name: weight.clone() for name, weight in named_weights(one.modules).items()}
    load_lora(one, file)
    load_lora(both, file)
    load_lora(both, file)
    once, twice = named_weights(one.modules), named_weights(both.modules)
    changed = {name for name, weight in before.items() if not torch.equal(weight, once[name])}
    assert changed == set(read_lora(file).layers)
    for name in changed:
        torch.testing.assert_close(twice[name] - before[name], 2 * (once[name] - before[name]), atol=1e-5, rtol=1e-4)


def change(file: Path, target: Path, rename: Any, shape: Any = lambda key, tensor: tensor) -> Path:
    """The same LoRA under other keys, or with tensors of other shapes."""
    save_file({rename(key): shape(key, tensor).contiguous() for key, tensor in load_file(file).items()}, target)
    return target


def test_a_file_of_which_nothing_fits_is_refused(trained: Any, sd: Path, tmp_path: Path) -> None:
    whole = find_lora(trained.folder.final)
    total = len(load_file(whole))
    strange = change(whole, tmp_path / "strange.safetensors", lambda key: "model." + key)
    with pytest.raises(WeightsError, match=f"no tensor of the {total} fits this model, for instance model"):
        load_lora(StableDiffusion.load(str(sd)), strange)
    network = sd / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(WeightsError, match="no tensor of the .* does not look like a LoRA"):
        load_lora(StableDiffusion.load(str(sd)), network)


def test_a_file_of_which_a_part_does_not_fit_is_refused(trained: Any, sd: Path, tmp_path: Path) -> None:
    whole = find_lora(trained.folder.final)
    other = change(whole, tmp_path / "part.safetensors", lambda key: key.replace("mid_block", "mid_blocks"))
    count = sum("mid_blocks" in key for key in load_file(other))
    with pytest.raises(
        WeightsError, match=f"{count} of its {len(load_file(other))} tensors do not fit.*unet.mid_blocks"
    ):
        load_lora(StableDiffusion.load(str(sd)), other)
    deeper = change(whole, tmp_path / "deeper.safetensors", lambda key: key.replace("layers.0", "layers.7"))
    with pytest.raises(WeightsError, match="text_encoder.text_model.encoder.layers.7"):
        load_lora(StableDiffusion.load(str(sd)), deeper)


@pytest.mark.parametrize(
    ("width", "name"), [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (2048, "Stable Diffusion XL")]
)
def test_a_lora_for_another_base_names_that_base(trained: Any, sd: Path, tmp_path: Path, width: int, name: str) -> None:
    def widen(key: str, tensor: torch.Tensor) -> torch.Tensor:
        text = "attn2" in key and ("to_k.lora_A" in key or "to_v.lora_A" in key)
        return torch.zeros(len(tensor), width) if text else tensor

    file = change(find_lora(trained.folder.final), tmp_path / "wide.safetensors", str, widen)
    with pytest.raises(
        WeightsError,
        match=rf"it is for {name} \(SD[12XL]+, text of width {width}\), this model reads text of width 32;",
    ):
        load_lora(StableDiffusion.load(str(sd)), file)


def test_a_lora_of_another_family_is_refused(trained: Any, sdxl: Path) -> None:
    from sdtune.families.sdxl import StableDiffusionXL

    with pytest.raises(
        WeightsError, match="it is for a model that reads text of width 32, this model reads text of width 56"
    ):
        load_lora(StableDiffusionXL.load(str(sdxl)), find_lora(trained.folder.final))


def test_kohya_files_are_checked_and_applied(trained: Any, sd: Path, tmp_path: Path) -> None:
    attention = [key for key in load_file(find_lora(trained.folder.final)) if "attn" in key and key.startswith("unet")]
    tensors = {}
    for key in attention:
        module, _, factor = key.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = load_file(
            find_lora(trained.folder.final)
        )[key]
        tensors[f"{name}.alpha"] = torch.tensor(10.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    family, expected = StableDiffusion.load(str(sd)), StableDiffusion.load(str(sd))
    load_lora(family, tmp_path / "kohya.safetensors")
    loaded = load_file(find_lora(trained.folder.final))
    metadata = {"unet.r": 4, "unet.lora_alpha": 10.0, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    save_file(
        {key: loaded[key] for key in attention},
        tmp_path / "peft.safetensors",
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)},
    )
    load_lora(expected, tmp_path / "peft.safetensors")
    torch.testing.assert_close(answers(family), answers(expected))

    bad = {key.replace("mid_block", "mad_block"): tensor for key, tensor in tensors.items()}
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match="is refused"):
        load_lora(StableDiffusion.load(str(sd)), tmp_path / "bad.safetensors")


def test_a_real_file_in_a_style_that_diffusers_passes_over_is_refused(sd: Path, root: Path) -> None:
    file = root.parent / "shared" / "data" / "lora" / LEGACY
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with pytest.raises(WeightsError, match="no tensor of the 256 fits.*Stable Diffusion 1.x .SD1, text of width 768"):
        load_lora(StableDiffusion.load(str(sd)), file)


def test_that_file_fits_its_own_base(root: Path) -> None:
    """On Stable Diffusion 1.5 diffusers 0.42 applies none of it and says nothing."""
    file = root.parent / "shared" / "data" / "lora" / LEGACY
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    lora = read_lora(file)
    assert (lora.style, lora.base, len(lora.layers), lora.tensors) == ("legacy", "SD1", 128, 256)
    check_fit(lora, {name: tuple(weight.shape) for name, weight in named_weights({"unet": unet}).items()}, file)
    assert {layer.rank for layer in lora.layers.values()} == {4}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.safetensors", None, "does not exist; name a .safetensors file"),
        ("a.safetensors", b"", "cannot be read as safetensors.*damaged"),
        ("a.safetensors", b"\x00" * 200, "cannot be read as safetensors.*damaged"),
        ("a.ckpt", b"pickle", "not a .safetensors file.*harmful code"),
    ],
)
def test_files_that_are_none(sd: Path, tmp_path: Path, name: str, content: bytes | None, match: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=match) as caught:
        load_lora(StableDiffusion.load(str(sd)), find_lora(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(trained: Any, sd: Path, tmp_path: Path) -> None:
    whole = find_lora(trained.folder.final).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_lora(StableDiffusion.load(str(sd)), tmp_path / "cut.safetensors")


def test_the_file_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="should hold one LoRA file .* found: none"):
        find_lora(tmp_path)
    (tmp_path / "mine.safetensors").touch()
    assert find_lora(tmp_path).name == "mine.safetensors"
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(WeightsError, match="found: mine.safetensors, other.safetensors; name the file itself"):
        find_lora(tmp_path)
    (tmp_path / WEIGHTS_NAME).touch()
    assert find_lora(tmp_path).name == WEIGHTS_NAME
