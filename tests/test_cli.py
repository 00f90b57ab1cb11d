"""The command line: what it prints where, and the exit codes. What a command does is tested with that command."""

import errno
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from typer.testing import CliRunner

from sdtune.cli import app
from sdtune.config import shipped_recipes
from sdtune.errors import ConfigError, DataError


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """In the place of `sdtune.run`: records how it is called, raises `error` if there is one."""
    state = types.SimpleNamespace(calls=[], error=None)

    def command(*args: Any, **options: Any) -> int:
        state.calls.append((args, options))
        if state.error is not None:
            raise state.error
        return 0

    stand_in = types.ModuleType("sdtune.run")
    stand_in.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sdtune.run", stand_in)
    monkeypatch.setattr("sdtune.config.load", lambda recipe, overrides: None)  # there is no x.yaml
    monkeypatch.setattr("sdtune.resuming.check_folder", lambda recipe, resume: None)
    return state


@pytest.mark.parametrize(
    ("words", "exit_code", "told"),
    [
        ("train lora_tiny train.stps=3", 2, "did you mean 'steps'?"),
        ("train lora_tiny output.dir=taken", 1, "'taken' exists already and is never overwritten"),
        ("train lora_tiny output.dir=absent --resume", 1, "'absent' does not exist, so there is nothing to resume"),
        ("sample tiny --prompt apple --sampler eular", 2, "the sampler 'eular' is not known; did you mean 'euler'?"),
    ],
)
def test_what_can_be_told_without_torch_is(words: str, exit_code: int, told: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    code = f"import sys; sys.argv = {['sdtune', *words.split()]}\nfrom sdtune.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert answer.stdout == f"{exit_code} False\n" and told in answer.stderr


def test_help_is_quick(root: Path) -> None:
    resource = pytest.importorskip("resource", reason="no child times on this system")

    def once() -> float:
        # Processor time, which is the wall time of an idle machine: other tests run beside this one.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "sdtune", "--help"], cwd=root, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    once()  # fills the disk cache
    assert median(once() for _ in range(3)) < 0.3


def test_every_command_has_help() -> None:
    for command in (["train"], ["sample"], ["demo"], ["recipes"], ["recipes", "ls"], ["recipes", "cp"]):
        answer = call(*command, "--help")
        assert answer.exit_code == 0
        assert "Usage" in answer.stdout


def test_arguments_reach_the_run(training: types.SimpleNamespace) -> None:
    assert call("train", "x.yaml", "train.steps=3", "--resume", "output.dir=y", "--json").exit_code == 0
    assert training.calls == [(("x.yaml", ["train.steps=3", "output.dir=y"]), {"resume": True, "as_json": True})]


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["train"], ["train", "x", "--nonsense"], ["sample", "tiny"], ["sample", "tiny", "--count=0"]],
)
def test_wrong_usage_is_2(arguments: list[str], training: types.SimpleNamespace) -> None:
    answer = call(*arguments)
    assert answer.exit_code == 2
    assert answer.stdout == "" and answer.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("'photos' is empty"), 1, "error: 'photos' is empty\n"),
        (ConfigError("x.yaml", [("a.b", "wrong")]), 2, "error: x.yaml: 1 fault\n  a.b   wrong\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ValueError("odd\nthing"), 1, "error: unexpected ValueError: odd thing. Run the same command with --debug"),
        (OSError(errno.ENOSPC, "No space left", "runs/x"), 1, "error: there is no space left on the disk (runs/x)."),
        (RuntimeError("SafetensorError: No space left on device"), 1, "error: there is no space left on the disk."),
        (MemoryError(), 1, "error: the memory is full. Try train.batch_size=1"),
    ],
)
def test_an_error_is_one_paragraph(training: types.SimpleNamespace, error: BaseException, code: int, text: str) -> None:
    training.error = error
    answer = call("train", "x.yaml")
    assert answer.exit_code == code
    assert answer.stderr.startswith(text)
    assert "Traceback" not in answer.stderr and "\n\n" not in answer.stderr
    assert answer.stdout == ""


def test_a_full_disk_behind_another_error_is_named(training: types.SimpleNamespace) -> None:
    training.error = RuntimeError("cannot write")
    training.error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "no space left on the disk" in call("train", "x.yaml").stderr


def test_debug_shows_the_traceback(training: types.SimpleNamespace) -> None:
    training.error = ValueError("odd")
    answer = call("train", "x.yaml", "--debug")
    assert answer.exception is training.error


def test_faults_of_a_recipe_end_in_2(workplace: Path) -> None:
    Path("bad.yaml").write_text("train: {steps: 0}\n")
    arguments = [sys.executable, "-m", "sdtune", "train", "bad.yaml"]
    answer = subprocess.run(arguments, capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: bad.yaml: 5 faults\n")
    assert "train.steps   " in answer.stderr and answer.stdout == ""


def test_recipes_are_listed() -> None:
    answer = call("recipes", "ls")
    assert answer.exit_code == 0
    lines = answer.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(line.endswith(".") and "#" not in line for line in lines)


def test_a_recipe_is_shown_and_copied(workplace: Path) -> None:
    text = shipped_recipes()["lora_tiny"].read_text(encoding="utf-8")
    assert call("recipes", "show", "lora_tiny").stdout == text
    assert call("recipes", "cp", "lora_tiny", "own/mine.yaml").exit_code == 0
    assert Path("own/mine.yaml").read_text(encoding="utf-8") == text
    assert call("recipes", "cp", "lora_tiny", "own").exit_code == 0
    assert Path("own/lora_tiny.yaml").is_file()


def test_a_copy_overwrites_nothing(workplace: Path) -> None:
    Path("mine.yaml").write_text("precious")
    answer = call("recipes", "cp", "lora_tiny", "mine.yaml")
    assert answer.exit_code == 2
    assert "'mine.yaml' exists already and is not overwritten" in answer.stderr
    assert Path("mine.yaml").read_text() == "precious"


def test_the_nearest_recipe_is_named() -> None:
    answer = call("recipes", "show", "lora_tyni")
    assert answer.exit_code == 2
    assert "did you mean 'lora_tiny'?" in answer.stderr


def test_the_version() -> None:
    from sdtune import __version__

    assert call("--version").stdout == f"sdtune {__version__}\n"


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("sdtune.run", ["train", "lora_tiny", "train.seed=2"], {"recipe": "lora_tiny", "overrides": ["train.seed=2"]}),
        ("sdtune.sample", ["sample", "x", "--prompt", "a", "--prompt", "b"], {"model": "x", "prompts": ["a", "b"]}),
        ("sdtune.sample", ["sample", "x", "--prompt", "a", "--lora", "y", "--seed", "3"], {"loras": ["y"], "seed": 3}),
        ("sdtune.demo", ["demo", "--no-prior", "--json"], {"out": Path("runs/demo"), "prior": False, "as_json": True}),
    ],
)
def test_commands_are_called_as_they_want(
    module: str, arguments: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module(module)
    signature = inspect.signature(real.command)
    taken: dict[str, Any] = {}

    def command(*args: Any, **options: Any) -> int:
        taken.update(signature.bind(*args, **options).arguments)
        return 0

    monkeypatch.setattr(real, "command", command)
    answer = call(*arguments)
    assert answer.exit_code == 0, answer.stderr
    assert expected.items() <= taken.items()
