"""The models that caption: several kinds, prompts, sampling, precision, and what is said when there is none."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_tools.caption_settings import Settings
from data_tools.captioner import Captioner, RowNoise, choose_device, commit_of, precision_on, resolve_model
from sdtune.errors import HubError, UsageError, WeightsError
from sdtune.evaluate import load_thumbnails
from tests.data_tools.conftest import noise
from tests.data_tools.models import MAKERS

CPU = torch.device("cpu")
NAMES = ["a.png", "b.png", "c.png"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    class Made(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = MAKERS[kind](tmp_path_factory.mktemp("captioners") / kind)
            return self[kind]

    return Made()


def captions(folder: Path, size: int = 3, names: list[str] | None = None, **settings) -> list[list[str]]:
    captioner = Captioner(Settings(model=str(folder), max_tokens=6, **settings), CPU)
    return captioner.write([captioner.prepare(noise(number)) for number in range(3)], names or NAMES, size)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_written_does_not_depend_on_the_batch(kind, folders):
    for options in ({"captions": 2}, {"sample": True, "captions": 2, "top_p": 1.0}):
        captioner = Captioner(Settings(model=str(folders[kind]), max_tokens=6, **options), CPU)
        prepared = [captioner.prepare(noise(number)) for number in range(3)]
        together = captioner.write(prepared, NAMES, 3)
        assert together == [captioner.write([one], [name], 3)[0] for one, name in zip(prepared, NAMES, strict=True)]
        assert together == captioner.write(prepared, NAMES, 5)
        assert all(1 <= len(texts) <= 2 and len(set(texts)) == len(texts) for texts in together)
        assert len({text for texts in together for text in texts}) > 2


@pytest.mark.parametrize("kind", ["blip", "blip-2", "git"])
def test_captions_are_those_of_transformers(kind, folders):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folders[kind])
    model = AutoModelForImageTextToText.from_pretrained(folders[kind]).eval()
    inputs = processor(images=[noise(number) for number in range(3)], return_tensors="pt")
    out = model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=6, num_beams=3)
    assert captions(folders[kind]) == [[text] for text in processor.batch_decode(out, skip_special_tokens=True)]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_prompt_leads_and_is_cut_off(kind, folders):
    plain, led = captions(folders[kind]), captions(folders[kind], prompt="a picture of")
    assert plain != led
    assert not any(text.startswith("a picture of") for texts in led for text in texts)


def test_a_prompt_that_is_too_long(folders):
    with pytest.raises(UsageError, match="--prompt has 32 tokens, and '.*' reads and writes 24 in all"):
        captions(folders["blip"], prompt="dog " * 30)
    assert captions(folders["blip"], prompt="dog " * 20)  # 2 tokens are left for the caption


def test_sampling_is_a_function_of_seed_and_name(folders):
    first = captions(folders["blip"], sample=True)
    assert first == captions(folders["blip"], sample=True) != captions(folders["blip"], sample=True, seed=1)
    other = captions(folders["blip"], sample=True, names=["z.png", "b.png", "c.png"])
    assert other[1:] == first[1:] and other[0] != first[0]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    captions(folders["blip"], sample=True)
    assert torch.equal(state, torch.random.get_rng_state())
    best = captions(folders["blip"], num_beams=1)
    assert captions(folders["blip"], sample=True, temperature=1e-4) == best == captions(
        folders["blip"], sample=True, top_p=1e-6
    )


def test_noisy_scores_draw_as_softmax_does():
    scores = torch.tensor([[1.0, 0.0, -1.0, float("-inf")]])
    generator = torch.Generator().manual_seed(0)
    drawn = RowNoise([generator] * 20_000)(torch.zeros(1), scores.expand(20_000, 4)).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, scores.softmax(1)[0], atol=0.01, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision, folders):
    captioner = Captioner(Settings(model=str(folders["blip"]), max_tokens=6, precision=precision), CPU)
    assert next(captioner.model.parameters()).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert captioner.write([captioner.prepare(noise(0))], ["a"], 1)[0]


def test_precision_and_device(monkeypatch):
    assert precision_on(CPU, "auto") == "fp32" and precision_on(CPU, "bf16") == "bf16"
    for supported, expected in [(True, "bf16"), (False, "fp16")]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert precision_on(torch.device("cuda"), "auto") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == torch.device("cuda", 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device() == CPU


def test_no_network_is_one_paragraph_that_says_what_to_do(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError) as caught:
        Captioner(Settings(), CPU)
    text = str(caught.value)
    for part in ("'Salesforce/blip-image-captioning-base'", str(tmp_path), str(Path.cwd()), "--model tiny",
                 "`hf download Salesforce/blip-image-captioning-base`", "HF_HUB_OFFLINE is set"):
        assert part in text
    assert "\n" not in text and caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "next_step"),
    [
        ("me/mine", "`hf download me/mine`"),
        ("./none", "user/name. Expected a folder or hub id"),
        ("a/b/c", "user/name. Expected a folder or hub id"),
        ("tny", "did you mean tiny?"),
    ],
)
def test_a_model_that_nobody_has(name, next_step, monkeypatch):
    monkeypatch.setattr("data_tools.captioner.hub_fault", lambda repo: "")  # as if the Hub answered
    with pytest.raises(HubError, match=f"the captioner '{name}' is not here: ") as caught:
        Captioner(Settings(model=name), CPU)
    assert next_step in str(caught.value)


def test_what_is_no_captioner(folders, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(WeightsError, match="bert' cannot be opened as an image-to-text model.*Expected a folder"):
        Captioner(Settings(model=str(tmp_path / "bert")), CPU)


def test_weights_that_are_missing(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["blip"], tmp_path / "half")
    tensors = load_file(tmp_path / "half/model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "crossattention" not in name}
    save_file(kept, tmp_path / "half/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="half' has not all weights of a captioner: .* such as .*crossattention"):
        captions(tmp_path / "half")


def test_pickles_only_when_told(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(folders["blip"], tmp_path / "old")
    torch.save(load_file(tmp_path / "old/model.safetensors"), tmp_path / "old/pytorch_model.bin")
    (tmp_path / "old/model.safetensors").unlink()
    with pytest.raises(WeightsError, match="add --allow-pickle"):
        captions(tmp_path / "old")
    assert captions(tmp_path / "old", allow_pickle=True) == captions(folders["blip"])


def test_the_commit_of_a_hub_model(tmp_path, monkeypatch, folders):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--me--mine"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("c0ffee")
    (repo / "snapshots/c0ffee").mkdir(parents=True)
    (repo / "snapshots/c0ffee/config.json").write_text("{}")
    assert commit_of("me/mine", None) == "c0ffee" and commit_of(str(folders["blip"]), None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": True, "num_beams": 3}, "--num-beams 3 and --sample exclude each other"),
        ({"temperature": 0.5}, "--temperature and --top-p are for sampling"),
        ({"sample": True, "temperature": 0.0}, "--temperature: got 0.0, expected more than 0"),
        ({"sample": True, "top_p": 1.5}, "--top-p: got 1.5"),
        ({"captions": 4, "num_beams": 2}, "--captions 4 needs as many beams, got --num-beams 2"),
        ({"precision": "fp8"}, "--precision: got 'fp8', expected one of auto, fp32"),
        ({"background": "whitish"}, "--background: 'whitish' is no colour"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(UsageError, match=message):
        Settings(**options).check()


def test_words_around_a_caption():
    assert Settings().around("  a  dog ") == "a dog"
    assert Settings(prefix="a photo of", trigger="sks dog", suffix=", oil painting").around("a dog") == (
        "a photo of sks dog, a dog, oil painting"
    )
    assert Settings(suffix="in winter", trigger="sks").around("a dog") == "sks, a dog in winter"
    Settings(captions=5).check()
    assert Settings(captions=5).beams == 5 and Settings(sample=True).beams == 1


def test_the_command_line_has_every_setting():
    import inspect

    from sdtune.cli import caption

    options = inspect.signature(caption).parameters
    for field in fields(Settings):
        assert options[field.name].default == field.default, field.name


def tiny_captions(pictures):
    captioner = Captioner(Settings(model="tiny", num_beams=1), CPU)
    found = []
    for first in range(0, len(pictures), 95):
        prepared = [captioner.prepare(Image.fromarray(picture)) for picture in pictures[first : first + 95]]
        found += captioner.write(prepared, [str(number) for number in range(len(prepared))], len(prepared))
    return [texts[0] for texts in found]


@pytest.mark.parametrize("style", ["fluent", "noto"])
def test_tiny_names_the_pictures_that_it_learned_from(style):
    names, pictures = load_thumbnails(style)
    right = [caption == name for caption, name in zip(tiny_captions(pictures), names, strict=True)]
    assert sum(right) / len(right) >= 0.95


def test_tiny_is_small_and_comes_along():
    files = [path for path in Path(resolve_model("tiny")).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000

