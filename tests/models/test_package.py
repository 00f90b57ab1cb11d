"""The package itself."""

import subprocess
import sys

import pytest

import sdtune.models


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, sdtune.models; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    assert sdtune.models.__all__ == ["AutoencoderKL", "UNet2DConditionModel"]
    for name in sdtune.models.__all__:
        assert getattr(sdtune.models, name).__name__ == name


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="UNet3D"):
        sdtune.models.UNet3D  # noqa: B018
