"""benchmarks/tiny_base.py: its measures on known inputs, and the whole of it on a random tiny model."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sdtune import evaluate
from sdtune.data.metadata import write_rows

ROOT = Path(__file__).parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    return load(ROOT / "benchmarks" / "tiny_base.py")


def test_psnr_is_that_of_the_range_minus_one_to_one(benchmark):
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([x[0] + 0.2, x[1] - 0.02])
    torch.testing.assert_close(benchmark.psnr(x, y), torch.tensor([20.0, 40.0]))
    assert benchmark.psnr(x + 1, x + 7).isinf().all()  # reconstructions are clamped


def test_vae_psnr_reads_the_mean_of_the_posterior(benchmark):
    class Half:
        """Encodes to half the value (and a useless sample), decodes by doubling, with an error of 0.2."""

        def encode(self, x):
            return type("Output", (), {"latent_dist": type("Posterior", (), {"mean": x / 2, "sample": None})})

        def decode(self, z):
            return type("Output", (), {"sample": 2 * z + 0.2})

    pictures = np.full((5, 4, 4, 3), 100, np.uint8)
    torch.testing.assert_close(benchmark.vae_psnr(Half(), pictures, batch_size=2), torch.full((5,), 20.0))


def test_nearest_features_allows_the_mirror(benchmark):
    references, mirrored = torch.eye(4)[:3], -torch.eye(4)[:3]
    samples = torch.tensor([[0.0, 3.0, 0.1, 0.0], [-2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.1]])
    assert benchmark.nearest_features(samples, references, mirrored).tolist() == [1, 0, 2]


def test_contact_sheet_marks_the_wrong_ones(benchmark):
    pictures = np.full((17, 64, 64, 3), 255, np.uint8)
    sheet = np.asarray(benchmark.contact_sheet(pictures, pictures, ["egg"] * 17, {3})).astype(int)
    assert sheet.shape == (2 * 78, 15 * 134, 3)
    red = sheet[..., 0] > sheet[..., 1] + 60  # letters are smoothed
    assert red[64:78, 3 * 134 : 4 * 134].any()
    assert not red[:, : 3 * 134].any()


def test_features_recognise_pictures_that_are_a_little_blurred_and_noisy(benchmark):
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install 'sdtune[eval]'")
    _, truths = evaluate.load_thumbnails()
    truths = truths[::10]
    generator = np.random.default_rng(0)
    blurred = np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(0.7))) for x in truths])
    noisy = (blurred + generator.normal(0, 4, blurred.shape)).clip(0, 255).astype(np.uint8)
    classifier = benchmark.Classifier()
    references, mirrored = classifier(truths), classifier(truths[:, :, ::-1])
    for samples in (noisy, noisy[:, :, ::-1]):
        found = benchmark.nearest_features(classifier(samples), references, mirrored)
        assert evaluate.share(found, list(range(len(truths)))) >= 0.95


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    from sdtune.families.stable_diffusion import StableDiffusion

    folder = tmp_path_factory.mktemp("model")
    bpe = load(ROOT / "examples" / "tiny_base" / "bpe.py")
    bpe.write_tokenizer(folder / "words", ["red apple", "hot dog"], 520)
    text = {
        "vocab_size": 520,
        "bos_token_id": 518,
        "eos_token_id": 519,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
    }
    unet = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "cross_attention_dim": 32,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    vae = {
        "block_out_channels": [16, 16, 16],
        "latent_channels": 4,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    scheduler = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
    parts = {"text_encoder": text, "unet": unet, "vae": vae, "scheduler": scheduler, "tokenizer": str(folder / "words")}
    StableDiffusion.from_config(parts, seed=0).save(folder / "model")
    rows = [{"file_name": f"{i}.png", "text": "x", "style": style} for i, style in enumerate(("fluent", "noto"))]
    write_rows(folder / "data" / "vae_held_out", rows)
    for row in rows:
        Image.new("RGB", (64, 64), "white").save(folder / "data" / "vae_held_out" / row["file_name"])
    return folder


def test_the_whole_benchmark_runs_and_ends_with_one_json_line(benchmark, random_model, tmp_path, capsys, monkeypatch):
    names, truths = evaluate.load_thumbnails()
    monkeypatch.setattr(benchmark, "load_thumbnails", lambda: (names[:8], truths[:8]))
    command = ["--pipeline", str(random_model / "model"), "--data", str(random_model / "data"), "--limit", "3"]
    command += ["--steps", "2", "--out", str(tmp_path), "--sampler", "dpm-solver++"]
    result = benchmark.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    assert "PSNR" in lines[1]
    assert result["samples"] == 3
    assert result["vae_pictures"] == 2
    assert 0 <= result["nearest_pixels"] <= 1
    assert result["sampler"] == "dpm-solver++"
    assert Image.open(tmp_path / "sheet.png").width == 15 * 134


def test_a_vae_alone_is_measured(benchmark, random_model, tmp_path, capsys):
    shutil.copytree(random_model / "model" / "vae", tmp_path / "final" / "vae")  # as a run leaves it
    options = ["--data", str(random_model / "data"), "--out", str(tmp_path)]
    result = benchmark.main(["--pipeline", str(tmp_path / "final"), *options])
    assert result["vae_psnr"] > 0
    assert result["vae_psnr"] == benchmark.main(["--pipeline", str(tmp_path / "final" / "vae"), *options])["vae_psnr"]
    assert "nearest_pixels" not in result
    assert "wrong" not in capsys.readouterr().out


def test_a_missing_model_is_one_line(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="does not exist; train one with"):
        benchmark.main(["--pipeline", str(tmp_path / "nothing")])
