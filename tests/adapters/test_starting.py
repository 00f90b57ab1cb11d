"""`adapter.init_from`: a run begins with the factors of a file, or says why it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtune.adapters.lora_files import WEIGHTS_NAME, read_lora
from sdtune.adapters.lora_writing import write_kohya
from sdtune.errors import UsageError, WeightsError
from sdtune.opening import open_model
from sdtune.run import Run
from tests.adapters.conftest import LOW_RANK, answers
from tests.factories import make_recipe

CPU = torch.device("cpu")


def begun(sd: Path, photos: Path, out: Path, **adapter: Any) -> Run:
    """A run that has not trained yet."""
    return Run(make_recipe(sd, photos, out, adapter={"targets": "all", "text_encoder": True, "rank": None} | adapter))


@pytest.mark.parametrize("change", [{}, {"rank": 4, "alpha": 1.0}], ids=["as the file", "another alpha"])
@pytest.mark.parametrize("kind", LOW_RANK)
def test_a_run_begins_where_another_ended(
    sd: Path, photos: Path, tmp_path: Path, trained: Callable[[str], Run], kind: str, change: dict[str, Any]
) -> None:
    before = trained(kind)
    run = begun(sd, photos, tmp_path / "run", kind=kind, init_from=str(before.folder.path), **change)
    expected = answers(before.family)
    torch.testing.assert_close(answers(run.family), expected)
    if not change:
        assert all(torch.equal(p, before.parameters[key]) for key, p in run.parameters.items())
    run.complete()
    torch.testing.assert_close(answers(open_model(str(run.folder.path), device=CPU)), answers(run.family))
    assert (answers(run.family) - expected).abs().max() > 1e-4


def test_a_kohya_file_and_layers_of_other_ranks(
    sd: Path, photos: Path, tmp_path: Path, trained: Callable[[str], Run]
) -> None:
    lora = read_lora(trained("lora").folder.final)
    write_kohya(lora.layers, tmp_path / "kohya.safetensors", unet=None, header={})
    tensors = load_file(tmp_path / "kohya.safetensors")
    for key, tensor in tensors.items():  # of the text encoder half the rank, with the alpha as it was
        if key.startswith("lora_te_") and tensor.ndim:
            tensors[key] = (tensor[:2] if "down" in key else tensor[:, :2]).contiguous()
    save_file(tensors, tmp_path / "uneven.safetensors")
    expected = answers(open_model(str(sd), str(tmp_path / "uneven.safetensors"), device=CPU))
    for kind in ("lora", "rslora"):
        run = begun(sd, photos, tmp_path / kind, kind=kind, init_from=str(tmp_path / "uneven.safetensors"))
        torch.testing.assert_close(answers(run.family), expected)
        run.complete()
        torch.testing.assert_close(answers(open_model(str(run.folder.path), device=CPU)), answers(run.family))
        assert {layer.rank for layer in read_lora(run.folder.final / WEIGHTS_NAME).layers.values()} == {2, 4}


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("lora", {"kind": "dora"}, "is a lora, and the adapter that learns is a dora; set adapter.kind=lora"),
        ("loha", {"kind": "lora"}, "is a loha, and the adapter that learns is a lora"),
        ("lora", {"rank": 8}, "has rank 4, and adapter.rank asks for 8; remove adapter.rank"),
        ("lora", {"targets": "attention"}, "layers that do not learn here, for instance .*adapter.targets=all"),
        ("lora", {"text_encoder": False}, "has 18 layers that do not learn here, for instance text_encoder"),
        ("lokr", {"kind": "lokr", "factor": 2}, "are split in another way than here; set adapter.factor"),
    ],
)
def test_what_does_not_fit_is_refused(
    sd: Path, photos: Path, tmp_path: Path, trained: Callable[[str], Run], kind: str, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=f"adapter.init_from: .*{match}"):
        begun(sd, photos, tmp_path / "run", init_from=str(trained(kind).folder.path), **change)
    assert not (tmp_path / "run").exists()


def test_a_file_for_another_base_is_refused(
    sdxl: Path, photos: Path, tmp_path: Path, trained: Callable[[str], Run]
) -> None:
    adapter = {"init_from": str(trained("lora").folder.final), "rank": None}
    with pytest.raises(WeightsError, match="is refused: .* name a base of its kind"):
        Run(make_recipe(sdxl, photos, tmp_path / "run", adapter=adapter, model={"family": "sdxl"}))
