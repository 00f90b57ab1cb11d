"""Whether a run folder can be begun, or gone on with by a recipe."""

import shlex
from pathlib import Path

from sdtune.config import Recipe, changes, parse
from sdtune.config.messages import show
from sdtune.errors import RunError
from sdtune.run_folder import RunFolder


def check_folder(recipe: Recipe, *, resume: bool) -> None:
    """A new run finds `output.dir` free, one that goes on finds itself there, with settings that lead the same way.

    Raises:
        RunError: it does not.
    """
    folder = RunFolder(recipe.output.dir)
    if not resume:
        folder.check_free()
        return
    folder.check_resumable()
    check_same(folder, recipe)
    if folder.final.exists() and folder.latest() is None:
        raise RunError(
            f"'{folder.path}' is done and has no checkpoint to go on from (output.checkpoint_every is not set); begin "
            f"another run with its weights: sdtune train {shlex.quote(str(folder.path / 'run.yaml'))} "
            f"{begun_with(folder.path, recipe)} output.dir=FOLDER, or draw with it: sdtune sample "
            f"{shlex.quote(str(folder.path))} --prompt TEXT"
        )


def begun_with(run: Path, recipe: Recipe) -> str:
    """What to type so that another run of a recipe begins with the weights of this one."""
    place = shlex.quote(str(run))
    if recipe.adapter.kind != "full":
        return f"adapter.init_from={place}"
    if recipe.task == "autoencoding":
        return shlex.quote(f"model={{from_config: {{vae: {run / 'final'}}}}}")
    return f"model.base={place}" + ("" if recipe.model.from_config is None else " model.from_config=null")


def check_same(folder: RunFolder, recipe: Recipe) -> None:
    """Raises RunError when the run was begun with settings that lead elsewhere."""
    file = folder.path / "run.yaml"
    try:
        begun = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise RunError(
            f"'{file}' cannot be read ({' '.join(str(fault).split())}), so it is not known how the run was begun; put "
            "the file back, or choose another place with output.dir=FOLDER"
        ) from fault
    told = [f"{key} was {show(was)} and is {show(now)}" for key, was, now in changes(begun, recipe)]
    if told:
        raise RunError(
            f"'{folder.path}' was begun with other settings: {'; '.join(told)}. Go on with its own: sdtune train "
            f"{file} --resume, or begin another run with output.dir=FOLDER"
        )
