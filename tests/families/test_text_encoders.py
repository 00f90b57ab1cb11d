"""Text encoders of other kinds than CLIP's: how they read, learn and are saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdtune.errors import WeightsError
from sdtune.families.stable_diffusion import StableDiffusion
from sdtune.opening import open_model
from sdtune.run import Run
from sdtune.sample import draw_pictures, initial_noise
from tests.factories import DDIM, SIZE, UNET, VAE, losses, make_bert, make_recipe, make_sd, make_t5, text_config

KINDS = {"BertModel": make_bert, "T5EncoderModel": make_t5}
PROMPTS = ["a photo of dog", "", "dog " * 40]


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text encoder and its tokenizer in one folder, which is named after its class. Do not write into it."""
    return KINDS[request.param](tmp_path_factory.mktemp("models") / request.param)


def parts(text_encoder: Any, tokenizer: Path) -> dict[str, Any]:
    """A model from scratch with that text encoder."""
    return {
        **{"unet": UNET, "vae": VAE, "scheduler": DDIM},
        **{"text_encoder": text_encoder, "tokenizer": str(tokenizer)},
    }


def scratch(encoder: Path, **options: Any) -> StableDiffusion:
    return StableDiffusion.from_config(parts(str(encoder), encoder), seed=0, **options)


def test_another_encoders_tokenizer_is_refused(encoder: Path, tmp_path: Path) -> None:
    other = make_t5(tmp_path / "t5") if encoder.name == "BertModel" else make_bert(tmp_path / "bert")
    with pytest.raises(WeightsError, match=f"of this {encoder.name}: it has no .*model.from_config.tokenizer="):
        StableDiffusion.from_config(parts(str(encoder), other), seed=0)


def test_padding_is_not_read(encoder: Path) -> None:
    import transformers

    family = scratch(encoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    stock = getattr(transformers, encoder.name).from_pretrained(encoder).eval()
    ids = tokenizer(["a photo of dog"], return_tensors="pt").input_ids
    with torch.no_grad():
        text = family.encode_text(PROMPTS).text
        alone = stock(ids).last_hidden_state  # (1, L, D), without any padding
    assert text.shape == (3, 77, alone.shape[-1])
    torch.testing.assert_close(text[:1, : ids.shape[1]], alone, atol=1e-5, rtol=1e-4)


def test_the_text_gets_the_width_of_the_unet(encoder: Path) -> None:
    unet = scratch(encoder).modules["unet"]
    width = {"BertModel": 24, "T5EncoderModel": 16}[encoder.name]
    assert unet.encoder_hid_proj.in_features == width and unet.encoder_hid_proj.out_features == 32
    assert unet.config.encoder_hid_dim == width


@pytest.mark.parametrize("learns", [False, True])
def test_a_run_ends_in_a_folder_of_stock_diffusers(encoder: Path, photos: Path, tmp_path: Path, learns: bool) -> None:
    model = {"from_config": parts(str(encoder), encoder)}
    adapter = {"kind": "full", "text_encoder": learns}
    run = Run(make_recipe("", photos, tmp_path / "run", model=model, adapter=adapter, optimizer={"lr": 1e-2}))
    assert any(name.startswith("text_encoder.") for name in run.parameters) == learns
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    run.complete()
    still = [name for name, parameter in run.parameters.items() if torch.equal(parameter, before[name])]
    assert not still and any("encoder_hid_proj" in name for name in before)

    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "run/final")
    stock.set_progress_bar_config(disable=True)
    assert type(stock.text_encoder).__name__ == encoder.name
    prompts = {"prompt": PROMPTS[:1], "negative_prompt": ["photo"]}
    noise = initial_noise(run.family, [3], SIZE, SIZE)
    theirs = stock(**prompts, latents=noise, num_inference_steps=3, output_type="np").images[0]
    opened = open_model(str(tmp_path / "run"), device=torch.device("cpu"))
    (ours,) = draw_pictures(opened, PROMPTS[:1], [3], height=SIZE, width=SIZE, steps=3, negative_prompt="photo")
    assert np.abs(theirs - np.asarray(ours) / 255).max() < 0.02


def test_a_text_encoder_that_learns_follows_from_the_seed(encoder: Path, photos: Path, tmp_path: Path) -> None:
    model, found = {"from_config": parts(str(encoder), encoder)}, []
    for number in range(2):
        torch.manual_seed(number)  # of dropout, if there were some
        adapter = {"kind": "full", "text_encoder": True}
        recipe = make_recipe("", photos, tmp_path / str(number), model=model, adapter=adapter)
        Run(recipe).complete()
        found.append(losses(tmp_path / str(number)))
    assert found[0] == found[1]


@pytest.mark.parametrize("skip", [0, 1])
@torch.no_grad()
def test_layers_may_be_skipped(encoder: Path, skip: int) -> None:
    family = scratch(encoder, clip_skip=skip)
    network = family.modules["text_encoder"]
    text = family.encode_text(["dog"]).text
    for name, parameter in network.named_parameters():
        if any(part in name for part in family.unread("text_encoder")):
            parameter.zero_()
    torch.testing.assert_close(family.encode_text(["dog"]).text, text)
    assert bool([name for name in family.unread("text_encoder") if name.endswith("1.")]) == bool(skip)


def test_a_text_encoder_from_scratch_is_named_by_its_class(encoder: Path) -> None:
    config = {"_class_name": encoder.name, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    if encoder.name == "T5EncoderModel":
        config = {"_class_name": encoder.name, "d_model": 32, "num_layers": 1}
    family = StableDiffusion.from_config(parts(config, encoder), seed=0)
    assert type(family.modules["text_encoder"]).__name__ == encoder.name
    assert not hasattr(family.modules["unet"], "encoder_hid_proj")  # the width is the same
    assert family.encode_text(["dog"]).text.shape == (1, 77, 32)


def test_a_text_encoder_may_be_part_of_a_larger_model(sd: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertForPreTraining, CLIPConfig, CLIPModel, CLIPVisionConfig

    tokenizer = AutoTokenizer.from_pretrained(sd / "tokenizer")
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPModel(CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision.to_dict()))
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    family = scratch(tmp_path / "clip")
    own = family.modules["text_encoder"].state_dict()
    key = next(key for key in clip.state_dict() if key.endswith("layers.0.mlp.fc1.weight") and "vision" not in key)
    assert torch.equal(clip.state_dict()[key], own["encoder.layers.0.mlp.fc1.weight"])

    bert = BertForPreTraining.from_pretrained(make_bert(tmp_path / "bert"))
    bert.save_pretrained(tmp_path / "bert")
    read = scratch(tmp_path / "bert").modules["text_encoder"]
    assert torch.equal(read.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight)


def test_other_kinds_are_refused(sdxl: Path, tmp_path: Path) -> None:
    from sdtune.families.sdxl import StableDiffusionXL

    folder = make_bert(tmp_path / "bert", model_type="roberta")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"bert"', '"roberta"'))
    expected = "text_encoder: got a text encoder of the kind roberta, expected CLIPTextModel or BertModel or T5Enc"
    with pytest.raises(WeightsError, match=expected):
        scratch(folder)
    with pytest.raises(WeightsError, match="got a text encoder of the kind bert, expected CLIPTextModel"):
        StableDiffusionXL.open("text_encoder", str(make_bert(tmp_path / "other")), None)


def test_a_width_that_no_layer_adapts_is_refused(tmp_path: Path) -> None:
    folder = make_sd(tmp_path / "sd", encoder_hid_dim=24, encoder_hid_dim_type="text_proj")
    with pytest.raises(WeightsError, match="the UNet reads text of width 24, the text encoder gives 32"):
        StableDiffusion.load(str(folder))


def test_there_is_no_single_file_of_it(encoder: Path, tmp_path: Path) -> None:
    from sdtune.export import export, find_source

    scratch(encoder).save(tmp_path / "model")
    with pytest.raises(WeightsError, match="has no place for the tensor .*--format diffusers"):
        export(find_source(str(tmp_path / "model")), "single-file", tmp_path / "model.safetensors")
