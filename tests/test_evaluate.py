"""The shipped thumbnails, and which of them a sample is nearest to."""

import json
import subprocess
import sys

import numpy as np
import pytest

from sdtune import evaluate


def test_thumbnails_are_285_named_pictures_in_two_styles():
    names, fluent = evaluate.load_thumbnails()
    same_names, noto = evaluate.load_thumbnails("noto")
    assert names == same_names
    assert len(set(names)) == 285
    assert "red apple" in names
    for pictures in (fluent, noto):
        assert pictures.shape == (285, 64, 64, 3)
        assert pictures.dtype == np.uint8
        assert np.all(pictures[:, 0, 0] > 200)  # on white
    apple = fluent[names.index("red apple"), 20:44, 20:44].reshape(-1, 3).mean(0)
    assert apple[0] > 150 > 100 > apple[2]  # red
    assert evaluate.share(evaluate.nearest(fluent, fluent), list(range(285))) == 1.0


def test_an_unknown_style_is_refused_by_name():
    with pytest.raises(ValueError, match="fluent and noto, got 'flat'"):
        evaluate.load_thumbnails("flat")


def test_demo_pictures_are_16_things_that_the_base_does_not_know():
    names, pictures = evaluate.load_demo()
    old, thumbnails = evaluate.load_thumbnails()
    assert pictures.shape == (16, 64, 64, 3)
    assert len({*names, *old}) == 285 + 16
    distances = evaluate.square_distances(pictures, np.concatenate([thumbnails, pictures]))
    np.fill_diagonal(distances[:, 285:], 1.0)
    assert distances.min() > 0.02  # no two are easily confused


def test_every_source_of_the_shipped_pictures_has_its_licence():
    notice = (evaluate.ASSETS / "NOTICE.md").read_text(encoding="utf-8")
    licences = sorted((evaluate.ASSETS / "licenses").glob("*.txt"))
    assert len(licences) == 4
    for path in licences:
        assert f"licenses/{path.name}" in notice
    assert "Microsoft Corporation" in (evaluate.ASSETS / "licenses" / "fluent-emoji-MIT.txt").read_text()


def test_distances_are_the_mean_square_difference():
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 256, (n, 6, 5, 3), dtype=np.uint8) for n in (130, 4))  # more than one chunk
    plain = ((a[:, None] / 255 - b[None] / 255) ** 2).mean((2, 3, 4))
    mirrored = ((a[:, None] / 255 - b[None, :, :, ::-1] / 255) ** 2).mean((2, 3, 4))
    np.testing.assert_allclose(evaluate.square_distances(a, b, mirror=False), plain, rtol=1e-12)
    np.testing.assert_allclose(evaluate.square_distances(a, b), np.minimum(plain, mirrored), rtol=1e-12)


def test_a_mirrored_picture_is_found_only_where_that_is_allowed():
    generator = np.random.default_rng(1)
    references = generator.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    samples = references[:, :, ::-1]
    assert evaluate.nearest(samples, references).tolist() == list(range(8))
    assert evaluate.nearest(samples, references, mirror=False).tolist() != list(range(8))


def test_share_counts_what_was_asked_for():
    assert evaluate.share(np.array([0, 2, 2, 3]), [0, 1, 2, 3]) == 0.75
    with pytest.raises(ValueError, match="got 1 samples for 2"):
        evaluate.share(np.array([0]), [0, 1])


@pytest.mark.parametrize("samples, message", [
    (np.zeros((1, 4, 4, 3)), "must be uint8 of shape"),
    (np.zeros((1, 8, 8, 3), np.uint8), "resize one of them"),
])
def test_other_pictures_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        evaluate.nearest(samples, np.zeros((2, 4, 4, 3), np.uint8))


def test_importing_it_does_not_import_torch():
    code = "import sys, json, sdtune.evaluate; print(json.dumps('torch' in sys.modules))"
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)) is False
