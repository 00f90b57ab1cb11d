"""Our AutoencoderKL against diffusers', on small random ones."""

import pytest
import torch

from sdtune.models import AutoencoderKL


def test_same_output_and_gradients_as_diffusers(vae_case, pair, assert_parity) -> None:
    config, x = vae_case
    theirs, ours = pair("AutoencoderKL", config)
    assert_parity(theirs, ours, lambda model, pixels: model(pixels).sample, x)


def test_same_latent_distribution_as_diffusers(vae_case, pair) -> None:
    config, x = vae_case
    theirs, ours = pair("AutoencoderKL", config)
    with torch.no_grad():
        expected, got = theirs.encode(x).latent_dist, ours.encode(x).latent_dist
    for name in ("mean", "logvar", "std", "var", "parameters"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.mode(), expected.mode(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.kl(), expected.kl(), atol=1e-2, rtol=1e-4)
    draws = [d.sample(torch.Generator().manual_seed(3)) for d in (expected, got)]
    torch.testing.assert_close(draws[1], draws[0], atol=1e-4, rtol=1e-4)


def test_kl_is_that_of_torch(vae_case) -> None:
    from torch.distributions import Normal, kl_divergence

    config, x = vae_case
    vae = AutoencoderKL(**config)
    with torch.no_grad():
        one, other = vae.encode(x).latent_dist, vae.encode(x.flip(-1)).latent_dist
    p, q = Normal(one.mean, one.std), Normal(other.mean, other.std)
    standard = Normal(torch.zeros_like(one.mean), torch.ones_like(one.mean))
    torch.testing.assert_close(one.kl(), kl_divergence(p, standard).sum((1, 2, 3)), atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(one.kl(other), kl_divergence(p, q).sum((1, 2, 3)), atol=1e-2, rtol=1e-4)


def test_a_draw_from_the_posterior_is_decoded_on_request(pair) -> None:
    theirs, ours = pair("AutoencoderKL", {"block_out_channels": [32]})
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        outputs = [m(x, True, generator=torch.Generator().manual_seed(0)).sample for m in (theirs, ours)]
        assert not torch.equal(outputs[1], ours(x).sample)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=0)


def test_slicing_changes_nothing_but_memory(vae_case) -> None:
    config, _ = vae_case
    torch.manual_seed(0)
    vae = AutoencoderKL(**config)
    x = torch.rand(3, config.get("in_channels", 3), 16, 16)
    with torch.no_grad():
        whole = vae(x).sample
        vae.enable_slicing()
        sizes = []
        handle = vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        sliced = vae(x).sample
        handle.remove()
        assert sizes == [1, 1, 1]
        vae.disable_slicing()
        torch.testing.assert_close(sliced, whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(vae(x).sample, whole, atol=0, rtol=0)


def test_outputs_without_return_dict() -> None:
    vae = AutoencoderKL(block_out_channels=[32])
    x = torch.rand(1, 3, 8, 8)
    (latents,) = vae.encode(x, return_dict=False)
    (pixels,) = vae.decode(latents.mode(), return_dict=False)
    torch.testing.assert_close(pixels, vae(x, return_dict=False)[0])
    assert pixels.shape == x.shape


@pytest.mark.parametrize("key, value", [("in_channels", 3), ("scaling_factor", 0.5), ("latents_mean", [1.0, 2.0])])
def test_configuration_is_kept(key: str, value: object) -> None:
    assert AutoencoderKL(**{key: value}).config[key] == value
