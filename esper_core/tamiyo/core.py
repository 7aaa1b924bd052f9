"""Tamiyo's core: an open-set policy over (op, slot, blueprint, blend, tempo) and a value, with memory over decisions.

It scores slots and descriptors by pointer attention (Vinyals, Fortunato & Jaitly 2015), so that one set of weights
serves any number of slots and blueprints that it never saw. Slots form a set: permuting them permutes the answer.

Shapes: N environments, S slots, B blueprints, C blends, O operations, D width, K commands a decision at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper_core.leyline.stages import Op
from esper_core.tamiyo.agent_file import fingerprint_of, load_core, save_core
from esper_core.tamiyo.features import TABLES, schema, select_features
from esper_core.tamiyo.observation import FIELDS, OPS, TEMPOS, WAIT_INDEX, Normaliser, ObservationBatch
from esper_core.tamiyo.proposals import TRUST, Proposals, followed

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle

    from esper_core.tamiyo.adapter import Adapter, AdapterFile

_GERMINATE: Final = OPS.index(Op.GERMINATE)
_ADVANCE: Final = OPS.index(Op.ADVANCE)
_NEVER: Final = -1e9


@attrs.frozen
class CoreConfig:
    """Shape of a core.

    Attributes:
        width: D. layers: set-attention blocks. heads: attention heads. commands: K.
        advised: it reads what the heuristic would do (`tamiyo.advice`) and begins by doing it.
    """

    width: int = 96
    layers: int = 2
    heads: int = 4
    commands: int = 4
    advised: bool = False

    def to_dict(self) -> dict[str, int]:
        """Fields as in an agent file: without `advised` where it is false, as in files of before it."""
        return {name: value for name, value in attrs.asdict(self).items() if name != "advised" or value}


class SetBlock(nn.Module):
    """Self-attention over a set of tokens and a feed-forward layer, both pre-normalised residuals."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mix_in, self.mix_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_in, self.feed_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """tokens (N, T, D), present (N, T) → tokens (N, T, D)."""
        n, t, d = tokens.shape
        heads = self.mix_in(self.norms[0](tokens)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # (N, H, T, D/H)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(d // self.heads)
        weights = scores.masked_fill(~present[:, None, None, :], _NEVER).softmax(-1)
        tokens = tokens + self.mix_out((weights @ v).transpose(1, 2).reshape(n, t, d))
        fed: Tensor = self.feed_out(F.gelu(self.feed_in(self.norms[1](tokens))))
        return tokens + fed


class Memory(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) of two plain linear maps, so that adapters reach them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward, self.across = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x (N, D), hidden (N, D) → hidden (N, D)."""
        reset_x, update_x, new_x = self.inward(x).chunk(3, -1)
        reset_h, update_h, new_h = self.across(hidden).chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        return (1 - update) * torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h) + update * hidden


@attrs.frozen
class Decision:
    """The outputs of the heads for one decision of N environments.

    Attributes:
        actions: (N, K, 5) indices in the order of `FIELDS`; rows after a WAIT are WAIT.
        log_prob: (N,) of all commands together.
        entropy: head → (N,) summed over the commands in which the head chose.
        asked: head → (N,) in how many commands it chose.
        value: (N,) estimate of the return from here.
        hidden: (N, D) memory after this decision.
        agreement: (N,) log-probability of doing what was proposed; None where it was not asked for.
    """

    actions: Tensor
    log_prob: Tensor
    entropy: Mapping[str, Tensor]
    asked: Mapping[str, Tensor]
    value: Tensor
    hidden: Tensor
    agreement: Tensor | None = None


class TamiyoCore(nn.Module):
    """The learned controller's network. `decide` chooses, or scores commands that were chosen before.

    Args:
        config: its shape. seed: of its initial weights.
        features: names of the features that it reads, as `features.schema()` gives them; None for all of them, those of
            advice only if it is advised.

    Raises:
        EsperError: a feature that this version does not have.
    """

    def __init__(
        self, config: CoreConfig | None = None, *, seed: int | None = None, features: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.config = config or CoreConfig()
        self.features = list(schema(advised=self.config.advised) if features is None else features)
        self.lineage: dict[str, Any] = {}
        self.adapters: dict[str, Adapter] = {}
        self.adapter_handles: list[RemovableHandle] = []
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self._build()

    def _build(self) -> None:
        width = self.config.width
        normalisers = {kind: Normaliser(*select_features(self.features, kind)) for kind in TABLES}
        self.normalisers = nn.ModuleDict(normalisers)
        self.embed = nn.ModuleDict({
            kind: nn.Sequential(nn.Linear(n.width, width), nn.GELU(), nn.Linear(width, width))
            for kind, n in normalisers.items()
        })  # fmt: skip
        self.blocks = nn.ModuleList([SetBlock(width, self.config.heads) for _ in range(self.config.layers)])
        self.final_norm = nn.LayerNorm(width)
        self.memory = Memory(width)
        self.ops = nn.Embedding(len(OPS), width)
        self.op_head = nn.Linear(width, len(OPS))
        self.slot_query, self.slot_key = nn.Linear(width, width), nn.Linear(width, width)
        self.choice_query, self.blueprint_key = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.blend_query, self.blend_key = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.tempo_head = nn.Linear(2 * width, len(TEMPOS))
        self.taken = nn.Linear(width, width)
        self.value_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        for head in (self.op_head, self.tempo_head, self.slot_query, self.choice_query, self.blend_query):
            nn.init.orthogonal_(head.weight, 0.1)
            nn.init.zeros_(head.bias)
        if self.config.advised:
            self.trust = nn.Linear(width, len(FIELDS))
            nn.init.zeros_(self.trust.weight)
            with torch.no_grad():
                self.trust.bias.copy_(torch.tensor(TRUST))

    def initial(self, environments: int) -> Tensor:
        """Memory before the first decision: (N, D) zeros."""
        return torch.zeros(environments, self.config.width, device=self.op_head.weight.device)

    def embed_raw(self, kind: str, raw: Tensor) -> Tensor:
        """Embed the raw features (…, F) of an observation, F as in `features.TABLES[kind]`: (…, D)."""
        embedded: Tensor = self.embed[kind](self.normalisers[kind](raw))
        return embedded

    def perceive(self, batch: ObservationBatch) -> tuple[Tensor, Tensor]:
        """Tokens of slots (N, S, D) and a summary of the run (N, D); no memory involved."""
        slots, run = self.embed_raw("slots", batch.slots), self.embed_raw("run", batch.run)[:, None]
        tokens = torch.cat([run, slots], 1)
        present = torch.cat([torch.ones_like(batch.present[:, :1]), batch.present], 1)
        for block in self.blocks:
            tokens = block(tokens, present)
        tokens = self.final_norm(tokens)
        return tokens[:, 1:], tokens[:, 0]

    def decide(
        self,
        batch: ObservationBatch,
        hidden: Tensor,
        *,
        actions: Tensor | None = None,
        generator: torch.Generator | None = None,
        chances: Tensor | None = None,
        commands: int | None = None,
    ) -> Decision:
        """One decision of N environments.

        Args:
            batch: what they see.
            hidden: (N, D) memory after the decision before.
            actions: (N, K, 5) to score instead of choosing.
            generator: to sample with; without it the likeliest command is chosen.
            chances: (N, K, 5) uniform numbers to sample by instead, so that an environment's draws are its own.
            commands: K; None for the core's own, with which it was trained.
        """
        tokens, summary = self.perceive(batch)
        hidden = self.memory(summary, hidden)
        return self.answer(
            batch, tokens, hidden, actions=actions, generator=generator, chances=chances, commands=commands
        )

    def answer(
        self,
        batch: ObservationBatch,
        tokens: Tensor,
        hidden: Tensor,
        *,
        actions: Tensor | None = None,
        generator: torch.Generator | None = None,
        chances: Tensor | None = None,
        commands: int | None = None,
    ) -> Decision:
        """The heads alone, given tokens (N, S, D) and the memory (N, D) that has seen this decision."""
        heads = _Heads(self, batch, tokens, hidden, generator)
        for k in range(self.config.commands if commands is None else commands):
            heads.chances = None if chances is None else chances[:, k]
            heads.command(None if actions is None else actions[:, k])
        value: Tensor = self.value_head(hidden).squeeze(-1)
        return Decision(torch.stack(heads.rows, 1), heads.log_prob, heads.entropy, heads.asked, value, hidden)

    def agreement(self, batch: ObservationBatch, tokens: Tensor, hidden: Tensor) -> Tensor:
        """(N,) log-probability of doing what is proposed, up to K commands; arguments as in `answer`.

        0 where an environment has no advice.
        """
        asked = self.answer(batch, tokens, hidden, actions=followed(batch, self.config.commands))
        return torch.where(batch.advised, asked.log_prob, 0.0)

    def wishes(self, batch: ObservationBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The wish to germinate: how it is spread over the slots, and how strong it is beside the wish to wait.

        Args:
            batch: what N environments see. hidden: (N, D) memory after the decision before; it does not move.

        Returns:
            (N, S), 0 where it is illegal, sum 1 or 0; and (N,) P(GERMINATE) / (P(GERMINATE) + P(WAIT)).
        """
        tokens, summary = self.perceive(batch)
        context = self.memory(summary, hidden)
        pointers, op_logits, _ = self.weigh(context, self.slot_key(tokens), batch.legal)
        legal = batch.legal[..., _GERMINATE]
        if self.config.advised:
            trust, proposed = self.trust(context), Proposals(batch)
            germinate = torch.full_like(batch.advised, _GERMINATE, dtype=torch.int64)
            slots = proposed.slot(germinate)
            pointers[:, _GERMINATE] += trust[:, 1:2] * slots
            wanted = slots.any(-1)
            op_logits[:, _GERMINATE] += trust[:, 0] * wanted
            op_logits[:, WAIT_INDEX] += trust[:, 0] * (batch.advised & ~wanted)
        spread = pointers[:, _GERMINATE].masked_fill(~legal, _NEVER).softmax(-1) * legal
        drive = torch.sigmoid(op_logits[:, _GERMINATE] - op_logits[:, WAIT_INDEX]) * legal.any(-1)
        return spread, drive

    def weigh(self, context: Tensor, keys: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How much each operation is wanted at each slot, and at all.

        Args:
            context: (N, D). keys: (N, S, D) of the slots. legal: (N, S, O).

        Returns:
            Pointers (N, O, S), logits (N, O), and whether an operation is legal anywhere or is WAIT (N, O).
        """
        queries = self.slot_query(context[:, None] + self.ops.weight)  # (N, O, D)
        pointers = torch.einsum("nod,nsd->nos", queries, keys) / math.sqrt(self.config.width)
        allowed = legal.transpose(1, 2)  # (N, O, S)
        # The mean rather than the sum over legal slots, so that 64 slots do not shout louder than 3.
        wanted = pointers.masked_fill(~allowed, _NEVER).logsumexp(-1) - allowed.sum(-1).clamp(min=1).log()
        somewhere = allowed.any(-1)
        possible = somewhere | (torch.arange(len(OPS), device=context.device) == WAIT_INDEX)
        return pointers, self.op_head(context) + torch.where(somewhere, wanted, 0.0), possible

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration, names, shapes and bytes of the core's own state; adapters do not change it."""
        return fingerprint_of(self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an agent file.

        Raises:
            BadFile: damaged, hostile, or written for another feature table.
        """
        return load_core(cls, CoreConfig, path)

    def save(self, path: str | Path) -> None:
        """Write an agent file with this core's lineage."""
        save_core(self, path)

    def attach(self, adapter: Adapter | AdapterFile, domain: str | None = None) -> Adapter:
        """Attach `adapter` under a domain name and make it the active one; see `tamiyo.adapter`."""
        from esper_core.tamiyo.adapter import attach

        return attach(self, adapter, domain)

    def detach(self, domain: str | None = None) -> None:
        """Detach the adapter of one domain, or all; the core then computes what it did before, bit for bit."""
        from esper_core.tamiyo.adapter import detach

        detach(self, domain)


class _Heads:
    """The factored heads of one decision: op → slot → blueprint → blend and tempo, up to K times or until WAIT."""

    def __init__(
        self,
        core: TamiyoCore,
        batch: ObservationBatch,
        tokens: Tensor,
        hidden: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        self.core, self.batch, self.tokens, self.context, self.generator = core, batch, tokens, hidden, generator
        self.chances: Tensor | None = None
        n, device = len(hidden), hidden.device
        self.rows: list[Tensor] = []
        self.log_prob = hidden.new_zeros(n)
        self.entropy = {name: hidden.new_zeros(n) for name in FIELDS}
        self.asked = {name: hidden.new_zeros(n) for name in FIELDS}
        self.legal = batch.legal  # (N, S, O)
        self.going = torch.ones(n, dtype=torch.bool, device=device)
        self.proposals = Proposals(batch) if core.config.advised else None
        self.keys = core.slot_key(tokens)  # (N, S, D)
        self.lanes = torch.arange(n, device=device)
        self.slots = torch.arange(self.legal.shape[1], device=device)

    def command(self, given: Tensor | None) -> None:
        """Choose one command for every environment that has not waited yet, or score the `given` rows (N, 5)."""
        core, scale = self.core, math.sqrt(self.core.config.width)
        if not self.going.any():
            row = self.lanes.new_zeros(len(self.lanes), len(FIELDS))
            row[:, 0] = WAIT_INDEX
            self.rows.append(row)
            return
        pointers, op_logits, possible = core.weigh(self.context, self.keys, self.legal)
        legal, proposed = self.legal.transpose(1, 2), self.proposals  # (N, O, S)
        trust = core.trust(self.context) if proposed else self.context  # (N, 5) where there are proposals
        if proposed:
            op_logits = op_logits + trust[:, 0, None] * proposed.op()
        op = self._choose("op", op_logits, possible, self.going, given)
        acting = self.going & (op != WAIT_INDEX)

        pointer = pointers[self.lanes, op]
        if proposed:
            pointer = pointer + trust[:, 1, None] * proposed.slot(op)
        slot = self._choose("slot", pointer, legal[self.lanes, op], acting, given)
        token = self.tokens[self.lanes, slot]
        context = torch.cat([self.context + core.ops(op), token], -1)  # (N, 2D)
        blueprint, blend, tempo = torch.zeros_like(op), torch.zeros_like(op), torch.zeros_like(op)
        growing = acting & (op == _GERMINATE)
        if growing.any():
            described = core.embed_raw("blueprints", self.batch.blueprints[self.lanes, slot])
            choice = torch.einsum("nd,nbd->nb", core.choice_query(context), core.blueprint_key(described)) / scale
            if proposed:
                choice = choice + trust[:, 2, None] * proposed.blueprint(op, slot)
            blueprint = self._choose("blueprint", choice, self.batch.grows[self.lanes, slot], growing, given)
        blending = acting & (op == _ADVANCE) & self.batch.blending[self.lanes, slot]
        if blending.any():
            described = core.embed_raw("blends", self.batch.blends)
            choice = torch.einsum("nd,ncd->nc", core.blend_query(context), core.blend_key(described)) / scale
            tempi = core.tempo_head(context)
            if proposed:
                choice = choice + trust[:, 3, None] * proposed.blend(op, slot)
                tempi = tempi + trust[:, 4, None] * proposed.tempo(op, slot)
            blend = self._choose("blend", choice, self.batch.blend_present, blending, given)
            tempo = self._choose("tempo", tempi, torch.ones_like(tempi, dtype=torch.bool), blending, given)
        if proposed:
            proposed.take(acting, slot)

        self.rows.append(torch.stack([op, slot, blueprint, blend, tempo], -1))
        # A slot takes one command a decision, and the next command knows of this one.
        taken = acting[:, None] & (self.slots == slot[:, None])
        self.legal = self.legal & ~taken[..., None]
        self.context = self.context + torch.where(acting[:, None], core.taken(token + core.ops(op)), 0.0)
        self.going = acting

    def _choose(self, head: str, logits: Tensor, allowed: Tensor, active: Tensor, given: Tensor | None) -> Tensor:
        """Indices (N,): given, sampled or likeliest; where `active` is false, the index counts for nothing."""
        allowed = allowed | ~allowed.any(-1, keepdim=True)  # an unused head still needs a distribution
        log_probs = logits.masked_fill(~allowed, _NEVER).log_softmax(-1)
        if given is not None:
            index = given[:, FIELDS.index(head)]
        elif self.chances is not None:
            # in float64: a sum that ends below 1 would leave chances that no choice answers
            below = log_probs.double().exp().cumsum(-1)
            chance = self.chances[:, FIELDS.index(head), None].double() * below[:, -1:]
            last = (allowed * torch.arange(1, allowed.shape[-1] + 1, device=allowed.device)).amax(-1) - 1
            index = torch.minimum((below <= chance).sum(-1), last)
        elif self.generator is not None:
            index = torch.multinomial(log_probs.exp(), 1, generator=self.generator).squeeze(-1)
        else:
            index = log_probs.argmax(-1)
        index = torch.where(active, index, WAIT_INDEX if head == "op" else 0)
        chosen = log_probs.gather(-1, index[:, None]).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs.masked_fill(~allowed, 0.0)).sum(-1)
        self.log_prob = self.log_prob + torch.where(active, chosen, 0.0)
        self.entropy[head] = self.entropy[head] + torch.where(active, entropy, 0.0)
        self.asked[head] = self.asked[head] + active.to(logits.dtype)
        return index
