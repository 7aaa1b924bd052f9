"""Self-attention: extra heads beside the host's own, over the positions of a map or the tokens of a sequence.

norm → queries, keys, values → scaled dot-product attention → output layer. Each query may also attend to a key and
value of zeros ("softmax plus one"): a head can abstain, and queries and keys learn even where there is one position
only, at which an ordinary softmax is constant. Projections have no bias: a bias on the keys would have no gradient.

- Maps: keys and values are averaged down to at most `grid`×`grid` positions, so that cost grows with the number of
  positions and not with its square. Positions carry no code of their own; the host's features do.
- Sequences: causal where the point is. The host's masks hold for the seed too, and where the host generates with a
  cache, the seed keeps its keys and values there.

Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; averaged keys and values: Wang et al.,
"PVT v2", 2021, arXiv:2106.13797; the key of zeros: `add_zero_attn` of torch's MultiheadAttention, analysed as
attention sink by Xiao et al., 2023, arXiv:2309.17453.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from esper_blueprints import cost
from esper_blueprints.layout import MapNorm, MapSeed, MixingSeed, TokenNorm, quiet
from esper_core.kasmina.calls import Call
from esper_core.kasmina.sight import Sight
from esper_core.leyline.injection import InjectionSpec

WIDEST_HEAD = 64


def head_width(channels: int, heads: int) -> int:
    """Size of a head: the channels shared out among the heads, rounded up, and 64 at most."""
    return min(WIDEST_HEAD, -(-channels // heads))


class SequenceAttentionSeed(MixingSeed):
    """Extra heads on a sequence.

    Args:
        point: a sequence; causal if so tagged.
        heads: number of heads.
        init: of the output layer, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, heads: int, init: str) -> None:
        super().__init__(point)
        self.heads = heads
        width = heads * head_width(point.channels, heads)
        self.norm = TokenNorm(point.channels)
        self.qkv = nn.Linear(point.channels, 3 * width, bias=False)
        self.out = quiet(nn.Linear(width, point.channels), init)

    def delta(self, x_NLD: Tensor, sight: Sight | None) -> Tensor:
        qkv = self.qkv(self.norm(x_NLD))
        if sight is None:
            # One token of zeros before the first: its key and value are zeros, and the causal mask stays a plain one.
            q, k, v = self._by_head(F.pad(qkv, (0, 0, 1, 0)))  # each N, heads, 1 + L, width / heads
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, :, 1:]
        else:
            q, k, v = self._by_head(qkv)
            k, v = sight.remember(self, k, v)
            seen = sight.pairs(q.shape[2], k.shape[2], self.causal)
            if seen is not None:
                seen = F.pad(seen, (1, 0), value=True)[:, None].to(q.device)
            zero = (0, 0, 1, 0)
            mixed = F.scaled_dot_product_attention(q, F.pad(k, zero), F.pad(v, zero), attn_mask=seen)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _by_head(self, x_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x_NLD.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v


class MapAttentionSeed(MapSeed):
    """Attention between the positions of a map and an averaged map.

    Args:
        point: a map.
        heads: number of heads.
        grid: keys and values are averaged to at most this many positions a side.
        init: of the output layer, see `layout.quiet`.
    """

    def __init__(self, point: InjectionSpec, *, heads: int, grid: int, init: str) -> None:
        super().__init__(point)
        self.heads, self.grid = heads, grid
        width = heads * head_width(point.channels, heads)
        self.norm = MapNorm(point.channels)
        self.q = nn.Linear(point.channels, width, bias=False)
        self.kv = nn.Linear(point.channels, 2 * width, bias=False)
        self.out = quiet(nn.Linear(width, point.channels), init)

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """Feature in, delta of the same shape and dtype out; a map has no masks."""
        return super().forward(h)

    def delta(self, x_NCHW: Tensor) -> Tensor:
        x = self.norm(x_NCHW)
        height, width = x.shape[2:]
        window = (_window(height, self.grid), _window(width, self.grid))
        few = x if window == (1, 1) else F.avg_pool2d(x, window, ceil_mode=True, count_include_pad=False)
        q = self.q(x.flatten(2).transpose(1, 2))
        kv = F.pad(self.kv(few.flatten(2).transpose(1, 2)), (0, 0, 0, 1))  # one more key and value, of zeros
        (q,), (k, v) = self._by_head(q, 1), self._by_head(kv, 2)  # each N, heads, positions, width / heads
        mixed = F.scaled_dot_product_attention(q, k, v)
        out_NLC = self.out(mixed.transpose(1, 2).flatten(2))
        return out_NLC.transpose(1, 2).unflatten(2, (height, width))

    def _by_head(self, x_NLD: Tensor, parts: int) -> Tensor:
        return x_NLD.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)  # parts, N, heads, L, …


def _window(size: int, grid: int) -> int:
    """Side of the averaging window that leaves at most `grid` positions of `size`."""
    return -(-size // grid)


def build(point: InjectionSpec, *, heads: int, grid: int, init: str) -> nn.Module:
    """The seed for the point's layout; `grid` matters to maps only."""
    if point.layout == "NLD":
        return SequenceAttentionSeed(point, heads=heads, init=init)
    return MapAttentionSeed(point, heads=heads, grid=grid, init=init)


def estimate(point: InjectionSpec, *, heads: int, grid: int, init: str) -> cost.Cost:
    """Parameters and forward FLOPs of one example; a causal mask saves none."""
    positions, channels = point.positions, point.channels
    width = heads * head_width(channels, heads)
    out = cost.linear(positions, width, channels)
    if point.layout == "NLD":
        qkv = cost.linear(positions, channels, 3 * width, bias=False)
        return cost.total(qkv, cost.attention(positions + 1, positions + 1, width), out)
    sides = point.feature_shape[1:] if point.layout == "NCHW" else point.feature_shape[:2]
    keys = 1
    for side in sides:
        keys *= -(-side // _window(side, grid))
    return cost.total(
        cost.linear(positions, channels, width, bias=False),
        cost.linear(keys, channels, 2 * width, bias=False),
        cost.attention(positions, keys + 1, width),
        out,
    )
