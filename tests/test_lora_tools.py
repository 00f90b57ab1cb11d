"""`sdtune lora`: what a file is, and arithmetic with known answers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdtune.adapters.lora_arithmetic import extract, merge, resize, singular_values
from sdtune.adapters.lora_files import load_lora, read_lora
from sdtune.adapters.lora_layers import LoraLayer
from sdtune.adapters.lora_writing import write_diffusers, write_kohya
from sdtune.cli import app
from sdtune.errors import WeightsError
from sdtune.families.headers import unet_config
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.lora_tools import info, read
from tests.adapters.test_lora_formats import answers, close

LEGACY = "axes_legacy_processor_keys.safetensors"
NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "unet.mid_block.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"


def lora(seed: int, rank: int = 3, alpha: float = 6.0) -> dict[str, LoraLayer]:
    """A LoRA for the small model: a linear layer, a convolution, a layer of the text encoder."""
    torch.manual_seed(seed)

    def layer(down: tuple[int, ...], *ones: int) -> LoraLayer:
        return LoraLayer({"down": torch.randn(rank, *down), "up": 0.1 * torch.randn(32, rank, *ones)}, alpha / rank)

    return {NAME: layer((32,)), CONVOLUTION: layer((32, 3, 3), 1, 1), TEXT: layer((32,))}


SHAPES = {NAME: (32, 32), CONVOLUTION: (32, 32, 3, 3), TEXT: (32, 32)}


def same(one: dict[str, LoraLayer], other: Any, factor: float = 1.0) -> None:
    """The products are equal."""
    assert one.keys() == other.keys()
    for name, layer in one.items():
        torch.testing.assert_close(layer.delta(SHAPES[name]), factor * other[name].delta(SHAPES[name]))


def sdtune(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


# --- info -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_kohya(lora(0), tmp_path / "a.safetensors", unet=None, header={"ss_output_name": "mine"})
    return tmp_path / "a.safetensors"


def test_info(file: Path, sd: Path) -> None:
    facts = info(file)
    assert facts["format"] == "kohya" and facts["kind"] == "lora" and facts["rank"] == 3 and facts["alpha"] == 6.0
    assert facts["targets"] == ["conv1", "out_proj", "to_q"] and facts["networks"] == ["text_encoder", "unet"]
    assert facts["tensors"] == 6 and facts["applied"] is None and facts["base"] is None
    assert facts["metadata"]["ss_output_name"] == "mine"
    assert info(file, str(sd))["applied"] == 6 and info(file, str(sd))["refused"] is None


def test_a_base_that_is_not_there_may_be_called_alike(sd: Path) -> None:
    with pytest.raises(WeightsError, match=f"does not exist .did you mean '{sd}'"):
        unet_config(f"{sd}x")


def test_info_reads_headers_and_configurations_alone(file: Path, sd: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for part in ("unet", "text_encoder"):
        (bare / part).mkdir(parents=True)
        shutil.copyfile(sd / part / "config.json", bare / part / "config.json")
    assert info(file, str(bare))["applied"] == 6
    weights = sd / "unet" / "diffusion_pytorch_model.safetensors"
    with weights.open("rb") as opened:  # a file that ends where its header does
        head = opened.read(8)
        head += opened.read(int.from_bytes(head, "little"))
    (bare / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(head)
    assert info(file, str(bare))["applied"] == 6
    (bare / "unet" / "config.json").unlink()
    assert info(file, str(bare))["applied"] == 6
    shutil.rmtree(bare / "text_encoder")
    facts = info(file, str(bare))
    assert facts["applied"] == 4 and "this model has no text_encoder" in facts["refused"]


def test_info_of_a_real_file(root: Path, tmp_path: Path) -> None:
    place = root.parent / "shared" / "data" / "lora" / LEGACY
    if not place.is_file():
        pytest.skip(f"{place} is not there")
    config = root / "sdtune" / "assets" / "single_file"
    for kind, applied in (("sd1", 256), ("sd2", 192), ("sdxl", 0)):
        answer = sdtune("lora", "info", place, "--base", config / kind, "--json")
        facts = json.loads(answer.stdout)
        assert facts["format"] == "legacy" and facts["rank"] == 4 and facts["alpha"] == 4 and facts["base"] == "SD1"
        assert facts["targets"] == ["to_k", "to_out.0", "to_q", "to_v"]
        assert facts["tensors"] == 256 and (facts["applied"] == 256) == (applied == 256)
        assert answer.exit_code == (0 if kind == "sd1" else 1)
        if kind != "sd1":
            assert "it is for Stable Diffusion 1.x (SD1, text of width 768)" in facts["refused"]


def test_info_of_kohyas_names_for_sdxl(tmp_path: Path) -> None:
    """Told apart by their widths, whichever base they are held against."""
    layer = LoraLayer({"down": torch.zeros(4, 2048), "up": torch.zeros(640, 4)})
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    write_kohya({name: layer}, tmp_path / "xl.safetensors", unet=unet_config("SDXL"), header={})
    assert info(tmp_path / "xl.safetensors")["base"] == "SDXL"
    assert info(tmp_path / "xl.safetensors", "SDXL")["applied"] == 2
    assert "it is for Stable Diffusion XL (SDXL" in info(tmp_path / "xl.safetensors", "SD1")["refused"]


def test_info_never_counts_alphas(tmp_path: Path) -> None:
    """Not those of names that are not understood either."""
    names = ("lora_down.weight", "lora_up.weight", "alpha")
    layer = "lora_unet_input_blocks_99_1_proj_in"
    save_file({f"{layer}.{name}": torch.ones(2, 2) for name in names}, tmp_path / "odd.safetensors")
    facts = info(tmp_path / "odd.safetensors", "SDXL")
    assert facts["tensors"] == 2 and facts["applied"] == 0
    assert "no tensor of the 2 fits" in facts["refused"]
    save_file({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}, tmp_path / "alpha.safetensors")
    facts = info(tmp_path / "alpha.safetensors", "SD1")
    assert facts["tensors"] == 0 and "it holds no tensors of a LoRA" in facts["refused"]


def test_the_base_is_told_by_what_only_one_kind_has(tmp_path: Path) -> None:
    def base(name: str, width: int, unet: Any = None) -> str | None:
        layer = LoraLayer({"down": torch.zeros(4, width), "up": torch.zeros(width, 4)})
        write_kohya({name: layer}, tmp_path / "a.safetensors", unet=unet, header={})
        return info(tmp_path / "a.safetensors")["base"]

    text, first = (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    )
    assert base(text, 768, unet_config("SDXL")) == "SDXL"  # lora_te1_
    assert base(text, 768) is None
    assert base(f"{first}.to_q", 320) == "SD1 or SD2"  # SDXL has no attention there
    assert base(f"{first}.to_q", 32) is None


def test_info_is_quiet(file: Path) -> None:
    """A process of its own: libraries tell their troubles while they are imported."""
    line = [sys.executable, "-m", "sdtune", "lora", "info", str(file), "--base", "SD1", "--json"]
    ran = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert json.loads(ran.stdout)["refused"] == ran.stderr.removeprefix("error: ").strip()


def test_kohyas_header_names_no_rank_where_there_is_none(tmp_path: Path) -> None:
    """A LoKr of whole factors has none."""

    def rank(**layers: LoraLayer) -> str | None:
        write_kohya({f"unet.{name}": layer for name, layer in layers.items()}, file, unet=None, header={})
        return read_lora(file).metadata.get("ss_network_dim")

    def whole() -> LoraLayer:
        return LoraLayer({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)})

    file = tmp_path / "a.safetensors"
    narrow = LoraLayer({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(16, 3), "lokr_w2_b": torch.ones(3, 16)})
    assert rank(conv_in=whole(), conv_out=whole()) is None
    assert rank(conv_in=whole(), conv_out=whole(), time_proj=narrow) == "3"


def test_a_pair_of_whole_factors_has_no_alpha(tmp_path: Path) -> None:
    """Of the layers that have a rank it is told, in kohya's header too."""
    factors = {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(16, 4), "lokr_w2_b": torch.ones(4, 16)}
    narrow = LoraLayer(factors, scale=4.0)
    whole = [LoraLayer({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}) for _ in range(2)]
    layers = {"unet.conv_in": whole[0], "unet.conv_out": whole[1], "unet.time_proj": narrow}
    write_kohya(layers, tmp_path / "a.safetensors", unet=None, header={})
    facts = info(tmp_path / "a.safetensors")
    assert facts["alpha"] == 16.0 and facts["metadata"]["ss_network_alpha"] == "16.0"


def test_info_of_what_is_no_lora(sd: Path) -> None:
    answer = sdtune("lora", "info", sd / "vae" / "diffusion_pytorch_model.safetensors")
    assert answer.exit_code == 1 and "are no LoRA's, for instance" in answer.stderr


def test_info_in_words(file: Path) -> None:
    answer = sdtune("lora", "info", file)
    assert answer.exit_code == 0
    assert "format    kohya\n" in answer.stdout and "ss_output_name: mine" in answer.stdout


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_a_merge_is_the_weighted_sum() -> None:
    first, second = lora(0), lora(1, rank=2)
    merged = merge([first, second], [0.5, -2.0])
    for name, layer in merged.items():
        wanted = 0.5 * first[name].delta(SHAPES[name]) - 2 * second[name].delta(SHAPES[name])
        torch.testing.assert_close(layer.delta(SHAPES[name]), wanted)
        assert layer.rank == 5 and layer.fits(SHAPES[name])


def test_x_and_minus_x_are_nothing() -> None:
    for name, layer in merge([lora(0), lora(0)], [1.0, -1.0]).items():
        assert layer.delta(SHAPES[name]).abs().max() < 1e-6


def test_layers_of_one_file_alone_are_kept() -> None:
    first = lora(0)
    other = {NAME: first.pop(NAME)}
    same(merge([first, other], [1.0, 1.0]), lora(0))


def test_files_for_different_models_are_not_merged() -> None:
    other = {NAME: LoraLayer({"down": torch.ones(1, 8), "up": torch.ones(8, 1)})}
    with pytest.raises(WeightsError, match=r"different models: .*to_q is of sizes \(32, 32\) and \(8, 8\)"):
        merge([lora(0), other], [1.0, 1.0])


def test_dora_is_not_merged() -> None:
    dora = {NAME: LoraLayer(lora(0)[NAME].factors, 1.0, torch.ones(32))}
    with pytest.raises(WeightsError, match="is a dora, and merging knows plain LoRA only.*extract"):
        merge([dora], [1.0])


def test_a_resize_to_the_full_rank_is_exact() -> None:
    for rank in (3, 8):
        smaller, energy = resize(lora(0), rank)
        same(smaller, lora(0))
        assert energy.share == pytest.approx(1.0) and {layer.rank for layer in smaller.values()} == {3}


def test_a_resize_keeps_the_largest_singular_values() -> None:
    layers = lora(0, rank=6)
    smaller, energy = resize(layers, 2)
    kept = total = 0.0
    for name, layer in layers.items():
        delta = layer.delta(SHAPES[name]).flatten(1)
        u, s, v = torch.linalg.svd(delta)
        best = u[:, :2] @ s[:2].diag() @ v[:2]
        torch.testing.assert_close(smaller[name].delta(SHAPES[name]).flatten(1), best, atol=1e-4, rtol=1e-4)
        kept, total = kept + s[:2].square().sum().item(), total + s.square().sum().item()
    assert energy.share == pytest.approx(kept / total, rel=1e-4)


def test_a_resize_by_the_share_that_is_kept() -> None:
    smaller, energy = resize(lora(0, rank=6), fraction=0.7)
    assert 0.7 <= energy.share < 1 and all(layer.rank and layer.rank < 6 for layer in smaller.values())
    halves = {NAME: LoraLayer({"down": torch.eye(2, 32), "up": torch.eye(32, 2)})}  # two equal singular values
    assert resize(halves, fraction=0.5)[0][NAME].rank == 1 and resize(halves, fraction=0.6)[0][NAME].rank == 2


def test_extracting_a_merged_lora_gives_its_product(sd: Path, tmp_path: Path) -> None:
    write_diffusers(lora(0), tmp_path / "a.safetensors")
    base, tuned = StableDiffusion.load(str(sd)), StableDiffusion.load(str(sd))
    load_lora(tuned, tmp_path / "a.safetensors")
    layers, energy = extract(base.modules, tuned.modules, 3)
    assert layers.keys() == SHAPES.keys() and energy.share == pytest.approx(1.0, abs=1e-5)
    for name, layer in lora(0).items():
        torch.testing.assert_close(layers[name].delta(SHAPES[name]), layer.delta(SHAPES[name]), atol=1e-4, rtol=1e-4)
    assert extract(base.modules, tuned.modules, 1)[1].share < 0.9
    with torch.no_grad():
        tuned.modules["unet"].conv_in.bias.add_(1.0)  # which a LoRA cannot hold
    assert extract(base.modules, tuned.modules, 3)[1].share < 0.999
    with pytest.raises(WeightsError, match="equal weights"):
        extract(base.modules, base.modules, 3)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5)])
def test_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    matrix[1] = 2 * matrix[0]  # one singular value is zero
    u, s, v = singular_values(matrix)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(u @ s.diag() @ v, matrix)
    torch.testing.assert_close(u[:, :4].T @ u[:, :4], torch.eye(4), atol=1e-5, rtol=1e-5)
    assert singular_values(torch.zeros(3, 4))[1].abs().max() == 0


# --- the commands ---------------------------------------------------------------------------------------------------


def test_the_commands(sd: Path, tmp_path: Path) -> None:
    """Each output goes into stock diffusers."""
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_kohya(lora(0), a, unet=None, header={})
    write_diffusers(lora(1), b)
    merged, small, tuned = tmp_path / "m.safetensors", tmp_path / "s.safetensors", tmp_path / "tuned"
    assert sdtune("lora", "merge", a, b, "--weights", "0.5", "-1", "--out", merged).exit_code == 0
    same(read_lora(merged).layers, merge([lora(0), lora(1)], [0.5, -1.0]))
    answer = sdtune("lora", "resize", merged, "--rank", "6", "--out", small, "--format", "kohya")
    assert answer.exit_code == 0 and "kept 100.00%, ranks 6 to 6" in answer.stderr
    assert sdtune("export", small, "--base", sd, "--format", "merged", "--out", tuned).exit_code == 0
    got = tmp_path / "x.safetensors"
    answer = sdtune("lora", "extract", "--base", sd, "--tuned", tuned, "--rank", "6", "--out", got)
    assert answer.exit_code == 0 and "of the difference, in 3 layers of rank 6" in answer.stderr
    expected = answers(StableDiffusionPipeline.from_pretrained(tuned))
    for place in (merged, small, got):
        stock = StableDiffusionPipeline.from_pretrained(sd)
        stock.load_lora_weights(place)
        close(answers(stock), expected)
    assert load_file(got).keys() == load_file(merged).keys()


def test_kohyas_names_of_an_sdxl_of_other_blocks(sdxl: Path, tmp_path: Path) -> None:
    """Refused before the work where nobody says which blocks it has."""
    plain, tuned = tmp_path / "plain.safetensors", tmp_path / "tuned"
    name = "unet.down_blocks.0.attentions.0.proj_in"  # the published one has no attention there
    down = {"down": torch.randn(2, 32), "up": torch.randn(32, 2)}
    layer = LoraLayer(down)
    second = LoraLayer({"down": torch.randn(2, 24), "up": torch.randn(24, 2)})
    layers = {name: layer, "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": second}
    write_diffusers(layers, plain)
    for words in (["resize", plain, "--rank", "2"], ["merge", plain, "--rank", "2"]):
        out = ["--format", "kohya", "--out", tmp_path / f"{words[0]}.safetensors"]
        answer = sdtune("lora", *words, *out)
        assert answer.exit_code == 1 and "with --base MODEL" in answer.stderr and "kept" not in answer.stderr
        assert "fits this model" in sdtune("lora", *words, *out, "--base", "SD1").stderr
        assert sdtune("lora", *words, *out, "--base", sdxl).exit_code == 0
    assert sdtune("export", plain, "--base", sdxl, "--format", "merged", "--out", tuned).exit_code == 0
    got = tmp_path / "extract.safetensors"
    words = ["--base", sdxl, "--tuned", tuned, "--rank", "2", "--format", "kohya", "--out", got]
    assert sdtune("lora", "extract", *words).exit_code == 0
    run = tmp_path / "run"  # what a run noted
    run.mkdir()
    shutil.copyfile(plain, run / "pytorch_lora_weights.safetensors")
    (run / "sdtune.json").write_text(json.dumps({"base": str(sdxl)}))
    noted = tmp_path / "noted.safetensors"
    assert sdtune("lora", "resize", run, "--rank", "2", "--format", "kohya", "--out", noted).exit_code == 0
    for file in (tmp_path / "resize.safetensors", tmp_path / "merge.safetensors", got, noted):
        assert any("input_blocks_1_1_proj_in" in key for key in load_file(file))
        assert read_lora(file).metadata["ss_base_model_version"] == "sdxl_base_v1-0"  # by which A1111 sorts them
        back = read_lora(file, unet_config(str(sdxl))).layers
        torch.testing.assert_close(back[name].delta((32, 32)), layer.delta((32, 32)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["merge", "a.safetensors", "--weights", "1", "2", "--out", "b.safetensors"], "got 2 for 1 files"),
        (["merge", "a.safetensors", "--out", "b.bin"], "ends in .safetensors"),
        (["merge", "a.safetensors", "--out", "a.safetensors"], "exists already"),
        (["merge", "a.safetensors", "--out", "b.safetensors", "--format", "peft"], "expected one of diffusers, kohya"),
        (["resize", "a.safetensors", "--out", "b.safetensors"], "give the new rank with --rank"),
        (["resize", "none.safetensors", "--rank", "2", "--out", "b.safetensors"], "does not exist"),
        (["resize", "odd.safetensors", "--rank", "2", "--out", "b.safetensors"], "1 of its 1 tensors are no LoRA's"),
    ],
)
def test_what_the_commands_refuse(file: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], match: str) -> None:
    monkeypatch.chdir(file.parent)
    save_file({"weight": torch.zeros(1)}, "odd.safetensors")
    answer = sdtune("lora", *words)
    assert answer.exit_code in (1, 2) and match in answer.stderr
    assert not (file.parent / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"emb_params": torch.zeros(2, 32)}, "it holds the token 'odd' and no LoRA"),
        ({"lora_unet_a.lora_mid.weight": torch.zeros(2, 2, 3, 3)}, "use_tucker"),
        ({"lora_unet_a.diff": torch.zeros(2, 2)}, "whole differences of weights"),
        ({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, "SDXL of other blocks.*--base MODEL"),
    ],
)
def test_what_is_no_lora_is_called_by_its_name(tmp_path: Path, tensors: dict[str, Any], says: str) -> None:
    file = tmp_path / "odd.safetensors"
    save_file(tensors, file)
    assert re.search(says, info(file)["refused"])
    with pytest.raises(WeightsError, match=says):
        read([str(file)], None, "diffusers")
