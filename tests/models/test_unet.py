"""Our UNet2DConditionModel against diffusers', on small random ones."""

from typing import Any

import pytest
import torch

from sdtune.models import UNet2DConditionModel

SMALL = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and text."""
    torch.manual_seed(1)
    return torch.randn(batch, 4, 8, 8), torch.randn(batch, 7, 24)


def test_same_output_and_gradients_as_diffusers(unet_case, pair, assert_parity) -> None:
    config, arguments = unet_case
    theirs, ours = pair("UNet2DConditionModel", config)
    x = arguments.pop("sample")
    assert_parity(theirs, ours, lambda model, x_t: model(x_t, **arguments).sample, x)


@pytest.mark.parametrize(
    "timestep", [7, 7.5, torch.tensor(7), torch.tensor(7.5), torch.tensor([7]), torch.tensor([7, 400])], ids=repr
)
def test_timestep_in_every_form(timestep: Any, pair) -> None:
    theirs, ours = pair("UNet2DConditionModel", SMALL)
    x, text = inputs()
    with torch.no_grad():
        expected, (got,) = theirs(x, timestep, text).sample, ours(x, timestep, text, return_dict=False)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_mask_hides_tokens() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SMALL)
    x, text = inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    other = torch.where(mask[..., None] == 1, text, torch.randn_like(text))
    with torch.no_grad():
        outputs = [unet(x, 5, tokens, encoder_attention_mask=mask).sample for tokens in (text, other)]
        assert not torch.allclose(unet(x, 5, other).sample, outputs[1], atol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_controlnet_residuals(pair) -> None:
    theirs, ours = pair("UNet2DConditionModel", SMALL)
    x, text = inputs()
    shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
    residuals = {
        "down_block_additional_residuals": [torch.randn(shape) for shape in shapes],
        "mid_block_additional_residual": torch.randn(2, 32, 4, 4),
    }
    with torch.no_grad():
        expected, got = (model(x, 5, text, **residuals).sample for model in (theirs, ours))
        assert not torch.allclose(got, ours(x, 5, text).sample, atol=1e-2)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_dropout_is_where_diffusers_has_it(pair) -> None:
    theirs, ours = pair("UNet2DConditionModel", {**SMALL, "dropout": 0.5})
    x, text = inputs()
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        outputs.append(model.train()(x, 5, text).sample)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=0)
    assert not torch.allclose(outputs[1], ours.eval()(x, 5, text).sample, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, pair) -> None:
    theirs, ours = (model.to(dtype) for model in pair("UNet2DConditionModel", SMALL))
    x, text = (tensor.to(dtype) for tensor in inputs())
    with torch.no_grad():
        expected, got = (model(x, 5, text).sample for model in (theirs, ours))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)


def test_channels_last_computes_the_same() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SMALL)
    x, text = inputs()
    with torch.no_grad():
        expected = unet(x, 5, text).sample
        got = unet.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), 5, text).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"class_labels": torch.zeros(2)}, "class_labels"),
        ({"down_intrablock_additional_residuals": []}, "down_intrablock_additional_residuals"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "gligen"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(arguments: dict[str, Any], named: str) -> None:
    x, text = inputs()
    with pytest.raises(ValueError, match=named):
        UNet2DConditionModel(**SMALL)(x, 5, text, **arguments)


def test_sdxl_asks_for_its_conditions() -> None:
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20}
    unet = UNet2DConditionModel(**SMALL, **sizes, addition_embed_type="text_time")
    x, text = inputs()
    with pytest.raises(ValueError, match="time_ids"):
        unet(x, 5, text, added_cond_kwargs={"text_embeds": torch.zeros(2, 20)})
    with pytest.raises(ValueError, match="text_embeds"):
        unet(x, 5, text)
