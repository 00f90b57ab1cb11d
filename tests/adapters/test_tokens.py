"""New tokens: only they learn, and what they learned is the same wherever it is opened."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtune.adapters.textual_inversion import TextualInversion
from sdtune.adapters.tokens import Token, load_embedding
from sdtune.errors import DataError, UsageError, WeightsError
from sdtune.families import family_class
from sdtune.families.loading import token_ids
from sdtune.opening import open_model
from sdtune.run import Run
from tests.adapters.conftest import LOW_RANK, answers, run_in_two_processes, stock_answers
from tests.factories import losses, make_photos, make_recipe, weights

CPU = torch.device("cpu")
TOKENS = [{"token": "<cat>", "initializer": "dog", "vectors": 3}, {"token": "<rug>"}]
PROMPT = "<rug> and <cat>, a photo"
KINDS = ("textual-inversion", *LOW_RANK)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures whose captions hold the tokens."""
    folder = make_photos(tmp_path_factory.mktemp("data") / "pictures", 3)
    captions = ("a photo of <cat>", "a <cat> on a <rug>", "dog")
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(base: Path, pictures: Path, out: Path, kind: str = "textual-inversion", **sections: Any) -> Any:
    """A recipe that learns the tokens, alone or beside a low-rank adapter in the text encoder too."""
    adapter: dict[str, Any] = {"kind": kind, "tokens": TOKENS}
    if kind != "textual-inversion":
        adapter |= {"rank": 2, "text_encoder": True}
    optimizer = {"lr": 1e-2, "token_lr": 3e-2}
    return make_recipe(base, pictures, out, adapter=adapter, **{"optimizer": optimizer} | sections)


@pytest.fixture(scope="module")
def finished(sd: Path, sdxl: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A finished run of a family and kind, each made once."""
    folder, runs = tmp_path_factory.mktemp("tokens"), dict[tuple[str, str], Run]()

    def run(family: str, kind: str) -> Run:
        if (family, kind) not in runs:
            base = sdxl if family == "sdxl" else sd
            made = recipe(base, pictures, folder / f"{family} {kind}", kind, model={"family": family})
            runs[family, kind] = Run(made)
            runs[family, kind].complete()
        return runs[family, kind]

    return run


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl"])
def test_a_token_begins_as_its_initializer(sd: Path, sdxl: Path, name: str) -> None:
    family, base = (family_class(name).load(str(sdxl if name == "sdxl" else sd)) for _ in range(2))
    learning = TextualInversion([Token("<cat>", "dog", 2)]).attach(family, ["unet"], 0)
    assert list(learning["tokens"]) == list(family.text_encoders)
    assert torch.equal(answers(family, "a <cat>."), answers(base, "a dog dog."))
    assert torch.equal(answers(family, "a photo of dog"), answers(base, "a photo of dog"))
    asking = [p for network in family.modules.values() for p in network.parameters() if p.requires_grad]
    assert {id(p) for p in asking} == {id(p) for p in learning["tokens"].values()}


def test_a_token_without_initializer_is_drawn_from_the_seed(sd: Path) -> None:
    def rows(seed: int) -> torch.Tensor:
        family = family_class("stable-diffusion").load(str(sd))
        weight = family.modules["text_encoder"].get_input_embeddings().weight
        found = TextualInversion([Token("<cat>", vectors=75)]).attach(family, [], seed)["tokens"]["text_encoder"]
        assert found.detach().std() == pytest.approx(weight.std().item(), rel=0.1)
        return found

    assert torch.equal(rows(3), rows(3))
    assert not torch.equal(rows(3), rows(4))


def test_several_tokens_of_an_initializer_fill_several_vectors(sd: Path) -> None:
    family, base = (family_class("stable-diffusion").load(str(sd)) for _ in range(2))
    TextualInversion([Token("<cat>", "of photo", 4)]).attach(family, [], 0)
    assert torch.equal(answers(family, "<cat>"), answers(base, "of photo of photo"))


@pytest.mark.parametrize(
    ("token", "match"),
    [
        (Token("<cat>", "corgi"), r"'corgi', with which '<cat>' begins, is 5 tokens .*c, o, r, g, i</w>.* for 1; .* 5"),
        (Token("<cat>", "a photo of dog", 3), "is 4 tokens for this model .* has room for 3; .* set vectors: 4"),
        (Token("<cat>", " "), r"is 0 tokens for this model \(nothing\)"),
        (Token("dog"), "the token 'dog' is a word that this model knows already; .* '<dog-new>'"),
        (Token("photo</w>"), "is a word that this model knows already"),
    ],
)
def test_tokens_that_cannot_be_learned_are_refused(sd: Path, token: Token, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        TextualInversion([token]).attach(family_class("stable-diffusion").load(str(sd)), [], 0)


def test_a_token_that_no_caption_has_is_refused(sd: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'<cat>' shall learn .* none of the 5 captions, .* 'a photo of dog 0'"):
        Run(recipe(sd, photos, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_others_follow_the_first_of_a_token(sd: Path) -> None:
    family: Any = family_class("stable-diffusion").load(str(sd))
    tokenizer = family.tokenizers["tokenizer"]
    (plain,) = token_ids(tokenizer, ["a dog of"])
    TextualInversion([Token("<a>", vectors=3), Token("<b>")]).attach(family, [], 0)
    new = len(tokenizer) - 4
    assert token_ids(tokenizer, ["a dog of", "<A>", "<b> <a>"]) == [
        plain,
        [new, new + 1, new + 2],
        [new + 3, new, new + 1, new + 2],
    ]


def test_the_pooled_embedding_stays_that_of_the_end(sdxl: Path) -> None:
    """SDXL's second text encoder calls its end 2, and so looks for it at the largest id."""
    family: Any = family_class("sdxl").load(str(sdxl))
    encoder, base = family.modules["text_encoder_2"], family_class("sdxl").load(str(sdxl))
    for part in encoder.modules():
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = 2
    TextualInversion([Token("<cat>", "dog")]).attach(family, [], 0)
    with torch.no_grad():
        torch.testing.assert_close(family.encode_text(["a <cat> of"]).pooled, base.encode_text(["a dog of"]).pooled)


# --- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
def test_only_the_new_rows_learn(sd: Path, sdxl: Path, pictures: Path, tmp_path: Path, family: str) -> None:
    optimizer = {"lr": 1e-2, "weight_decay": 0.5}
    base = sdxl if family == "sdxl" else sd
    run = Run(
        recipe(base, pictures, tmp_path / "run", model={"family": family}, optimizer=optimizer, train={"ema": 0.9})
    )
    before = {
        f"{name}.{key}": tensor.clone()
        for name, network in run.family.modules.items()
        for key, tensor in network.state_dict().items()
    }
    run.complete()
    after = {
        f"{name}.{key}": tensor
        for name, network in run.family.modules.items()
        for key, tensor in network.state_dict().items()
    }
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    learned = {key for key in before if key.endswith("token_embedding.learned")}
    assert changed == learned and len(learned) == len(run.family.text_encoders)
    for key in learned:
        assert (before[key] != after[key]).any(dim=1).all()  # each row


def test_tokens_learn_at_their_own_rate(sd: Path, pictures: Path, tmp_path: Path) -> None:
    run = Run(recipe(sd, pictures, tmp_path / "run", "lora", optimizer={"lr": 1e-3, "token_lr": 5e-2}))
    assert [group["base_lr"] for group in run.optimizer.param_groups] == [1e-3, 1e-3, 5e-2]
    plain = Run(recipe(sd, pictures, tmp_path / "plain", "lora", optimizer={"lr": 1e-3, "text_encoder_lr": 1e-4}))
    assert [group["base_lr"] for group in plain.optimizer.param_groups] == [1e-3, 1e-4, 1e-3]


# --- what is written --------------------------------------------------------------------------------------------------


STOCK = """
import json
import sys
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

found = {}
for job in json.load(open(sys.argv[1])):
    pipeline = DiffusionPipeline.from_pretrained(job["base"])
    if job["lora"]:
        pipeline.load_lora_weights(job["final"], weight_name="pytorch_lora_weights.safetensors")
    for file in sorted(Path(job["final"]).glob("learned_embeds*.safetensors")):
        if hasattr(pipeline, "text_encoder_2"):
            with safe_open(file, "pt") as opened:
                token = opened.metadata()["token"]
            for key, number in (("clip_l", ""), ("clip_g", "_2")):
                pipeline.load_textual_inversion(
                    load_file(file)[key],
                    token=token,
                    text_encoder=getattr(pipeline, "text_encoder" + number),
                    tokenizer=getattr(pipeline, "tokenizer" + number),
                )
        else:
            pipeline.load_textual_inversion(str(file))
    answer = pipeline.encode_prompt(job["prompt"], device="cpu", num_images_per_prompt=1,
                                    do_classifier_free_guidance=False)
    found[job["name"]] = answer[0].detach().contiguous()
    if len(answer) == 4:
        found[job["name"] + " pooled"] = answer[2].detach().contiguous()
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def stock(
    sd: Path, sdxl: Path, finished: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Prompt embeddings of stock diffusers with the files of finished runs."""
    jobs = [
        {
            "name": f"{family} {kind}",
            "base": str(sdxl if family == "sdxl" else sd),
            "final": str(finished(family, kind).folder.final),
            "lora": kind == "lora",
            "prompt": PROMPT,
        }
        for family in ("stable-diffusion", "sdxl")
        for kind in ("textual-inversion", "lora")
    ]
    return stock_answers(jobs, STOCK, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("kind", ["textual-inversion", "lora"])
@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
@torch.no_grad()
def test_stock_diffusers_reads_the_same_prompt(
    finished: Callable[..., Run], stock: dict[str, torch.Tensor], family: str, kind: str
) -> None:
    ours = finished(family, kind).family
    answers(ours)  # evaluation mode
    told = ours.encode_text([PROMPT])
    torch.testing.assert_close(stock[f"{family} {kind}"], told.text)
    if told.pooled is not None:
        torch.testing.assert_close(stock[f"{family} {kind} pooled"], told.pooled)


@pytest.mark.parametrize("kind", ["textual-inversion", "lora", "lokr"])
@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
def test_a_run_is_opened_with_its_tokens(
    sd: Path, sdxl: Path, finished: Callable[..., Run], tmp_path: Path, family: str, kind: str
) -> None:
    run = finished(family, kind)
    expected = answers(run.family, PROMPT)
    close = {"atol": 1e-4, "rtol": 1e-4}
    opened = open_model(str(run.folder.path), device=CPU)
    torch.testing.assert_close(answers(opened, PROMPT), expected, **close)
    beside = open_model(str(sdxl if family == "sdxl" else sd), str(run.folder.path), device=CPU)
    torch.testing.assert_close(answers(beside, PROMPT), expected, **close)
    opened.save(tmp_path / "whole")  # a model that knows the words
    torch.testing.assert_close(answers(open_model(str(tmp_path / "whole"), device=CPU), PROMPT), expected, **close)


def test_a_file_of_one_token_is_called_as_diffusers_looks_for_it(sd: Path, pictures: Path, tmp_path: Path) -> None:
    run = Run(recipe(sd, pictures, tmp_path / "run"))
    run.adapter = TextualInversion([Token("<cat>", vectors=4)])
    run.save_weights(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "learned_embeds.safetensors")
    assert {key: tensor.shape for key, tensor in saved.items()} == {"<cat>": (4, 32)}


def test_files_of_other_tools(sd: Path, tmp_path: Path) -> None:
    family, rows = family_class("stable-diffusion").load(str(sd)), torch.randn(2, 32)
    save_file({"emb_params": rows}, tmp_path / "mycat.safetensors")  # A1111
    save_file({"<one>": rows[0].clone()}, tmp_path / "one.safetensors")  # of one vector, as older scripts wrote it
    for name in ("mycat", "one"):
        load_embedding(family, tmp_path / f"{name}.safetensors")
    weight = family.modules["text_encoder"].get_input_embeddings().weight
    (ids,) = token_ids(family.tokenizers["tokenizer"], ["mycat <one>"])
    assert torch.equal(weight[ids], rows[[0, 1, 0]])
    with pytest.raises(UsageError, match="the token '<one>', a word that this model has learned before; leave it out"):
        load_embedding(family, tmp_path / "one.safetensors")


def test_files_that_do_not_fit_are_refused(sd: Path, sdxl: Path, finished: Callable[..., Run], tmp_path: Path) -> None:
    small, large = (finished(name, "textual-inversion").folder.final for name in ("stable-diffusion", "sdxl"))
    with pytest.raises(WeightsError, match="'<cat>' have width 32, this model's text encoders have 32, 24"):
        open_model(str(sdxl), str(small), device=CPU)
    with pytest.raises(WeightsError, match="'<cat>' have width 24, 32, this model's text encoders have 32"):
        open_model(str(sd), str(large), device=CPU)
    with pytest.raises(UsageError, match="new words and no LoRA, and words have no weight, got 0.5"):
        open_model(str(sd), f"{small}:0.5", device=CPU)
    shutil.copytree(small, tmp_path / "cut")
    (tmp_path / "cut" / "learned_embeds-1.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        open_model(str(tmp_path / "cut"), device=CPU)


@pytest.mark.parametrize("kind", ["textual-inversion", "lora"])
@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
def test_a_run_begins_where_another_ended(
    sd: Path, sdxl: Path, pictures: Path, finished: Callable[..., Run], tmp_path: Path, family: str, kind: str
) -> None:
    before, base = finished(family, kind), sdxl if family == "sdxl" else sd
    made = recipe(base, pictures, tmp_path / "run", kind, model={"family": family})
    made.adapter.init_from = str(before.folder.path)
    run = Run(made)
    assert all(torch.equal(p, before.parameters[key]) for key, p in run.parameters.items())
    made.adapter.tokens[0].vectors, made.output.dir = 2, str(tmp_path / "other")
    with pytest.raises(UsageError, match="adapter.init_from: '<cat>' has 3 vectors in .* asks for 2; set vectors: 3"):
        Run(made)
    made.adapter.tokens[0].token = made.adapter.tokens[1].token = "<dog>"
    with pytest.raises(UsageError, match="has no token <dog>; its tokens are: <cat>, <rug>"):
        Run(made)


def test_tokens_to_begin_with_are_never_left_out(
    sd: Path, pictures: Path, finished: Callable[..., Run], tmp_path: Path
) -> None:
    before = finished("stable-diffusion", "lora").folder
    for named, ask in (
        (None, "<cat>, <rug>, and adapter.tokens names none"),
        (TOKENS[:1], "<rug>, and adapter.tokens"),
    ):
        made = recipe(sd, pictures, tmp_path / "run", "lora")
        made.adapter.init_from = str(before.path)
        made.adapter.tokens = named and made.adapter.tokens[:1]
        with pytest.raises(UsageError, match=f"adapter.init_from: .* has the tokens? {ask}") as told:
            Run(made)
    assert "'adapter.tokens=[{token: <cat>, vectors: 3}, {token: <rug>, vectors: 1}]'" in str(told.value)
    made.adapter.tokens, made.adapter.init_from = None, str(before.final / "pytorch_lora_weights.safetensors")
    assert Run(made).learning.keys() == {"unet", "text_encoder"}  # the LoRA alone, where it is named
    made = recipe(sd, pictures, tmp_path / "tokens")
    made.adapter.init_from = str(before.path)
    with pytest.raises(UsageError, match="has a LoRA beside its tokens, which textual inversion would leave out"):
        Run(made)


# --- the same by another way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["textual-inversion", "lora"])
def test_a_stopped_run_goes_on_exactly(sd: Path, pictures: Path, tmp_path: Path, kind: str) -> None:
    samples = {"prompts": ["a <cat>"], "steps": 1}
    common: dict[str, Any] = {"train": {"steps": 4, "ema": 0.9}, "validate": {"samples": samples}}
    whole = Run(recipe(sd, pictures, tmp_path / "whole", kind, **common))
    whole.complete()
    halves = recipe(sd, pictures, tmp_path / "halves", kind, output={"checkpoint_every": 2}, **common)
    for info in Run(halves).steps():
        if info.step == 3:
            break
    again = Run(halves, resume=True)
    assert again.step == 2
    again.complete()
    expected, got = weights(whole.folder.final), weights(again.folder.final)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    first, last = (Path("samples") / f"step-{step:06d}" / "00.png" for step in (0, 4))
    assert (whole.folder.path / last).read_bytes() == (again.folder.path / last).read_bytes()
    assert (whole.folder.path / last).read_bytes() != (whole.folder.path / first).read_bytes()
    page = (whole.folder.path / "report.html").read_text(encoding="utf-8")
    assert "the embeddings of &lt;cat&gt; and &lt;rug&gt;" in page and "a &lt;cat&gt;" in page


def test_gradient_checkpointing_changes_nothing_but_the_memory(sd: Path, pictures: Path, tmp_path: Path) -> None:
    for name, change in (("plain", {}), ("less", {"gradient_checkpointing": True})):
        run = Run(recipe(sd, pictures, tmp_path / name, train={"steps": 3} | change))
        run.complete()
    assert losses(tmp_path / "less") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert run.family.modules["unet"].training  # where blocks are computed again


@pytest.fixture(scope="module")
def pairs(sd: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each kind in one process, "<kind> one", and with half the batch in two, "<kind> two"."""
    folder = tmp_path_factory.mktemp("pairs")

    def made(kind: str, name: str, size: int) -> Any:
        return recipe(sd, pictures, folder / f"{kind} {name}", kind, train={"steps": 2, "batch_size": size})

    for kind in ("textual-inversion", "lora"):
        Run(made(kind, "one", 2)).complete()
    run_in_two_processes([made(kind, "two", 1) for kind in ("textual-inversion", "lora")], folder)
    return folder


@pytest.mark.parametrize("kind", ["textual-inversion", "lora"])
def test_two_processes_are_one_with_twice_the_batch(pairs: Path, kind: str) -> None:
    one, two = pairs / f"{kind} one", pairs / f"{kind} two"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    expected = weights(one / "final")
    for key, tensor in weights(two / "final").items():
        torch.testing.assert_close(tensor, expected[key], atol=2e-4, rtol=0)
