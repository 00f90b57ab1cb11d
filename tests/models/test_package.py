"""The package itself."""

import subprocess
import sys

import pytest

import sdtune.models


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, sdtune.models; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    assert sdtune.models.__all__ == ["DENOISERS", "AutoencoderKL", "UNet2DConditionModel", "denoiser_class"]
    for name in ("AutoencoderKL", "UNet2DConditionModel"):
        assert getattr(sdtune.models, name).__name__ == name
    for name, place in sdtune.models.DENOISERS.items():
        assert sdtune.models.denoiser_class(name).__name__ == place.partition(":")[2]


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="UNet3D"):
        sdtune.models.UNet3D  # noqa: B018
