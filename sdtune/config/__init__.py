"""The recipe: what a run is made of, read from YAML and checked as a whole.

    recipe = load("recipes/lora_tiny.yaml", ["train.steps=10"])
    recipe.train.steps                                  # 10

`recipe.py` holds the settings with their descriptions, `checks.py` what they demand of each other, `messages.py` turns
faults into plain words, `files.py` reads and writes, `changes.py` compares two recipes, `shipped.py` knows the recipes
and assets that come with sdtune.
"""

from sdtune.config.changes import changes
from sdtune.config.files import dump, load, parse
from sdtune.config.recipe import (
    AdapterSettings,
    DataSource,
    Drawing,
    Images,
    ModelSettings,
    Objective,
    OptimizerSettings,
    Output,
    Recipe,
    Reconstruction,
    Samples,
    TrainSettings,
    Validation,
)
from sdtune.config.shipped import resolve_asset, shipped_recipes

__all__ = [
    "AdapterSettings",
    "DataSource",
    "Drawing",
    "Images",
    "ModelSettings",
    "Objective",
    "OptimizerSettings",
    "Output",
    "Recipe",
    "Reconstruction",
    "Samples",
    "TrainSettings",
    "Validation",
    "changes",
    "dump",
    "load",
    "parse",
    "resolve_asset",
    "shipped_recipes",
]
