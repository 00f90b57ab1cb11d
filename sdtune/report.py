"""The report of a run: one HTML page with everything inside, that says what was trained and how it went.

    write_report(RunFolder("runs/my-dog"))          # runs/my-dog/report.html

The page is made from what the run folder holds. It needs no network and no script. The text stands in
`assets/report.html`, the looks in `assets/report.css`.
"""

import base64
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdtune.config.files import read
from sdtune.families import PARTS
from sdtune.loss_curve import column, loss_curve
from sdtune.run_folder import RunFolder, read_metrics
from sdtune.writing import write_text

ASSETS = Path(__file__).parent / "assets"
LARGEST = 320  # pixels; larger pictures are shrunk for the page
STAGES = 8  # at most so many steps are shown of each prompt
TARGETS = {
    "attention": "attention layers",
    "attention+feedforward": "attention and feed-forward layers",
    "all": "attention, feed-forward and convolution layers",
}

ADAPTERS_IN_WORDS = {"lora": "LoRA", "rslora": "rank-stabilised LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}


@dataclass(frozen=True)
class Case:
    """One thing that the model was asked for, drawn from the same noise before and after training.

    Attributes:
        name: what was asked for. truth: how it should look.
        before, after: the pictures drawn. right_before, right_after: whether they count as the thing.
    """

    name: str
    truth: Image.Image
    before: Image.Image
    after: Image.Image
    right_before: bool
    right_after: bool


@dataclass(frozen=True)
class Comparison:
    """Cases that are counted together.

    Attributes:
        title: such as "16 new things". text: what is compared, in a sentence.
        bar: what is expected, in words. reached: whether it is so.
    """

    title: str
    text: str
    cases: Sequence[Case]
    bar: str
    reached: bool

    @property
    def share_before(self) -> float:
        """Part of the cases that were right before training, in [0, 1]."""
        return sum(case.right_before for case in self.cases) / len(self.cases)

    @property
    def share_after(self) -> float:
        """Part of the cases that were right after training, in [0, 1]."""
        return sum(case.right_after for case in self.cases) / len(self.cases)


def write_report(
    folder: RunFolder, *, title: str | None = None, intro: str = "", comparisons: Sequence[Comparison] = ()
) -> Path:
    """Write `report.html` into a run folder; an older one is replaced.

    Args:
        folder: a run, finished or not.
        title: the folder's name by default. intro: a paragraph below it.
        comparisons: before and after, where they were drawn.

    Returns:
        The page.

    Raises:
        RunError: it cannot be written. ConfigError: run.yaml is damaged.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"picture": picture_uri, "percent": percent}
    written = folder.path / "run.yaml"
    recipe = read(written, str(written))
    rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    page = pages.get_template("report.html").render(
        title=title or folder.path.resolve().name,
        intro=intro,
        facts=facts(recipe, rows),
        comparisons=comparisons,
        curve=loss_curve(rows),
        samples=samples(folder.path / "samples"),
        reconstructed=recipe["task"] == "autoencoding",
        commands=commands(folder.path, recipe),
        settings=written.read_text(encoding="utf-8"),
        environment=text_of(folder.path / "environment.json"),
        css=text_of(ASSETS / "report.css"),
    )
    place = folder.path / "report.html"
    write_text(place, page)
    return place


def facts(recipe: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the run was, as pairs of a word and a value."""
    model, train, optimizer = recipe["model"], recipe["train"], recipe["optimizer"]
    _, batches = column(rows, "samples")
    batch = int(batches[0]) if len(batches) else train["batch_size"] * train["accumulate"]
    found = [
        ("Model", model.get("base") or f"from scratch ({', '.join(model.get('from_config') or {})})"),
        ("Learns", learns(recipe)),
        ("Steps", f"{train['steps']:,}, each of {batch} {'picture' if batch == 1 else 'pictures'}"),
        ("Learning rate", f"{rates(optimizer)}, {optimizer['schedule']}"),
        ("Numbers", f"{train['precision']}, seed {train['seed']}"),
    ]
    _, loss = column(rows, "loss")
    if len(loss):
        tenth = max(1, len(loss) // 10)
        found.append(("Training loss", f"{loss[:tenth].mean():.4g} to {loss[-tenth:].mean():.4g}"))
    _, held = column(rows, "val_loss")
    if len(held):
        found.append(("Held-out loss", f"{held[0]:.4g} to {held[-1]:.4g}"))
    _, nearness = column(rows, "psnr")
    if len(nearness):
        found.append(("PSNR of reconstructions", f"{nearness[0]:.1f} to {nearness[-1]:.1f} dB"))
    _, rate = column(rows, "samples_per_second")
    if len(rate):
        found.append(("Speed", f"{sorted(rate)[len(rate) // 2]:.3g} pictures a second"))
    return found


def rates(optimizer: Mapping[str, Any]) -> str:
    """The learning rate, and those of what has its own."""
    own = {"text encoder": optimizer.get("text_encoder_lr"), "tokens": optimizer.get("token_lr")}
    return f"{optimizer['lr']:g}" + "".join(f" ({what} {rate:g})" for what, rate in own.items() if rate is not None)


def learns(recipe: Mapping[str, Any]) -> str:
    """Which weights change, in words."""
    adapter = recipe["adapter"]
    if recipe["task"] == "autoencoding":
        return "the decoder of the VAE" if adapter.get("decoder_only") else "every weight of the VAE"
    tokens = " and ".join(token["token"] for token in adapter.get("tokens") or ())
    if adapter["kind"] == "textual-inversion":
        return f"the embeddings of {tokens}"
    also = " and the text encoder" if adapter.get("text_encoder") else ""
    also += f", and the embeddings of {tokens}" if tokens else ""
    if adapter["kind"] == "full":
        denoiser = "UNet" if "unet" in PARTS[recipe["model"]["family"]] else "network"
        return f"every weight of the {denoiser}{also}"
    targets = adapter["targets"]
    where = TARGETS.get(targets, targets) if isinstance(targets, str) else ", ".join(targets)
    begun = f", begun from {adapter['init_from']}," if adapter.get("init_from") else ""
    rank = f" of rank {adapter['rank']}" if adapter["rank"] else ""
    return f"a {ADAPTERS_IN_WORDS[adapter['kind']]}{rank}{begun} on the {where}{also}"


def samples(folder: Path) -> list[dict[str, Any]]:
    """The pictures that were drawn while training: for each prompt those of some steps.

    Returns:
        One {"prompt": text, "pictures": [(step, path), ...]} a prompt; steps rise.
    """
    stages = []
    for stage in sorted(folder.glob("step-*")):
        number = re.fullmatch(r"step-(\d+)", stage.name)
        if number and (stage / "prompts.json").is_file():
            prompts = json.loads((stage / "prompts.json").read_text(encoding="utf-8"))["prompts"]
            stages.append((int(number[1]), stage, prompts))
    stages.sort(key=lambda stage: stage[0])
    if len(stages) > STAGES:
        stages = [stages[round(i * (len(stages) - 1) / (STAGES - 1))] for i in range(STAGES)]
    found: dict[tuple[int, str], list[tuple[int, Path]]] = {}
    for step, stage, prompts in stages:
        for i, prompt in enumerate(prompts):
            found.setdefault((i, prompt), []).append((step, stage / f"{i:02d}.png"))
    return [{"prompt": prompt, "pictures": pictures} for (_, prompt), pictures in sorted(found.items())]


def commands(folder: Path, recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to do next, as pairs of words and command."""
    run, first = shlex.quote(str(folder)), recipe["data"][0]
    photos = "data.0.path=photos" if first.get("path") else "'data.0={path: photos}'"
    found = []
    if recipe["task"] == "denoising":
        found.append(("Draw with what this run made", f'sdtune sample {run} --prompt "what to draw"'))
    found.append(
        (
            "The same training on your own pictures",
            f"sdtune train {shlex.quote(str(folder / 'run.yaml'))} {photos} output.dir=runs/mine",
        )
    )
    if recipe["task"] == "denoising":
        found += [
            ("Stable Diffusion 1.5 on your own pictures: copy its recipe", "sdtune recipes cp lora_sd15 mine.yaml"),
            (
                "then change in it what you like, and train, on one GPU or several",
                "accelerate launch -m sdtune train mine.yaml data.0.path=photos",
            ),
        ]
    return found


def picture_uri(picture: Image.Image | Path) -> str:
    """A picture as a `data:` address: small ones exactly as they are, larger ones shrunk."""
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            picture = opened.convert("RGB")
    small = max(picture.size) <= LARGEST // 2
    if max(picture.size) > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "WEBP", lossless=small, quality=80 if small else 88, method=4)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def percent(share: float) -> str:
    """0.953 as "95 %"."""
    return f"{100 * share:.0f} %"


def text_of(path: Path) -> str:
    """A file's text, "" where it is missing."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""
