"""Attention, in one place: `attend` is the only function that computes scores."""

import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of several heads side by side.

    Args:
        q: queries, (B, N, heads * D).
        k, v: keys and values, (B, M, heads * D).
        heads: the number of heads.
        bias: added to the scores, broadcast to (B, heads, N, M); None adds nothing.

    Returns:
        (B, N, heads * D).

    Source: Vaswani et al. 2017, eq. 1; the kernel (flash where there is one) keeps no N x M matrix.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)  # (B, N, heads * D)


class SpatialAttention(nn.Module):
    """Self-attention between the pixels of a feature map, one head, around a skip connection: the VAE's.

    Args:
        channels: of the feature map.
        groups, eps: of the group norm in front.
    """

    _from_deprecated_attn_block = True  # diffusers renames query, key, value, proj_attn of the first SD files for us

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H * W, C)
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), heads=1)
        out = self.to_out[0](out)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)
