"""The small denoisers: what they have in common, and each against a reference."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from sdtune.models.attention import BasicTransformerBlock
from sdtune.models.pixel_unet import PixelUNet
from sdtune.models.resnet import ResNet18, ResNetDecoder
from sdtune.models.score_attention import ScoreAttention
from sdtune.models.segnet import SegNet

CLASSES = ["cat", "dog", "bird"]
SMALL: dict[type[nn.Module], dict[str, Any]] = {
    ResNetDecoder: {"width": 8, "groups": 4},
    SegNet: {"widths": [8, 12, 16], "groups": 4},
    ScoreAttention: {"widths": [8, 8, 16, 16], "embedding": 16, "heads": 2},
    PixelUNet: {"widths": [8, 16], "attention": [False, True], "head_width": 8, "context": 12, "groups": 4},
}


def make(kind: type[nn.Module], classes: Sequence[str] = CLASSES, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(classes=classes, **{**SMALL[kind], **settings})


def inputs(channels: int = 1, size: tuple[int, int] = (28, 28)) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and labels of three pictures."""
    torch.manual_seed(1)
    return torch.randn(3, channels, *size), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 2, 3])


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (27, 30)])
def test_the_answer_is_shaped_as_the_picture(kind, size) -> None:
    x, t, labels = inputs(channels=2, size=size)
    assert make(kind, channels=2)(x, t, labels).shape == x.shape


@pytest.mark.parametrize("kind", SMALL)
def test_every_parameter_learns(kind) -> None:
    network = make(kind)
    x, t, labels = inputs()
    network(x, t, labels).square().sum().backward()
    unmoved = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not unmoved


@pytest.mark.parametrize("kind", [ScoreAttention, PixelUNet])
def test_checkpointing_leaves_the_gradients_as_they_are(kind) -> None:
    found = []
    for checkpointing in (False, True):
        network, calls = make(kind), []
        if checkpointing:
            network.enable_gradient_checkpointing()
        attention = next(part for part in network.modules() if isinstance(part, BasicTransformerBlock))
        attention.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        network(*inputs()).square().sum().backward()
        assert len(calls) == 1 + checkpointing
        found.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", SMALL)
def test_time_and_class_are_told(kind) -> None:
    network = make(kind).eval()
    x, t, labels = inputs()
    with torch.no_grad():
        answer = network(x, t, labels)
        later, others = network(x, t * 0.5, labels), network(x, t, labels.flip(0))
        unasked, empty = network(x, t), network(x, t, torch.full((3,), len(CLASSES)))
        alone = network(x[1:2], t[1:2], labels[1:2])
    assert not torch.allclose(answer[1], later[1], atol=1e-4)
    assert not torch.allclose(answer[0], others[0], atol=1e-4)
    torch.testing.assert_close(unasked, empty)
    torch.testing.assert_close(alone, answer[1:2], atol=1e-5, rtol=1e-5)  # a picture's answer is its own


@pytest.mark.parametrize("kind", SMALL)
def test_without_classes_labels_are_not_wanted(kind) -> None:
    x, t, _ = inputs()
    assert make(kind, classes=[])(x, t).shape == x.shape


@pytest.mark.parametrize("kind", SMALL)
def test_saved_and_loaded_it_answers_the_same(kind, tmp_path) -> None:
    network = make(kind).eval()
    network.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert list(again.config["classes"]) == CLASSES
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs()), network(*inputs()))


def test_resnet18_has_the_published_size_and_names() -> None:
    with torch.device("meta"):
        whole = ResNet18()
    count = sum(p.numel() for p in whole.parameters())
    assert count == 11_176_512
    assert count + nn.Linear(512, 1000).weight.numel() + 1000 == 11_689_512  # with the classifier
    names = set(whole.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.1.bn2.bias"} <= names
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var"} <= names
    assert len(names) == 120  # torchvision's 122 without fc


def test_resnet18_computes_what_transformers_does() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type="basic")
    theirs, ours = ResNetModel(config).eval(), ResNet18(width=8).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    ours.load_state_dict({torchvision_name(key): value for key, value in theirs.state_dict().items()})
    pictures = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        maps, expected = ours(pictures), theirs(pictures, output_hidden_states=True).hidden_states[1:]
    for got, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def torchvision_name(key: str) -> str:
    """encoder.stages.1.layers.0.shortcut.convolution.weight -> layer2.0.downsample.0.weight"""
    part, kind, tensor = key.rsplit(".", 2)
    norm = kind == "normalization"
    if part == "embedder.embedder":
        return f"{'bn1' if norm else 'conv1'}.{tensor}"
    _, _, stage, _, block, *rest = part.split(".")
    place = f"downsample.{int(norm)}" if rest == ["shortcut"] else f"{'bn' if norm else 'conv'}{int(rest[-1]) + 1}"
    return f"layer{int(stage) + 1}.{block}.{place}.{tensor}"


def test_without_skips_only_the_deepest_map_goes_on() -> None:
    x, t, labels = inputs()
    for skips, moved in ((True, True), (False, False)):
        network = make(ResNetDecoder, skips=skips).eval()
        with torch.no_grad():
            before = network(x, t, labels)
            network.encoder.layer4[0].emb.register_forward_hook(lambda *_: torch.zeros(3, 64))
            network.encoder.layer4[1].register_forward_hook(lambda *_: torch.zeros(3, 64, 4, 4))
            blind = network(x, t, labels)
            other = network(torch.randn_like(x), t, labels)
        assert not torch.allclose(before, blind, atol=1e-4)
        assert torch.allclose(blind, other, atol=1e-4) is not moved


def test_segnet_puts_values_back_where_the_maxima_were() -> None:
    network = make(SegNet, widths=[4], layers=1, groups=2).eval()
    x, t, labels = inputs(size=(5, 7))
    emb = network.embedding(t, labels, x.dtype)

    def convolve(level: nn.Module, h: Tensor) -> Tensor:
        (block,) = level.blocks
        h = F.group_norm(F.conv2d(h, block.conv.weight, padding=1), 2)
        return F.relu(h + F.linear(emb, block.emb.weight, block.emb.bias)[:, :, None, None])

    h = convolve(network.encoder[0], x)
    sparse = torch.zeros_like(h)  # by hand: of each whole 2x2 window only the largest value stays
    for i in range(0, 4, 2):
        for j in range(0, 6, 2):
            window = h[..., i : i + 2, j : j + 2]
            first = window.flatten(2).argmax(2, keepdim=True)
            kept = torch.zeros_like(window.flatten(2)).scatter(2, first, window.flatten(2).gather(2, first))
            sparse[..., i : i + 2, j : j + 2] = kept.unflatten(2, (2, 2))
    expected = network.conv_out(convolve(network.decoder[0], sparse))
    torch.testing.assert_close(network(x, t, labels), expected)


def test_the_unet_is_ours_at_any_width() -> None:
    counts = []
    for width in (8, 16, 32):
        network = make(PixelUNet, widths=[width, 2 * width], attention=[False, False])
        counts.append(sum(p.numel() for p in network.parameters()))
        assert network.unet.mid_block is None
    assert counts == sorted(counts)


def test_the_transformers_look_at_class_and_time_at_the_two_deepest_levels() -> None:
    network = ScoreAttention(classes=CLASSES)
    seen: list[tuple[Any, ...]] = []
    for transformer in network.transformers:
        transformer.register_forward_hook(lambda _, given, answer: seen.append((*answer.shape[1:], given[1].shape)))
    network(*inputs())
    assert seen == [(128, 5, 5, (3, 2, 256)), (256, 2, 2, (3, 2, 256))]
