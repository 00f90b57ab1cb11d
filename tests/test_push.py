"""Pushing a run: what goes up, what does not, how faults of the network and refusals end, and that it comes back."""

import getpass
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants, snapshot_download
from huggingface_hub.hf_api import api
from PIL import Image
from pydantic import BaseModel
from typer.testing import CliRunner

from sdtune import hub as pushing
from sdtune.adapters.lora_files import read_lora
from sdtune.cli import app
from sdtune.config import Recipe, parse, shareable
from sdtune.config.messages import fields_of, section_of
from sdtune.config.shareable import shareable as made_shareable
from sdtune.errors import HubError, RunError, UsageError
from sdtune.hub import push
from sdtune.hub_folder import write_hub_folder
from sdtune.model_card import model_card
from sdtune.opening import open_model
from sdtune.run import Run
from sdtune.run_folder import RunFolder
from tests.adapters.test_lora_formats import answers, close
from tests.factories import make_photos, make_recipe, make_sd, make_sdxl
from tests.hub_stand_in import DROP, HubStandIn

ROOT = Path(__file__).parent.parent
TOKEN = "hf_VerySecretTokenOfAnn0123456789"
SAMPLES = {"samples": {"prompts": ["red apple", "a | blue: book"], "steps": 1, "guidance": 2.0}}
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A Hub on which Ann is logged in."""
    with HubStandIn(users={TOKEN: "ann"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        pages = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pages)
        monkeypatch.setattr(api, "endpoint", server.url)  # the one behind the functions of huggingface_hub
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the place that it was first made for
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for between tries, in no time."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: a LoRA of the tiny base, under one prompt, with pictures. Its places have names that must not be seen."""
    place = tmp_path_factory.mktemp("private-place")
    photos = make_photos(place / "photos-of-my-child", 2)
    data = [{"path": str(photos), "prompt": "a photo of sks dog"}]
    short = {"steps": 1, "batch_size": 1}
    recipe = make_recipe("tiny", photos, place / "run", data=data, validate=SAMPLES, train=short)
    return Run(recipe).complete()


# --- what goes up ---------------------------------------------------------------------------------------------------


def test_weights_card_pictures_and_settings_go_up(
    hub: HubStandIn, lora: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pushed = push(lora, "ann/dog")
    files = hub.files("ann/dog")
    assert set(files) == {"README.md", "run.yaml", "sdtune.json", WEIGHTS, "images/00.png", "images/01.png"}
    assert files[WEIGHTS] == (lora / "final" / WEIGHTS).read_bytes()
    assert files["images/01.png"] == (lora / "samples/step-000001/01.png").read_bytes()
    assert pushed.url == f"{hub.url}/ann/dog"
    assert pushed.files == {name: len(content) for name, content in sorted(files.items())}
    out, err = capfd.readouterr()
    assert out == ""
    assert "uploading 6 files" in err


def test_the_card_says_what_the_hub_wants_to_know(hub: HubStandIn, lora: Path) -> None:
    push(lora, "ann/dog")
    card = hub.files("ann/dog")["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "text-to-image"
    assert head["license"] == "apache-2.0"
    assert head["instance_prompt"] == "a photo of sks dog"
    assert {"text-to-image", "lora", "dreambooth", "template:sd-lora"} <= set(head["tags"])
    assert "base_model" not in head  # the tiny base is not on the Hub
    assert [each["text"] for each in head["widget"]] == SAMPLES["samples"]["prompts"]
    assert all(each["output"]["url"] in hub.files("ann/dog") for each in head["widget"])
    assert "<Gallery />" in card
    assert "| Learning rate | 0.001, constant |" in card


def test_the_card_tells_each_rate_and_the_command_that_trains_it() -> None:
    rates = {"lr": 1e-3, "token_lr": 1e-2}
    recipe = make_recipe("tiny", "ann/photos", "run", adapter={"tokens": CAT}, optimizer=rates)
    card = model_card(recipe, "ann/cat")
    assert "| Learning rate | 0.001 (tokens 0.01), constant |" in card
    assert "\nsdtune train run.yaml\n" in card


def test_the_card_says_what_is_asked_of_a_model_of_pixels() -> None:
    asked, unasked = ["of the classes", "text-to-image"], ["makes pictures.", "unconditional-image-generation"]
    for classes, told in ((["bag"], asked), ([], unasked)):
        parts = {"denoiser": {"kind": "unet", "classes": classes}, "scheduler": {}}
        model = {"family": "pixel", "base": None, "from_config": parts}
        card = model_card(make_recipe("tiny", "assets:demo", "run", model=model, adapter={"kind": "full"}), "ann/bag")
        assert all(words in card for words in told)


def test_the_code_of_the_card_draws_what_was_learned() -> None:
    photos = {"path": "assets:demo", "prompt": "a photo of sks dog"}
    recipe = make_recipe("tiny", "photos", "run", data=[photos])
    for prompts, drawn in (
        (["airplane", "a photo of sks dog in a bucket"], "a photo of sks dog in a bucket"),
        (["airplane"], "a photo of sks dog"),
    ):
        card = model_card(recipe, "ann/dog", gallery=[(prompt, "images/00.png") for prompt in prompts])
        assert f'prompt = "{drawn}"' in card


def test_the_command_of_the_card_asks_for_other_pictures() -> None:
    card = model_card(make_recipe("tiny", "assets:demo", "run"), "ann/dog")
    assert "\nsdtune train run.yaml data.0.path=FOLDER\n" in card


def test_a_licence_may_be_chosen(hub: HubStandIn, lora: Path, tmp_path: Path) -> None:
    words = ["push", str(lora), "ann/dog", "--dry-run", "--license", "cc-by-4.0", "--out", str(tmp_path / "card")]
    assert CliRunner().invoke(app, words).exit_code == 0
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc-by-4.0" and "\n`cc-by-4.0`.\n" in card


def test_nothing_personal_goes_up(hub: HubStandIn, lora: Path, tmp_path: Path, sd: Path) -> None:
    whole = make_recipe(sd, lora.parent / "photos-of-my-child", tmp_path / "whole", adapter={"kind": "full"})
    for run, repo in ((lora, "ann/dog"), (Run(whole).complete(), "ann/whole")):
        push(run, repo)
        secrets = [str(lora.parent), lora.parent.name, "my-child", str(tmp_path), str(sd), str(Path.home()), TOKEN]
        for name, content in hub.files(repo).items():
            found = [secret for secret in secrets if secret.encode() in content and len(secret) > 1]
            assert found == [], name
        assert b"environment" not in b" ".join(name.encode() for name in hub.files(repo))
    settings = parse(hub.files("ann/whole")["run.yaml"].decode())
    assert settings.train.steps == 2
    assert (settings.model.base, settings.data[0].path) == ("path/to/base", "path/to/data-0")
    assert settings.output.dir == "runs/whole"


def test_the_users_name_is_nowhere(hub: HubStandIn, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "zaphod-beeblebrox"
    monkeypatch.setenv("HOME", f"/home/{name}")
    monkeypatch.setenv("LOGNAME", name)
    text = (lora / "run.yaml").read_text(encoding="utf-8")
    changed = made_shareable(parse(text.replace("path: ", f"path: /home/{name}/", 1)), "dog")
    assert getpass.getuser() == name
    assert name not in json.dumps(changed.model_dump())


def texts(model: type[BaseModel], key: str = "") -> Iterator[str]:
    """Dotted keys of all settings that can be text."""
    for name, field in fields_of(model).items():
        dotted = f"{key}.{name}".lstrip(".")
        section = section_of(field.annotation)
        if section is not None:
            yield from texts(section, dotted + (".0" if "list" in str(field.annotation) else ""))
        elif "str" in str(field.annotation) or "Literal" in str(field.annotation):
            yield dotted + (".vae" if "dict" in str(field.annotation) else "")


def test_each_setting_that_is_text_is_known_to_be_a_place_or_not() -> None:
    kinds = (shareable.MODELS, shareable.PLACES, shareable.TEXTS)
    keys = list(texts(Recipe))
    assert "data.0.path" in keys and "model.from_config.vae" in keys
    unknown = [key for key in keys if not any(re.fullmatch(kind, key) for kind in kinds)]
    assert unknown == [], "say in sdtune/config/shareable.py whether these can name a file or folder"


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("tiny", "tiny"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("/home/ann/models/sd15", "path/to/base"),
        ("~/sd15.safetensors", "path/to/base"),
        ("C:\\Users\\ann\\sd15", "path/to/base"),
        ("https://ann:secret@example.org/sd15.safetensors?key=1", "https://example.org/sd15.safetensors"),
    ],
)
def test_places_become_plain(base: str, shown: str, lora: Path) -> None:
    recipe = parse((lora / "run.yaml").read_text(encoding="utf-8"))
    recipe.model.base = base
    assert made_shareable(recipe, "dog").model.base == shown


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_the_scale_is_in_the_factors_for_who_reads_no_header(
    kind: str, sd: Path, photos: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    adapter = {"kind": kind, "rank": 4, "alpha": 8.0, "text_encoder": True}
    Run(make_recipe(sd, photos, run.path, adapter=adapter)).complete()
    out = write_hub_folder(run, "ann/dog", tmp_path / "out")
    pushed, own = read_lora(out / WEIGHTS), read_lora(run.final / WEIGHTS)
    assert {layer.scale for layer in pushed.layers.values()} == {1.0} != {layer.scale for layer in own.layers.values()}
    with torch.no_grad():
        drawn = [answers(open_model(str(sd), str(place), device=torch.device("cpu"))) for place in (out, run.path)]
    close(*drawn)


def test_a_second_push_replaces_the_first_and_keeps_other_files(hub: HubStandIn, lora: Path) -> None:
    hub.put("ann/dog", {"notes.txt": b"mine"})
    push(lora, "ann/dog")
    push(lora, "ann/dog")
    assert hub.files("ann/dog")["notes.txt"] == b"mine"
    assert len(hub.repos["ann/dog"].commits) == 2  # the second found nothing new


def test_private_means_private(hub: HubStandIn, lora: Path) -> None:
    push(lora, "ann/dog", private=True)
    assert hub.repos["ann/dog"].private
    hub.put("ann/public", {})
    with pytest.raises(HubError, match="ann/public exists already and everybody can see it.*nothing was uploaded"):
        push(lora, "ann/public", private=True)
    assert hub.files("ann/public") == {}


def test_a_dry_run_writes_the_folder_and_asks_nobody(
    hub: HubStandIn, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert pushing.command(lora, "ann/dog", dry_run=True, out=tmp_path / "look", as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["url"] is None
    assert answer["files"] == {n: (tmp_path / "look" / n).stat().st_size for n in answer["files"]}
    assert {"README.md", "run.yaml", WEIGHTS} <= set(answer["files"])
    assert pushing.command(lora, "ann/dog", dry_run=True) == 0
    out, err = capsys.readouterr()
    assert WEIGHTS in out and f"would go to {hub.url}/ann/dog" in err
    assert hub.requests == []
    with pytest.raises(UsageError, match="exists already and is not overwritten"):
        push(lora, "ann/dog", dry_run=True, out=tmp_path / "look")


# --- and comes back -------------------------------------------------------------------------------------------------


def test_what_is_fetched_draws_as_the_run_does(hub: HubStandIn, lora: Path, tmp_path: Path) -> None:
    from sdtune.sample import command as sample

    push(lora, "ann/dog")
    fetched = snapshot_download("ann/dog")
    for number, model in enumerate((str(lora), fetched)):
        sample(model, ["red apple"], steps=2, out=tmp_path / str(number), as_json=True)
    pictures = [next((tmp_path / str(number)).glob("*.png")).read_bytes() for number in range(2)]
    assert pictures[0] == pictures[1]


CAT = [{"token": "<cat>", "initializer": "dog", "vectors": 2}]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora with text encoder": {"adapter": {"text_encoder": True}},
    "dora": {"adapter": {"kind": "dora"}},
    "lokr": {"adapter": {"kind": "lokr"}},
    "loha": {"adapter": {"kind": "loha", "text_encoder": True}},
    "full": {"adapter": {"kind": "full"}},
    "textual-inversion": {"adapter": {"kind": "textual-inversion", "tokens": CAT}},
    "pivotal": {"adapter": {"tokens": [*CAT, {"token": "<mat>"}], "text_encoder": True}},
    "sdxl pivotal": {"model": {"family": "sdxl"}, "adapter": {"tokens": CAT}},
    "another prediction": {"objective": {"prediction": "v_prediction", "zero_terminal_snr": True}},
    "sdxl": {"model": {"family": "sdxl"}, "adapter": {"text_encoder": True}},
    "lora for inpainting": {},
    "inpainting": {"model": {"inpaint": True}, "adapter": {"kind": "full"}},
    "vae": {"task": "autoencoding", "adapter": {"kind": "full"}},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_code_of_the_card_works(
    method: str, hub: HubStandIn, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As somebody else would run it: base and weights come from the Hub."""
    sections = METHODS[method]
    if "sdxl" in method:
        base = make_sdxl(tmp_path / "base")
    else:
        base = make_sd(tmp_path / "base", **({"in_channels": 9} if method == "lora for inpainting" else {}))
    hub.put("some/base", {f.relative_to(base).as_posix(): f.read_bytes() for f in base.rglob("*") if f.is_file()})
    monkeypatch.chdir(tmp_path)
    validate = {} if method == "vae" else {"validate": {"samples": {"prompts": ['a "dog"'], "steps": 1}}}
    prompt = {"prompt": "a photo of <cat> on <mat>"} if "tokens" in sections.get("adapter", {}) else {}
    few = {"train": {"steps": 1, "batch_size": 1}, "data": [{"path": str(photos), **prompt}]}
    run = Run(make_recipe("some/base", photos, tmp_path / "run", **few, **validate, **sections)).complete()
    push(run, "ann/dog")
    card = hub.files("ann/dog")["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "some/base"
    for name in ("photo.png", "mask.png"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / name)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {"__name__": "__main__"})
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (64, 64)


# --- when it does not go smoothly -----------------------------------------------------------------------------------


def test_a_hub_out_of_order_is_asked_again(
    hub: HubStandIn, lora: Path, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.make_faults(503, 429, DROP, path="/api/repos/create")
    hub.make_faults(500, path="/api/validate-yaml")
    hub.make_faults(502, DROP, path="/preupload/")
    hub.make_faults(503, DROP, path="/lfs/")
    hub.make_faults(504, path="/commit/")
    push(lora, "ann/dog")
    assert hub.faults == []
    assert WEIGHTS in hub.files("ann/dog")
    assert waits[:3] == [1, 2, 4]
    assert "the Hub answers 503; trying again in 1 s" in capsys.readouterr().err


def test_a_hub_that_stays_out_of_order_ends_it(hub: HubStandIn, lora: Path, waits: list[float]) -> None:
    hub.make_faults(*[503] * 6)
    with pytest.raises(HubError, match="the Hub answers 503, after 6 tries; push once more when it is back"):
        push(lora, "ann/dog")
    assert waits == [1, 2, 4, 8, 16]
    assert len(hub.requests) == 6


def test_no_network_at_all(hub: HubStandIn, lora: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="the Hub cannot be reached.*after 6 tries"):
        push(lora, "ann/dog")
    assert waits == [1, 2, 4, 8, 16]


def test_a_slow_hub_is_waited_for(hub: HubStandIn, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "PATIENCE", (1, 0.2, 1, 1))
    hub.delay = 0.05
    push(lora, "ann/dog")
    assert WEIGHTS in hub.files("ann/dog")


def test_a_hub_that_says_nothing_is_given_up(
    hub: HubStandIn, lora: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "PATIENCE", (1, 0.05, 1, 1))
    monkeypatch.setattr(pushing, "WAITS", (1,))
    hub.delay = 0.3
    with pytest.raises(HubError, match="cannot be reached"):
        push(lora, "ann/dog")


@pytest.mark.parametrize(
    ("token", "repo", "status", "words"),
    [
        ("hf_old", "ann/dog", None, "does not accept this token.*hf auth login"),
        (TOKEN, "bob/dog", None, "may not write to bob/dog: you are logged in as ann.*Push to ann/dog, or log in"),
        (TOKEN, "ann/dog", 403, "this token of ann may only read.*hf auth login"),
        (TOKEN, "ann/dog", 404, "has no 'ann'"),
        (TOKEN, "ann/dog", 409, "ann/dog was changed by somebody else during the upload; push once more"),
        (TOKEN, "ann/dog", 400, "refused the upload to ann/dog"),
    ],
)
def test_refusals_are_told_and_not_repeated(
    token: str, repo: str, status: int | None, words: str, hub: HubStandIn, lora: Path,
    waits: list[float], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    if status is not None:
        hub.make_faults(status, path="/preupload/")
    with pytest.raises(HubError, match=words) as caught:
        push(lora, repo)
    assert waits == []
    assert "\n" not in str(caught.value) and token not in str(caught.value)


def test_refusals_through_xet_are_told_too(
    hub: HubStandIn, lora: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet, through which large files go where the Hub has it, tells of a status in the words of its error alone."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.make_faults(403, path="/xet-write-token/")
    with pytest.raises(HubError, match="this token of ann may only read"):
        push(lora, "ann/dog")
    assert waits == []


def test_what_cannot_be_pushed(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubStandIn) -> None:
    for name in ("dog", "ann/dog/2", "ann/my dog", "/dog", "ann/"):
        with pytest.raises(UsageError, match="expected user/name"):
            push(lora, name)
    with pytest.raises(UsageError, match="is not the folder of a run"):
        push(tmp_path, "ann/dog")
    (tmp_path / "run.yaml").write_bytes((lora / "run.yaml").read_bytes())
    with pytest.raises(RunError, match="has not ended.*--resume"):
        push(tmp_path, "ann/dog")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(lora, "ann/dog")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="not logged in.*hf auth login"):
        push(lora, "ann/dog")
    assert hub.requests == []


# --- the token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, 401, 400])
def test_the_token_is_never_seen(fault: int | None, lora: Path, tmp_path: Path) -> None:
    """In another process, with --debug and the client's own debug messages: in no output, no file, and no request."""
    with HubStandIn(users={TOKEN: "ann"}) as hub:
        if fault is not None:
            hub.make_faults(fault, path="/preupload/")
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HOME": str(tmp_path / "hf"), "HF_DEBUG": "1", "PYTHONPATH": str(ROOT)}
        command = ["-m", "sdtune", "push", str(lora), "ann/dog", "--debug", "--json", "--out", str(tmp_path / "out")]
        answer = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True
        )
        assert answer.returncode == (0 if fault is None else 1), answer.stderr
        if fault is None:
            assert json.loads(answer.stdout.splitlines()[-1])["url"] == f"{hub.url}/ann/dog"
        assert TOKEN not in answer.stdout + answer.stderr
        for request in hub.requests:
            sent = {name: value for name, value in request.headers.items() if name.lower() != "authorization"}
            assert TOKEN not in f"{request.path} {sent}" and TOKEN.encode() not in request.body
        storage = [request for request in hub.requests if request.path.startswith("/lfs/")]
        assert all("authorization" not in map(str.lower, request.headers) for request in storage)
    files = [path for place in (tmp_path, lora) for path in place.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


# --- at the end of training -----------------------------------------------------------------------------------------


def train(hub: HubStandIn, photos: Path, out: Path, *more: str) -> tuple[int, str, str]:
    """`sdtune train lora_tiny` for a step, with a push to ann/dog."""
    from typer.testing import CliRunner

    words = [f"data.0.path={photos}", f"output.dir={out}", "output.push_to_hub=ann/dog", "output.trackers=[]"]
    words += ["train.steps=1", "train.batch_size=1", "validate=null", "data.0.prompt=a dog", *more]
    answer = CliRunner().invoke(app, ["train", "lora_tiny", *words, "--json"])
    return answer.exit_code, answer.stdout, answer.stderr


def test_a_run_ends_with_a_push(hub: HubStandIn, photos: Path, tmp_path: Path) -> None:
    code, out, err = train(hub, photos, tmp_path / "run", "output.private=true")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["url"] == f"{hub.url}/ann/dog"
    assert hub.repos["ann/dog"].private
    assert hub.files("ann/dog")[WEIGHTS] == (tmp_path / "run/final" / WEIGHTS).read_bytes()


def test_a_push_that_fails_loses_nothing(hub: HubStandIn, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hub.make_faults(400, path="/commit/")
    code, out, err = train(hub, photos, run)
    assert code == 1
    assert json.loads(out.splitlines()[-1])["url"] is None
    assert (run / "final" / WEIGHTS).is_file() and (run / "report.html").is_file()
    message = err.splitlines()[-1]
    assert "the training is done and its weights are in" in message
    assert message.endswith(f"sdtune push {run} ann/dog")
    push(run, "ann/dog")
    assert WEIGHTS in hub.files("ann/dog")


def test_who_is_not_logged_in_hears_it_before_the_training(
    hub: HubStandIn, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, err = train(hub, photos, tmp_path / "run")
    assert code == 2
    assert "output.push_to_hub" in err and "hf auth login" in err
    assert not (tmp_path / "run").exists()
