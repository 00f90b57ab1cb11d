"""Recipes: reading, overriding, checking, writing."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sdtune.config import Recipe, dump, load, resolve_asset
from sdtune.config.messages import fields_of, section_of
from sdtune.errors import ConfigError, UsageError

BARE: dict[str, Any] = {
    "model": {"base": "user/name"},
    "data": [{"path": "photos"}],
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 10},
    "output": {"dir": "runs/x"},
}


def write(folder: Path, text: str | dict[str, Any] | None = None) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text or BARE), encoding="utf-8")
    return path


def faults(path: Path, *overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return dict(caught.value.faults)


@pytest.fixture
def bare(workplace: Path) -> Path:
    return write(workplace)


def test_defaults_are_filled_in(bare: Path) -> None:
    recipe = load(bare)
    assert recipe.task == "denoising"
    assert recipe.adapter.kind == "lora"
    assert recipe.adapter.alpha == recipe.adapter.rank == 16
    assert recipe.data[0].role == "instance"
    assert recipe.train.precision == "fp32"


def test_all_faults_are_told_at_once(workplace: Path) -> None:
    mine = write(
        workplace,
        """
        adapter: {rnk: 4}
        data: [{path: photo/}, {path: more, role: class, generate: 4}]
        optimizer: {lr: 1e-4, betas: [0.9, 2]}
        images: {resolution: 100, background: whitish}
        train: {steps: -5, precision: bf61}
        """,
    )
    found = faults(mine, "train.batch_size=many", "nonsense")
    assert found["nonsense"] == "expected key=value, for example train.steps=100"
    assert found["model"].startswith("missing; expected a section of settings, for example")
    assert found["adapter.rnk"] == "unknown key; did you mean 'rank'?"
    assert found["train.steps"] == "got -5, expected a whole number of at least 1"
    assert found["train.batch_size"] == "got 'many', expected a whole number of at least 1"
    assert found["train.precision"] == "got 'bf61', expected one of fp32, bf16, fp16"
    assert found["optimizer.betas.1"] == "got 2, expected a number of at least 0 and less than 1"
    assert found["images.resolution"] == "got 100, expected a multiple of 8, or [height, width]"
    assert found["output"].startswith("missing; ")
    # settings that are well formed, but wrong together or here, are told beside them
    assert found["data.0.path"].startswith("'photo/' does not exist; name a folder")
    assert found["data.1.prompt"].startswith("missing; expected a prompt")
    assert found["images.background"] == "got 'whitish', expected a colour such as white or '#808080'"
    assert len(found) == 12


@pytest.mark.parametrize("fault", ["optimizer.lr=fast", "optimizer.name=adam", "optimizer.lr=null"])
def test_a_default_that_follows_from_a_faulty_setting_is_no_fault(bare: Path, fault: str) -> None:
    assert faults(bare, fault).keys() == {fault.partition("=")[0]}


def test_paths_written_on_windows_are_told_as_they_are_here(bare: Path) -> None:
    Path("photos/base").mkdir()
    found = faults(bare, r"data.0.path=.\photos", r"model.base=photos\base", r"adapter.init_from=photos\gone")
    assert found["data.0.path"].endswith("metadata.jsonl: data.0.path=./photos")
    assert found["model.base"].endswith("name another with: model.base=photos/base")
    assert found["adapter.init_from"].endswith("adapter.init_from=FOLDER")


def test_the_message_reads_as_in_the_style_page(bare: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(bare, ["train.steps=-5", "adapter.rnk=3"])
    assert str(caught.value).splitlines() == [
        f"{bare}: 2 faults",
        "  adapter.rnk   unknown key; did you mean 'rank'?",
        "  train.steps   got -5, expected a whole number of at least 1",
    ]


@pytest.mark.parametrize(
    ("override", "key", "what"),
    [
        ("trian.steps=3", "trian", "unknown key; did you mean 'train'?"),
        ("lr=3", "lr", "unknown key; did you mean 'optimizer.lr'?"),
        ("train.qqq=3", "train.qqq", "unknown key; known here: steps, batch_size"),
        ("adapter.kind=lroa", "adapter.kind", "got 'lroa', expected one of full, lora, rslora, dora, lokr, loha"),
        ("adapter.kind=textual-inversion", "adapter.tokens", "missing; expected the words to learn, such as 'adapter."),
        ("adapter.tokens=[{token: a b}]", "adapter.tokens.0.token", "got 'a b', expected one word without spaces"),
        ("adapter.tokens=[{token: a}, {token: a}]", "adapter.tokens.1.token", "that is not there twice"),
        ("adapter.factor=1", "adapter.factor", "got 1, expected at least 2, or -1 for near the square root"),
        ("adapter.init_from=gone", "adapter.init_from", "'gone' does not exist; name a LoRA file, or a folder or run"),
        ("optimizer.token_lr=0.1", "optimizer.token_lr", "no token learns; set adapter.tokens or remove it"),
        ("model.family=sdlx", "model.family", "did you mean 'sdxl'?"),
        ("adapter.targets=attn", "adapter.targets", "expected one of attention, attention+feedforward, all, or a list"),
        ("model.base=./nowhere", "model.base", "'./nowhere' does not exist, and is no hub id (user/name)"),
        ("model.from_config={unet: 3}", "model.from_config.unet", "got 3, expected a section of settings or text"),
        ("model.from_config={}", "model.base", "got both model.base and model.from_config"),
        ("model.base=null", "model.base", "missing; expected a hub id, a diffusers folder, a .safetensors file"),
        ("model.allow_pickle=true", "model.allow_pickle", "is read with a pickle (.ckpt, .pt) as base or vae only"),
        ("data=[]", "data", "got [], expected a list of sections (at least 1)"),
        ("data.0.role=validation", "data", "no source has role: instance"),
        ("data.0.hub=user/set", "data.0.path", "got both path and hub"),
        ("data.0.path=null", "data.0.path", "got nothing, expected a path"),
        ("data.0.generate=4", "data.0.generate", "is read with role: class only"),
        ("data.0.role=class", "data.0.prompt", "missing; expected a prompt"),
        ("data.2.path=x", "data.2.path", "got '2' for a list of 1, expected a number from 0 to 1"),
        ("data.first.path=x", "data.first.path", "got 'first' for a list of 1"),
        ("train.steps.x=3", "train.steps.x", "'train.steps' is 10, not a section"),
        ("train.ema=1.5", "train.ema", "got 1.5, expected a number greater than 0 and less than 1 or null"),
        ("images.max_tokens=77", "images.max_tokens", "got 77, expected one of 75, 150, 225"),
        ("images.resolution=[64]", "images.resolution", "got [64], expected at least 8, or [height, width]"),
        ("images.bucket_step=64", "images.bucket_step", "is read with images.buckets: true only; remove it"),
        ("images.upscale=true", "images.upscale", "is read with images.buckets: true only; remove it"),
        ("images.keep_tags=1", "images.keep_tags", "is read with images.tag_shuffle: true only; remove it"),
        ("validate.every=5", "validate.every", "there is nothing to measure"),
        ("validate.samples={}", "validate.samples.prompts", "missing; expected a list of texts (at least 1)"),
        ("validate.samples={prompts: [a], steps: 1001}", "validate.samples.steps", "got 1001, expected a whole number"),
        ("optimizer.text_encoder_lr=1e-5", "optimizer.text_encoder_lr", "set adapter.text_encoder=true"),
        ("output.trackers=[mlflow]", "output.trackers", "mlflow is not installed; install it with: pip install mlflow"),
        ("output.trackers=[paper]", "output.trackers.0", "got 'paper', expected one of tensorboard, wandb"),
        ("reconstruction.l1=2.0", "reconstruction", "is read by task: autoencoding only; remove it"),
    ],
)
def test_each_fault_says_what_to_do(bare: Path, override: str, key: str, what: str) -> None:
    assert what in faults(bare, override)[key]


def test_full_training_has_no_rank(bare: Path) -> None:
    found = faults(bare, "adapter.kind=full", "adapter.rank=4")
    assert found == {"adapter.rank": "is read by adapter.kind: lora, rslora, dora, lokr, loha only; remove it"}


def test_buckets_fit_the_resolution(bare: Path) -> None:
    images = ["images.buckets=true", "images.resolution=[512, 1536]", "images.bucket_step=48"]
    found = faults(bare, *images)
    assert found["images.bucket_step"] == (
        "got 48, but images.resolution is 512 x 1536; expected a number that divides it"
    )
    assert found["images.bucket_aspect"] == (
        "got 2, but the sides of images.resolution are as 1 to 3; expected at least that"
    )
    load(bare, [*images[:2], "images.bucket_step=64", "images.bucket_aspect=3.0"])


def test_an_autoencoder_has_no_text(bare: Path) -> None:
    found = faults(bare, "task=autoencoding", "objective.snr_gamma=5.0", "images.caption_dropout=0.1")
    assert set(found) == {"adapter.kind", "objective", "images.caption_dropout"}
    assert "an autoencoding run trains the VAE itself" in found["adapter.kind"]


def test_from_scratch_needs_every_part(bare: Path) -> None:
    found = faults(bare, "model.base=null", "model.from_config={unet: {}, vea: {}, tokenizer: nowhere/at/all}")
    assert found["model.from_config.vea"] == "unknown key; did you mean 'vae'?"
    assert "does not exist" in found["model.from_config.tokenizer"]
    assert {f"model.from_config.{part}" for part in ("vae", "text_encoder", "scheduler")} <= set(found)


def test_random_weights_are_not_for_an_adapter(bare: Path) -> None:
    scratch = ["model.base=null", "model.from_config={unet: {}}"]
    found = faults(bare, *scratch, "adapter.kind=lora")
    assert "model.from_config.unet makes random weights, which only full training changes" in found["adapter.kind"]
    assert "adapter.kind" not in faults(bare, *scratch, "adapter={kind: full}")


def test_samples_are_drawn_in_no_more_steps_than_the_noise_schedule_has(bare: Path) -> None:
    scratch = ["model.base=null", "model.from_config={scheduler: {num_train_timesteps: 20}}"]
    found = faults(bare, *scratch, "validate.samples={prompts: [a], steps: 21}")
    assert found["validate.samples.steps"].startswith("got 21, expected at most 20: the noise schedule")
    assert "validate.samples.steps" not in faults(bare, *scratch, "validate.samples={prompts: [a], steps: 20}")


def test_a_section_that_is_null_is_as_if_it_were_not_there(bare: Path, workplace: Path) -> None:
    plain, drawn = load(bare), {"every": 5, "fraction": 0.2, "samples": {"prompts": ["a"]}}
    sections = ("adapter", "objective", "reconstruction", "images", "validate")
    assert load(bare, [f"{name}=null" for name in sections]) == plain
    assert load(write(workplace, BARE | dict.fromkeys(sections))) == plain
    mine = write(workplace, BARE | {"validate": drawn})
    assert load(mine, ["validate=null"]) == plain
    assert load(mine, ["validate=null", "validate.fraction=0.5"]).validation.fraction == 0.5
    undrawn = load(mine, ["validate.samples=null"])
    assert undrawn.validation.samples is None and undrawn.validation.every == 5
    assert load(write(workplace, BARE | {"validate": drawn | {"samples": None}})) == undrawn
    assert faults(write(workplace, BARE | {"train": None}))["train"] == "got nothing, expected a section of settings"


def test_fp16_needs_a_gpu(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert "needs a GPU" in faults(bare, "train.precision=fp16")["train.precision"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert load(bare, ["train.precision=fp16"]).train.precision == "fp16"


def test_class_pictures_are_made_where_there_is_no_folder_yet(bare: Path, workplace: Path) -> None:
    (workplace / "prompts.txt").write_text("a dog\na cat\n")
    entry = "data.1={path: class, role: class, generate: 4, prompts: prompts.txt}"
    assert load(bare, [entry]).data[1].generate == 4
    (workplace / "prompts.txt").unlink()
    assert "'prompts.txt' does not exist" in faults(bare, entry)["data.1.prompts"]


def test_class_captions_may_come_from_the_folder(bare: Path, workplace: Path) -> None:
    (workplace / "class").mkdir()
    (workplace / "class/metadata.jsonl").write_text("{}\n")
    assert load(bare, ["data.1={path: class, role: class}"]).data[1].prompt is None


def test_overrides_are_yaml(bare: Path) -> None:
    texts = ["optimizer.lr=1e-3", "data.0.repeats=2", "data.0.prompt=no", "train.ema=0.9", "images.flip=true"]
    texts += ["validate.samples.prompts=[a, 'b, c']", "data.1.path=photos", "images.resolution=[64, 128]"]
    recipe = load(bare, texts)
    assert recipe.optimizer.lr == 1e-3
    assert recipe.data[0].repeats == 2 and recipe.data[0].prompt == "no"
    assert recipe.train.ema == 0.9 and recipe.images.flip is True
    assert recipe.validation.samples is not None and recipe.validation.samples.prompts == ["a", "b, c"]
    assert recipe.data[1].path == "photos"
    assert recipe.images.resolution == [64, 128]


def test_sampling_follows_the_measurements(bare: Path) -> None:
    recipe = load(bare, ["validate.every=5", "validate.samples.prompts=[a]"])
    assert recipe.validation.samples is not None and recipe.validation.samples.every == 5


@pytest.mark.parametrize(
    ("text", "key", "what"),
    [
        ("train: [1\nmodel: 2\n", "line 2", "not YAML: "),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "line 2", "the key 'train' stands twice"),
        ("just words", "YAML", "got 'just words', expected sections such as model:"),
        ("", "YAML", "got nothing, expected sections"),
        ("train: 5\n3: x\n", "3", "unknown key"),
        ("model: !!python/object/apply:os.getcwd []\n", "line 1", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipe(workplace: Path, text: str, key: str, what: str) -> None:
    assert what in faults(write(workplace, text))[key]


def test_a_picture_is_no_recipe(workplace: Path) -> None:
    path = workplace / "x.yaml"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xff")
    assert "not a text file" in faults(path)["YAML"]


def test_numbers_and_words_are_read_as_meant(workplace: Path) -> None:
    text = yaml.safe_dump(BARE).replace("lr: 0.0001", "lr: 1e-4")
    assert load(write(workplace, text)).optimizer.lr == 1e-4
    text = text.replace("path: photos", "path: photos\n  prompt: off")
    assert load(write(workplace, text)).data[0].prompt == "off"


def test_names_and_paths(workplace: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'lora_tiny'"):
        load("lora_tny")
    with pytest.raises(UsageError, match="did you mean the shipped recipe 'lora_tiny'"):
        load("recipes/lora_tiny.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        load("photos")
    with pytest.raises(UsageError, match=r"no recipe 'nosuch'; known here: .*lora_tiny.*[a-z0-9]\. Give one of these"):
        load("nosuch")


def test_assets_have_names() -> None:
    assert Path(resolve_asset("tiny")).parts[-3:] == ("sdtune", "assets", "tiny")
    assert Path(resolve_asset("assets:demo")).is_dir()
    assert resolve_asset("./tiny") == "./tiny"


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.0.prompt=1e-4", "validate.samples.prompts=['yes', '2024-01-01', '12:30', 'x: y', ' ä\n']"],
        ["adapter.kind=full", "adapter.text_encoder=true", "train.ema=0.999"],
        ["task=autoencoding", "adapter.kind=full", "reconstruction.kl=1e-6", "optimizer.betas=[0.9, 0.99]"],
        ["adapter.targets=[to_q, to_k]", "adapter.alpha=8", "output.dir='C:\\runs\\x'"],
    ],
)
def test_what_is_written_reads_back_equal(bare: Path, workplace: Path, overrides: list[str]) -> None:
    if overrides[0].endswith("1e-4"):
        overrides[0] = "data.0.prompt='1e-4'"
    recipe = load(bare, overrides)
    (workplace / "run.yaml").write_text(dump(recipe), encoding="utf-8")
    again = load("run.yaml")
    assert again == recipe
    assert dump(again) == dump(recipe)


def all_fields(model: Any, place: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, field in fields_of(model).items():
        found.append((f"{place}{name}", field))
        if section := section_of(field.annotation):
            found += all_fields(section, f"{place}{name}.")
    return found


@pytest.mark.parametrize(("key", "field"), all_fields(Recipe))
def test_every_setting_is_described(key: str, field: Any) -> None:
    assert field.description and field.description.endswith(".")
    assert not field.is_required() or field.examples, "a required setting shows an example when it is missing"
