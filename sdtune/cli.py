"""The command `sdtune`: arguments in, exit codes out.

Each command imports what it runs inside, so that `--help` and `recipes` do not wait for torch. Results go to stdout,
everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted.
"""

import errno
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from sdtune import __version__
from sdtune.errors import SdtuneError, UsageError, nearest
from sdtune.families import SAMPLERS

INTERRUPTED = 130

app = typer.Typer(
    help="Turn a folder of pictures into a fine-tuned text-to-image model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes", help="The recipes that come with sdtune.")

lora_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lora_app, name="lora", help="Look into LoRA files, merge, resize and extract them.")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on one line, last on stdout.")]
LoraOut = Annotated[Path, typer.Option("--out", metavar="FILE", help="The new .safetensors file.")]
LoraFormat = Annotated[str, typer.Option("--format", help="diffusers or kohya.")]
LoraBase = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="What it is for: kohya's format counts the blocks of an SDXL; runs know it."),
]
Prompt = Annotated[str | None, typer.Option(help="One caption for all pictures.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of the pictures; image by default.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the captions; text by default.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name of `sdtune recipes ls`.")]


def main() -> None:
    """Entry point of the command and of `python -m sdtune`."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        print(f"sdtune {__version__}")
        raise typer.Exit()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="In place of the recipe's: train.steps=10.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train what a recipe says. On several processes: accelerate launch -m sdtune train RECIPE."""

    def run() -> int:
        from sdtune.config import load
        from sdtune.resuming import check_folder

        check_folder(load(recipe, overrides or []), resume=resume)  # faults are told before the next line imports torch
        from sdtune.run import command

        return command(recipe, overrides or [], resume=resume, as_json=as_json)

    _end_with(run, debug)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A run or model folder, hub id, or tiny.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to draw; may be given several times.")],
    negative_prompt: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A file, folder or run with a LoRA or token; FILE:0.7 gives it a weight; several times."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next ones count on.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale.")] = 7.5,
    sampler: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"In place of the model's own: {', '.join(SAMPLERS)}.")
    ] = None,
    dynamic_thresholding: Annotated[
        float | None,
        typer.Option(metavar="Q", min=0.5, max=1, help="Of pixel models: what is brighter than this quantile is cut."),
    ] = None,
    init_image: Annotated[Path | None, typer.Option(metavar="FILE", help="Begin with this picture.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far to go from it, up to 1; 0.8 unless told, with a mask 1.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of inpainting models: what is white is painted anew.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels; the model's own unless told.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels; the model's own unless told.")] = None,
    init_noise_optimization: Annotated[
        bool, typer.Option("--init-noise-optimization", help="Move the first noise until no subject is forgotten.")
    ] = False,
    subjects: Annotated[
        str | None, typer.Option(help="Of --init-noise-optimization: cat,dog; found in the prompt unless told.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw pictures from prompts."""
    options = {name: value for name, value in locals().items() if name not in ("model", "prompt", "lora", "debug")}

    def run() -> int:
        from sdtune.families.schedulers import check_name

        check_name(sampler)  # told before the next line imports torch
        from sdtune.sample import command

        return command(model, prompt, loras=lora or [], **options)

    _end_with(run, debug)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    no_prior: Annotated[bool, typer.Option("--no-prior", help="No class pictures: see what is forgotten.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Teach the embedded tiny model 16 new things and report what it learned: about 4 minutes on a CPU, offline."""

    def run() -> int:
        from sdtune.demo import command

        return command(out, prior=not no_prior, as_json=as_json)

    _end_with(run, debug)


@app.command()
def check(
    target: Annotated[
        str, typer.Argument(metavar="DATASET_OR_RECIPE", help="A folder, a data set of the Hub, or a recipe.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="In place of the recipe's.")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help='What each caption must hold, such as "sks dog".')] = None,
    resolution: Annotated[int | None, typer.Option(min=8, help="Side of training pictures; 512 by default.")] = None,
    prompt: Prompt = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    fix: Annotated[Path | None, typer.Option(metavar="OUT", help="Write a cleaned copy into a new folder.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at every picture and caption before training. Exit code 1: training would fail."""

    def run() -> int:
        from sdtune.checking import command

        return command(
            target,
            overrides or [],
            trigger=trigger,
            resolution=resolution,
            prompt=prompt,
            image_column=image_column,
            text_column=text_column,
            fix=fix,
            as_json=as_json,
        )

    _end_with(run, debug)


@app.command()
def dedupe(
    target: Annotated[
        str, typer.Argument(metavar="DATASET", help="A folder or a data set of the Hub, with or without captions.")
    ],
    prompt: Prompt = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    threshold: Annotated[int, typer.Option(help="Bits of the perceptual hash that may differ, 0 to 16.")] = 6,
    out: Annotated[Path | None, typer.Option(help="Write what is kept into a new folder.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw the groups into a file, such as alike.png.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show pictures that look alike; keep the largest of each."""
    options = {name: value for name, value in locals().items() if name not in ("target", "debug")}

    def run() -> int:
        from sdtune.data.dedupe import command

        return command(target, **options)

    _end_with(run, debug)


@app.command()
def coco(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")],
    captions: Annotated[Path | None, typer.Option(metavar="FILE", help="captions_X.json.")] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the pictures are.")] = None,
    captions_per_image: Annotated[str, typer.Option(help="all, first, longest, join or random:SEED.")] = "all",
    instances: Annotated[
        Path | None, typer.Option(metavar="FILE", help="instances_X.json; pictures without an object are left out.")
    ] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only these objects count; several times.")] = None,
    match: Annotated[str, typer.Option(help="any or all: whether a picture needs one category or each.")] = "any",
    min_area: Annotated[float, typer.Option(min=0, help="Smaller objects do not count, in square pixels.")] = 0.0,
    no_crowd: Annotated[bool, typer.Option("--no-crowd", help="Crowds do not count.")] = False,
    license: Annotated[list[str] | None, typer.Option(help="Only pictures under it: number or name.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw this many pictures.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --limit and --split.")] = 0,
    masks: Annotated[bool, typer.Option("--masks", help="Write a mask of each picture's objects that count.")] = False,
    images_mode: Annotated[
        str, typer.Option(help="copy, link (hard links, else copies), or reference: write names alone.")
    ] = "link",
    split: Annotated[list[str] | None, typer.Option(help="A share of the pictures: val=0.05; several times.")] = None,
    prompt_from: Annotated[str | None, typer.Option(help='category: "a photo of a {category}" as caption.')] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a data set folder of COCO's json files and pictures."""

    def run() -> int:
        from data_tools.coco import command

        return command(
            captions=captions,
            images=images,
            out=out,
            captions_per_image=captions_per_image,
            instances=instances,
            categories=category or [],
            match=match,
            min_area=min_area,
            no_crowd=no_crowd,
            licenses=license or [],
            limit=limit,
            seed=seed,
            masks=masks,
            images_mode=images_mode,
            splits=split or [],
            prompt_from=prompt_from,
            as_json=as_json,
        )

    _end_with(run, debug)


@app.command()
def caption(
    pictures: Annotated[Path, typer.Argument(metavar="PICTURES", help="Folder of pictures, with its sub-folders.")],
    out: Annotated[Path | None, typer.Option(help="New folder for captions and links; else beside PICTURES.")] = None,
    kind: Annotated[str, typer.Option("--format", help="jsonl, txt (one a picture) or parquet.")] = "jsonl",
    model: Annotated[
        str, typer.Option(help="Hub id or folder of a captioner, or tiny.")
    ] = "Salesforce/blip-image-captioning-base",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    prompt: Annotated[str, typer.Option(help="Words that the model goes on from; they are cut off again.")] = "",
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams of the search; 3 unless told.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of a caption at most.")] = 40,
    sample: Annotated[bool, typer.Option("--sample", help="Draw the words at random.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of --sample; 1 unless told.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of --sample; 0.9 unless told.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --sample.")] = 0,
    captions: Annotated[int, typer.Option(min=1, help="Captions for each picture.")] = 1,
    prefix: Annotated[str, typer.Option(help="Words before each caption.")] = "",
    trigger: Annotated[str, typer.Option(help='Such as "sks dog": before the caption, with a comma.')] = "",
    suffix: Annotated[str, typer.Option(help="Words after each caption.")] = "",
    background: Annotated[str, typer.Option(help="Colour behind transparent pictures.")] = "white",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Caption anew what has captions.")] = False,
    precision: Annotated[str, typer.Option(help="auto (half on a GPU), fp32, bf16 or fp16.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures at a time; 32 on a GPU, else 8.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode pictures.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Open weights that are a pickle.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Caption a folder of pictures. Given again after a stop, it goes on. Exit code 1 if a picture was rejected."""
    options = {name: value for name, value in locals().items() if name not in ("pictures", "debug")}

    def run() -> int:
        from data_tools.caption import command

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # says what Ctrl-C says
        return command(pictures, **options)

    _end_with(run, debug)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, its final/ or a checkpoint, a model, or a LoRA.")
    ],
    kind: Annotated[str, typer.Option("--format", help="diffusers, peft, kohya, single-file or merged.")],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The new folder, or .safetensors file; else RUN's name, here.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; its own unless told.")] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Of a LoRA that no run knows the base of.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what was learned as other tools read it: diffusers, peft, A1111, ComfyUI."""

    def run() -> int:
        from sdtune.export import command

        return command(source, kind, out, dtype=dtype, base=base, as_json=as_json)

    _end_with(run, debug)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where it goes on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder, and show what would go up.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write the folder; else RUN/push.")] = None,
    license: Annotated[str | None, typer.Option(help="As the Hub calls it; that of the base unless told.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a run to the Hub: weights, a card with pictures and the settings."""

    def execute() -> int:
        from sdtune.hub import command

        return command(run, repo, private=private, dry_run=dry_run, out=out, license=license, as_json=as_json)

    _end_with(execute, debug)


@recipes_app.command("ls")
def recipes_ls(debug: Debug = False) -> None:
    """List the shipped recipes."""

    def run() -> int:
        from sdtune.config.shipped import shipped_recipes

        recipes = shipped_recipes()
        width = max(map(len, recipes), default=0)
        for name, path in recipes.items():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            print(f"{name:<{width}}  {first.removeprefix('#').strip()}")
        return 0

    _end_with(run, debug)


@recipes_app.command("show")
def recipes_show(name: Name, debug: Debug = False) -> None:
    """Print a recipe."""

    def run() -> int:
        print(_shipped(name).read_text(encoding="utf-8"), end="")
        return 0

    _end_with(run, debug)


@recipes_app.command("cp")
def recipes_cp(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file, or a folder for it.")],
    debug: Debug = False,
) -> None:
    """Copy a recipe, to change it. An existing file is never overwritten."""

    def run() -> int:
        source = _shipped(name)
        target = file / source.name if file.is_dir() else file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("x", encoding="utf-8") as copy:
                copy.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            raise UsageError(f"'{target}' exists already and is not overwritten; name another file") from None
        print(f"{target}: train it with: sdtune train {target}", file=sys.stderr)
        return 0

    _end_with(run, debug)


@lora_app.command("info")
def lora_info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A LoRA file, or a folder or run with one.")],
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Count what would be applied to it.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a file is. Exit code 1 if it would be refused."""

    def run() -> int:
        from sdtune.lora_tools import info_command

        return info_command(file, base=base, as_json=as_json)

    _end_with(run, debug)


@lora_app.command("merge", context_settings={"ignore_unknown_options": True})  # a weight may be -1
def lora_merge(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help="LoRA files, or folders or runs with one.")],
    out: LoraOut,
    weights: Annotated[
        list[float] | None, typer.Option(help="One for each file: --weights 0.7 0.3; 1 each unless told.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Then bring it down to this rank.")] = None,
    kind: LoraFormat = "diffusers",
    base: LoraBase = None,
    debug: Debug = False,
) -> None:
    """Write the weighted sum of several LoRA, exact unless a rank is given."""

    def run() -> int:
        from sdtune.lora_tools import merge_command

        # an option takes one value: the other weights come as if they were files
        numbers = [name for name in files if _is_number(name)]
        places = [name for name in files if name not in numbers]
        given = [*(weights or []), *map(float, numbers)]
        return merge_command(places, weights=given, rank=rank, out=out, kind=kind, base=base)

    _end_with(run, debug)


@lora_app.command("resize")
def lora_resize(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A LoRA file, or a folder or run with one.")],
    out: LoraOut,
    rank: Annotated[int | None, typer.Option(min=1, help="The new rank, at most.")] = None,
    fraction: Annotated[float, typer.Option(min=0.01, max=1, help="Share of each layer's energy to keep.")] = 1.0,
    kind: LoraFormat = "diffusers",
    base: LoraBase = None,
    debug: Debug = False,
) -> None:
    """Write the nearest LoRA of a smaller rank."""

    def run() -> int:
        from sdtune.lora_tools import resize_command

        return resize_command(file, rank=rank, fraction=fraction, out=out, kind=kind, base=base)

    _end_with(run, debug)


@lora_app.command("extract")
def lora_extract(
    base: Annotated[str, typer.Option(metavar="MODEL", help="What the other was trained from.")],
    tuned: Annotated[str, typer.Option(metavar="MODEL_OR_RUN", help="What was learned.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")],
    out: LoraOut,
    kind: LoraFormat = "diffusers",
    debug: Debug = False,
) -> None:
    """Write the difference of two models as LoRA, and say how much of it is kept."""

    def run() -> int:
        from sdtune.lora_tools import extract_command

        return extract_command(base, tuned, rank=rank, out=out, kind=kind)

    _end_with(run, debug)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not Path(text).exists()


@recipes_app.command("schema")
def recipes_schema(debug: Debug = False) -> None:
    """Print the JSON schema of a recipe, for editors."""

    def run() -> int:
        import json

        from sdtune.config.schema import recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
        return 0

    _end_with(run, debug)


def _shipped(name: str) -> Path:
    """The file of a shipped recipe. Raises UsageError with the nearest name."""
    from sdtune.config.shipped import shipped_recipes

    recipes = shipped_recipes()
    if name not in recipes:
        raise UsageError(f"no shipped recipe is called '{name}'; {nearest(name, list(recipes))}")
    return recipes[name]


def _end_with(run: Callable[[], int], debug: bool) -> None:
    """Run a command and leave with its exit code; errors become one paragraph on stderr.

    `debug` lets an error through, with its traceback.
    """
    try:
        code = run()
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        raise  # whoever read the output has gone: the library ends quietly
    except Exception as error:
        if debug:
            raise
        print(f"error: {_paragraph(error)}", file=sys.stderr)
        code = error.exit_code if isinstance(error, SdtuneError) else 1
    raise typer.Exit(code)


def _paragraph(error: Exception) -> str:
    """An error in words, with what to do next."""
    if isinstance(error, SdtuneError):
        return str(error)
    if any(_is_disk_full(cause) for cause in _causes(error)):
        place = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return (
            f"there is no space left on the disk{place}. Make room, or write elsewhere with output.dir=FOLDER or "
            "--out; a run that has a checkpoint goes on with the same command and --resume"
        )
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            "the memory is full. Try train.batch_size=1 with a larger train.accumulate, train.precision=bf16, "
            "train.gradient_checkpointing=true or a smaller images.resolution"
        )
    what = " ".join(str(error).split()) or "no message"
    return f"unexpected {type(error).__name__}: {what}. Run the same command with --debug to see where it happened"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_disk_full(error: BaseException) -> bool:
    """Whether the disk, or the share of it that the user may fill, is full."""
    full = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows knows no quota error
    if isinstance(error, OSError) and error.errno in full:
        return True
    return "No space left on device" in str(error)  # safetensors and torch raise their own kinds
