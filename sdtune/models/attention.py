"""Attention, and the transformers made of it. Only the kernels compute scores; `use_kernel` chooses.

What attends to what is kept by none of them: `with recorded_maps(unet) as maps` records it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdtune.errors import UsageError
from sdtune.models.layers import Checkpointed

# Takes q (B, N, heads, D), k and v (B, M, heads, D) and a bias that is broadcast to (B, heads, N, M), or None.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


FEW = 512  # tokens up to which torch's attention on a CPU takes bfloat16 two to ten times as long as float32


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own attention: flash, memory-efficient or plain, as device and type allow."""
    kind = q.dtype
    if q.device.type == "cpu" and kind == torch.bfloat16 and max(q.shape[1], k.shape[1]) <= FEW:
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return sdpa(q, k, v, None if bias is None else bias.float()).to(kind)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """xformers' memory-efficient attention, for NVIDIA GPUs."""
    from xformers.ops import memory_efficient_attention

    if bias is not None:  # wanted whole, and in rows that begin at multiples of 8 numbers
        (batch, tokens, heads, _), others = q.shape, k.shape[1]
        whole = bias.to(q.dtype).expand(batch, heads, tokens, others)
        bias = F.pad(whole, (0, -others % 8))[..., :others]
    return memory_efficient_attention(q, k, v, attn_bias=bias)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "xformers": xformers}


def use_kernel(network: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Let all attention of a network go through a kernel of `KERNELS`.

    Args:
        device, dtype: where and in which type it will run; it is tried there.

    Raises:
        UsageError: the kernel is not installed, or has nothing for this device and type.
    """
    kernel, x = KERNELS[name], torch.zeros(1, 8, 1, 8, device=device, dtype=dtype)
    try:
        kernel(x, x, x, None)
    except (ImportError, NotImplementedError) as fault:
        raise UsageError(
            f"train.attention: {name} does not run here on {device.type} in {dtype} ({str(fault).splitlines()[0]}); "
            "install the release that was built for this torch (pip install -U xformers), or set train.attention=sdpa, "
            "which keeps no matrix of scores either"
        ) from fault
    for part in network.modules():
        if isinstance(part, (Attention, SpatialAttention)):
            part.kernel = kernel


@contextmanager
def recorded_maps(network: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[dict[str, Tensor]]:
    """The switch for attention maps: within, those of each call are there to read; the answers stay the same.

        with recorded_maps(unet, lambda name: name.endswith("attn2")) as maps:
            unet(x_t, t, encoder_hidden_states=text)
        maps["mid_block.attentions.0.transformer_blocks.0.attn2"].mean(1)  # (B, h * w, text tokens)

    Args:
        network: a UNet or VAE. In a UNet `attn1` is self-attention, `attn2` attention to the text.
        wanted: which attention is recorded, by its module's name; others keep their kernel, and no matrix of scores.

    Yields:
        Names and the maps of the last call: probabilities (B, heads, N, M), in the type of the queries and with their
        gradient. N = h * w of the layer's own feature map, row by row; M = N in self-attention, else the text's tokens.
    """
    maps: dict[str, Tensor] = {}

    def recording(name: str) -> Kernel:
        def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5  # (B, heads, N, M)
            maps[name] = (scores if bias is None else scores + bias).softmax(-1)
            return torch.einsum("bhnm,bmhd->bnhd", maps[name], v)

        return kernel

    kinds = (Attention, SpatialAttention)
    parts = {name: part for name, part in network.named_modules() if isinstance(part, kinds) and wanted(name)}
    before = {name: part.kernel for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.kernel = recording(name)
        yield maps
    finally:
        for name, part in parts.items():
            part.kernel = before[name]


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, kernel: Kernel = sdpa
) -> Tensor:
    """Softmax attention of several heads side by side.

    Args:
        q: queries, (B, N, heads * D).
        k, v: keys and values, (B, M, heads * D).
        heads: the number of heads.
        bias: added to the scores, broadcast to (B, heads, N, M); None adds nothing.
        kernel: one of `KERNELS`.

    Returns:
        (B, N, heads * D).

    Source: Vaswani et al. 2017, eq. 1; no kernel keeps an N x M matrix where the device has a better one.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # (B, tokens, heads, D)
    return kernel(q, k, v, bias).flatten(2)  # (B, N, heads * D)


class SpatialAttention(nn.Module):
    """Self-attention between the pixels of a feature map, one head, around a skip connection: the VAE's.

    Args:
        channels: of the feature map.
        groups, eps: of the group norm in front.
    """

    _from_deprecated_attn_block = True  # diffusers renames query, key, value, proj_attn of the first SD files for us

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.kernel: Kernel = sdpa
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        tokens = to_tokens(self.group_norm(x))  # (B, H * W, C)
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), heads=1, kernel=self.kernel)
        return x + to_map(self.to_out[0](out), x.shape[2:])


class Attention(nn.Module):
    """Attention of tokens to each other, or to those of a text.

    Args:
        channels: width of the tokens.
        heads: the number of heads; must divide `channels`.
        context_channels: width of the text's tokens, None for self-attention.
    """

    def __init__(self, channels: int, heads: int, context_channels: int | None = None) -> None:
        super().__init__()
        self.heads, self.kernel = heads, sdpa
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x: (B, N, C), context: (B, M, C_context), bias: broadcast to (B, heads, N, M) -> (B, N, C)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out[0](attend(q, k, v, self.heads, bias, self.kernel))


class GEGLU(nn.Module):
    """A linear layer, half of which gates the other half. Source: Shazeer 2020, "GLU Variants Improve Transformer"."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, hidden)."""
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with a gate, four times as wide between them; works on each token alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, and a feed-forward layer, each around a skip connection.

    Args:
        channels, heads: of the picture's tokens.
        context_channels: width of the text's tokens.
    """

    def __init__(self, channels: int, heads: int, context_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self, x: Tensor, context: Tensor, bias: Tensor | None = None, context_bias: Tensor | None = None
    ) -> Tensor:
        """x: (B, N, C), context: (B, M, C_context), biases: (B, 1, 1, N) and (B, 1, 1, M) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x), bias=bias)
        x = x + self.attn2(self.norm2(x), context, context_bias)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(Checkpointed):
    """Transformer blocks over the pixels of a feature map, around a skip connection.

    Args:
        channels, heads: of the feature map; `heads` must divide `channels`.
        context_channels: width of the text's tokens.
        depth: the number of transformer blocks.
        groups: of the group norm in front.
        linear: project in and out by linear layers (SD 2.x, SDXL), else by 1x1 convolutions (SD 1.x). The
            two compute the same; the weights differ in shape.
    """

    def __init__(
        self, channels: int, heads: int, context_channels: int, *, depth: int, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_channels) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(
        self, x: Tensor, context: Tensor, bias: Tensor | None = None, context_bias: Tensor | None = None
    ) -> Tensor:
        """x: (B, C, H, W), the others as in BasicTransformerBlock with N = H * W -> (B, C, H, W)."""
        size = x.shape[2:]
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))  # (B, H * W, C)
        for block in self.transformer_blocks:
            tokens = self.run(block, tokens, context, bias, context_bias)
        if self.linear:
            return x + to_map(self.proj_out(tokens), size)
        return x + self.proj_out(to_map(tokens, size))


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: torch.Size) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), with size = (H, W)."""
    return tokens.transpose(1, 2).unflatten(2, size)
