"""The recipes and assets that come with sdtune."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent
TINY = "tiny"
ASSET_PREFIX = "assets:"


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name: beside the modules in a wheel, at the root of a checkout."""
    installed = PACKAGE / "recipes"
    folder = installed if installed.is_dir() else PACKAGE.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def resolve_asset(name: str) -> str:
    """The path behind `tiny` (the embedded base) or `assets:NAME` (such as assets:demo); any other name unchanged.

    A folder of one's own that is called tiny is written ./tiny.
    """
    if name == TINY:
        return str(PACKAGE / "assets" / TINY)
    if name.startswith(ASSET_PREFIX):
        return str(PACKAGE / "assets" / name.removeprefix(ASSET_PREFIX))
    return name
