"""A decoder-only transformer with a point behind each block; small and fast, for bytes or subword tokens.

A block maps a feature (N, L, D) to one of the same shape and needs nothing else, so it can be cloned and repeated: its
rotary tables are buffers of its own, which are not saved. Queries and keys are rotated together, in three kernels.

Source: pre-norm blocks without biases and residual projections scaled by depth: Radford et al. 2019 (GPT-2); rotary
positions: Su et al. 2021, arXiv:2104.09864; norms of queries and keys: Henry et al. 2020, arXiv:2010.04245.
"""

# Shapes: N examples, L positions, D width, H heads, E = D / H.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.leyline.errors import BadOption
from esper_hosts.sizes import no_argument

CONTEXT = 128
OUTPUTS = 256


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind a norm and added to its input: (N, L, D) to the same.

    Args:
        width: D. heads: H. context: the longest L. depth: blocks of the model, which scale what a block adds.
        expansion: units of the feed-forward layer over D. qk_norm: normalise queries and keys in each head.
    """

    def __init__(self, width: int, heads: int, context: int, depth: int, expansion: float, qk_norm: bool) -> None:
        super().__init__()
        self.heads, hidden = heads, round(expansion * width)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.qk_norm = nn.RMSNorm(width // heads) if qk_norm else None
        self.depth = depth
        self.reset_parameters()
        cos, sin = rotary_tables(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def reset_parameters(self) -> None:
        """Draw new weights; norms begin at 1."""
        for norm in (self.norm1, self.norm2, self.qk_norm):
            if norm is not None:
                norm.reset_parameters()
        for linear in (self.qkv, self.up):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.proj, self.down):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.depth))

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) to (N, L, D)."""
        x = x + self._attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def _attend(self, x: Tensor) -> Tensor:
        examples, length, width = x.shape
        qkv = self.qkv(x).view(examples, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 N H L E
        both, value = qkv[:2], qkv[2]
        if self.qk_norm is not None:
            both = self.qk_norm(both)
        cos, sin = self.cos[:length].to(both.dtype), self.sin[:length].to(both.dtype)
        query, key = torch.addcmul(both * cos, both.roll(both.shape[-1] // 2, -1), sin)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # N H L E
        return self.proj(seen.transpose(1, 2).reshape(examples, length, width))


def rotary_tables(context: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the sign that goes with rolling a head by half its size: (context, size) each."""
    half = size // 2
    frequency = 10000.0 ** -(torch.arange(half) / half)
    angle = torch.outer(torch.arange(context), frequency)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


class GPT(nn.Module):
    """Embedding, blocks, norm and an untied head: token numbers (N, L) to logits (N, L, outputs)."""

    def __init__(
        self, outputs: int, layers: int, width: int, heads: int, context: int, expansion: float, qk_norm: bool
    ) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(outputs, width), nn.Linear(width, outputs, bias=False)
        self.norm = nn.LayerNorm(width, bias=False)
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, context, layers, expansion, qk_norm) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def start_size(params: float) -> dict[str, int]:
    """Options of a network that ends with `params` parameters in its blocks when its depth has doubled twice.

    The final network is about twelve times as wide as deep, as the best grown ones of docs/growth.md.
    """
    wide = params ** (1 / 3)
    step = 32 if wide <= 160 else 64
    width = max(step, step * round(wide / step))
    return {"layers": max(1, round(params / (12 * width**2) / 4)), "width": width}


def gpt(
    argument: str = "",
    *,
    outputs: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    heads: int = 0,
    context: int = 0,
    expansion: float = 4.0,
    qk_norm: bool = False,
) -> ModuleHost:
    """The model as a host, with a point behind each block.

    Args:
        argument: must be empty; sizes are options.
        outputs: size of the vocabulary; 256 if unknown.
        input_shape: (L,) of the task's windows; (128,) if unknown.
        seed: of the initial weights.
        heads: of attention; 0: one for 32 units of width up to 160, one for 64 beyond.
        context: the longest window that the model can read; 0: the task's.
        layers, width, expansion, qk_norm: see `GPT` and `Block`.

    Raises:
        BadOption: the width cannot be shared among the heads in even parts, or the context is below the task's.
    """
    no_argument("gpt", argument)
    shape = tuple(input_shape or (context or CONTEXT,))
    heads = heads or max(1, width // (32 if width <= 160 else 64))
    if width % (2 * heads):
        raise BadOption(f"gpt.width={width} with {heads} heads", f"a multiple of {2 * heads}", "--set gpt.heads=1")
    if len(shape) != 1:
        raise BadOption(f"gpt cannot take inputs of shape {shape}", "windows of tokens", "--task stdlib, or --host cnn")
    if 0 < context < shape[0]:
        raise BadOption(
            f"gpt.context={context} for windows of {shape[0]} tokens", "a context that holds them",
            f"--set gpt.context={shape[0]}",
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = GPT(outputs or OUTPUTS, layers, width, heads, context or shape[0], expansion, qk_norm)
    example = (torch.arange(shape[0]) % min(model.head.out_features, 200))[None]
    return host_from_module(model, [f"blocks.{index}" for index in range(layers)], example=example)
