"""examples/walk: each page runs by itself, and shows what it says that it shows."""

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pyplot = pytest.importorskip("matplotlib.pyplot")

ROOT = Path(__file__).parents[2]
WALK = ROOT / "examples" / "walk"
PAGES = {path.stem: path for path in sorted(WALK.glob("[0-9]_*.py"))}

Page = Callable[..., dict[str, Any]]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """Runs a page as a script, looks at its figure, and returns what its names stand for at the end."""

    def run(name: str, *options: str) -> dict[str, Any]:
        out = tmp_path / "new" / f"{name}.png"
        monkeypatch.setattr(sys, "argv", [name, *options, "--out", str(out)])
        monkeypatch.syspath_prepend(str(WALK))
        names = runpy.run_path(str(PAGES[name]), run_name="__main__")
        with Image.open(out) as figure:
            assert figure.width > 600
            assert len(figure.convert("RGB").getcolors(figure.width * figure.height)) > 50
        return names

    with torch.random.fork_rng():
        yield run
    torch.set_grad_enabled(True)
    pyplot.close("all")
    sys.modules.pop("two_peaks", None)


def test_each_page_is_tested_and_stands_in_the_readme_with_its_figure() -> None:
    tested = {name.removeprefix("test_page_") for name in globals() if name.startswith("test_page_")}
    assert tested == PAGES.keys()
    readme = (WALK / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^python examples/walk/(\w+)\.py$", readme, re.MULTILINE) == sorted(PAGES)
    figures = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", readme)  # each with words for who cannot see it
    assert [Path(figure).stem for figure in figures] == sorted(PAGES)
    for figure in figures:
        assert (WALK / figure).stat().st_size < 400_000


def test_page_1_forward(page: Page) -> None:
    names = page("1_forward", "--samples", "10000")
    for process in names["ROWS"].values():
        for part in names["PARTS"]:
            assert names["distance"](*process(part)) < 0.02  # of 10,000 numbers; 0.016 with a chance of 1 %
    preserved, signal, noise = names["preserve"](1.0)
    assert (preserved.mean().item(), preserved.std().item()) == pytest.approx((0, 1), abs=0.05)
    assert (signal, noise) == pytest.approx((0, 1), abs=0.01)
    exploded, signal, noise = names["explode"](1.0)
    assert signal == 1
    assert exploded.std().item() == pytest.approx((noise**2 + names["x0"].var().item()) ** 0.5, rel=0.05)
    assert noise > 9


def test_page_2_score(page: Page) -> None:
    names = page("2_score", "--steps", "600", "--samples", "2000")
    for t, limit in zip(names["LEVELS"], (0.3, 0.1, 0.1), strict=True):
        x = names["noisy"](*names["levels"](t)).sample((2000, 1))
        truth = names["true_score"](x, *names["levels"](t))
        error = (names["learned_score"](x, t) - truth).square().mean() / truth.square().mean()
        assert error.sqrt() < limit
    assert len(names["ways"]) == 2
    for way in names["ways"].values():
        start, end = way[0], way[-1]
        assert (start.mean().item(), start.std().item()) == pytest.approx((0, 1), abs=0.1)
        assert (end.mean().item(), end.std().item()) == pytest.approx((1 / 3, 0.95), abs=0.15)
        assert ((end.abs() - 1).abs() < 0.5).float().mean() > 0.95  # on one of the peaks


def test_the_true_score_of_one_peak_is_the_one_of_a_gaussian(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(WALK))
    names = runpy.run_path(str(WALK / "two_peaks.py"))
    x = torch.tensor([[0.9], [1.3]])
    variance = (0.9 * 0.15) ** 2 + 0.1**2
    assert torch.allclose(names["true_score"](x, 0.9, 0.1), (0.9 - x) / variance, rtol=1e-4)


def test_page_3_unet(page: Page) -> None:
    names = page("3_unet", "--name", "cat face")
    shown, told, untold, no_large, no_small = (
        (latents - names["x0"]).square().mean(dim=(1, 2, 3)) for latents in names["rows"].values()
    )
    assert (told < 0.05 * shown).all()
    assert (untold > told).all()
    assert (untold.diff() > 0).all()  # the less is left of the picture, the more the caption is missed
    assert (no_large > no_small).all()
    assert (no_small > told).all()
    assert [skip.shape[-1] for skip in names["skips"]] == [8, 8, 4, 4]


def test_page_4_attention(page: Page) -> None:
    from sdtune.opening import open_model
    from sdtune.sample import draw_pictures

    names = page("4_attention", "--steps", "6", "--prompt", "panda face")
    drawn, found = names["rows"]["panda face"]
    assert list(found) == [names["MIDDLE"], "start", '"p"', '"anda"', '"face"', "end, padding"]
    middle, *text = found.values()
    assert torch.allclose(sum(text), torch.ones(8, 8), atol=1e-4)  # of each point, over all tokens
    assert middle.sum().item() == pytest.approx(1, abs=1e-4)  # over all points
    panda = drawn.float().mean(dim=-1).unflatten(0, (8, 8)).unflatten(2, (8, 8)).mean(dim=(1, 3)) < 230  # (8, 8)
    assert 16 < panda.sum() < 56
    assert middle[panda].mean() > 1.4 * middle[~panda].mean()  # the middle of the panda looks at the panda
    assert found["end, padding"][panda].mean() > 1.1 * found["end, padding"][~panda].mean()
    family = open_model("tiny", device=torch.device("cpu"))  # with the usual attention
    (usual,) = draw_pictures(family, ["panda face"], [0], height=64, width=64, steps=6, guidance=1)
    assert (torch.from_numpy(np.array(usual)).int() - drawn.int()).abs().max() <= 2


def test_page_5_guidance(page: Page) -> None:
    from sdtune.sample import draw_pictures

    names = page("5_guidance", "--steps", "8", "--prompt", "red apple")
    known, scales = names["names"], names["SCALES"]
    assert names["found"][1:4] == ["red apple"] * 3
    assert names["found"][0] in set(known) - {"red apple"}
    drawn = {w: tile for w, tile in zip(scales, names["tiles"], strict=True)}
    settings = {"height": 64, "width": 64, "steps": 8}
    for w in (1, 4):  # the loop by hand is what `sdtune sample` does
        (picture,) = draw_pictures(names["family"], ["red apple"], [0], guidance=w, **settings)
        assert np.abs(np.asarray(picture).astype(int) - drawn[w]).max() <= 2
