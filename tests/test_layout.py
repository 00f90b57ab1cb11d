"""Who may import whom: read from the import statements, those inside functions too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ANYWHERE = ("sdtune", "sdtune.errors", "sdtune.config", "sdtune.distributed", "sdtune.hub_access")
# From the bottom up. A module imports from its own level and those below; what is not listed is a command's work.
LEVELS = (
    ("models", "diffusion"),
    ("families", "adapters", "data", "checkpoint", "run_folder", "writing"),
    ("tasks",),
    (),
    ("cli", "demo", "__main__"),
)
COMMANDS_WORK = 3
FOR_DATA_TOOLS = (
    *("sdtune.errors", "sdtune.distributed", "sdtune.hub_access", "sdtune.config.shipped"),
    *("sdtune.data.metadata", "sdtune.data.images", "sdtune.data.atomic", "sdtune.data.splits", "sdtune.data.captions"),
    *("sdtune.data.picture", "sdtune.libraries"),
)
# The recipe is checked against the names in these dicts; their modules are not imported for it.
NAMES_ONLY = {("sdtune.config.checks", "sdtune.families"), ("sdtune.config.checks", "sdtune.adapters")}
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "PIL")


def modules() -> dict[str, Path]:
    """All modules of the project by their dotted names."""
    found = {}
    for package in ("sdtune", "data_tools"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, for_types: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name) of each import statement; the name is empty for `import module`.

    Without `for_types` those under `if TYPE_CHECKING`, which are never run, are left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not for_types:
        guarded = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
        tree.body = [node for node in tree.body if node not in guarded]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in MODULES else (node.module or "", alias.name)


def inside(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def level(module: str) -> int:
    if module == "sdtune" or inside(module, *ANYWHERE[1:]):
        return -1
    room = module.split(".")[1] if inside(module, "sdtune") else ""
    return next((i for i, rooms in enumerate(LEVELS) if room in rooms), COMMANDS_WORK)


def test_there_are_modules() -> None:
    assert {"sdtune.cli", "sdtune.models.unet", "sdtune.families.base", "data_tools"} <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for imported, _ in imports(MODULES[module]):
        if not inside(imported, "sdtune", "data_tools") or (module, imported) in NAMES_ONLY:
            continue
        if inside(module, "data_tools"):
            assert inside(imported, *FOR_DATA_TOOLS, "data_tools"), f"{module} imports {imported}"
        elif inside(imported, "data_tools"):
            assert level(module) == len(LEVELS) - 1, f"{module} imports {imported}"
        else:
            assert level(imported) <= level(module), f"{module} imports {imported}, which is above it"


def test_no_import_leads_back() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    waiting = {}
    for module, path in MODULES.items():
        imported = {name for name, _ in imports(path, for_types=False) if (module, name) not in NAMES_ONLY}
        waiting[module] = imported & (MODULES.keys() - packages)
    while leaves := {module for module, names in waiting.items() if not names & waiting.keys()}:
        waiting = {module: names for module, names in waiting.items() if module not in leaves}
    assert not waiting, f"a circle of imports is among {', '.join(sorted(waiting))}"


@pytest.mark.parametrize("module", [name for name in MODULES if 0 <= level(name) < COMMANDS_WORK - 1])
def test_settings_are_not_passed_below_the_loop(module: str) -> None:
    for imported, name in imports(MODULES[module]):
        if inside(imported, "sdtune.config"):
            assert name == "resolve_asset", f"{module} takes {name or imported}; take the values that it uses"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_in_their_rooms(module: str) -> None:
    for imported, _ in imports(MODULES[module]):
        if inside(imported, "accelerate"):
            assert module in ("sdtune.train", "sdtune.checkpoint", "sdtune.distributed"), f"{module} imports accelerate"
        if inside(imported, "peft"):
            assert inside(module, "sdtune.adapters"), f"{module} imports peft"


@pytest.mark.parametrize("module", [name for name in MODULES if inside(name, "sdtune.models", "sdtune.diffusion")])
def test_networks_and_mathematics_are_our_own(module: str) -> None:
    # Loading, saving, outputs and adapters come from diffusers; layers, attention, embeddings and schedulers do not.
    # (The kernels under attention are torch's or xformers'.)
    mixins = tuple(
        f"diffusers.{name}"
        for name in ("configuration_utils", "loaders", "models.modeling_utils", "models.modeling_outputs", "utils")
    )
    allowed = ("torch", "sdtune", *(mixins if inside(module, "sdtune.models") else ()))
    allowed += ("xformers.ops",) if module == "sdtune.models.attention" else ()
    for imported, _ in imports(MODULES[module]):
        if imported.split(".")[0] not in sys.stdlib_module_names:
            assert inside(imported, *allowed), f"{module} imports {imported}"


def test_packages_are_cheap_to_import() -> None:
    packages = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    assert len(packages) >= 6
    cheap = [*packages, "sdtune.cli", "sdtune.errors", "sdtune.distributed", "sdtune.data.metadata"]
    code = f"import sys\nfor name in {cheap}: __import__(name)\nprint([m for m in {HEAVY} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
