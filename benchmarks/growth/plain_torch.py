"""P8's recipe without Esper: growing a GPT of bytes by copies in a plain loop, to try variants and to check Esper by.

`python -m benchmarks.growth.plain_torch TEXT JOBS.json ROWS.jsonl --processes 10 --limit 520`. TEXT is the prefix that
`benchmarks.growth.text` wrote. A job is a JSON object: `name`, `seed`, `budget` (FLOPs), `width`, `layers`, `rate` or
`rates` (one a stage), `grow` (a list of [share of the budget, depth], perhaps with an order), and what differs from the
defaults of `Job`. On a GPU every step is replayed as a CUDA graph, and processes share the device.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import queue
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper_core.tolaria.muon import orthogonalize
from esper_hosts.gpt import GPT

CLIP: Final = 1.0
WEIGHT_DECAY: Final = 0.1
MOMENTUM: Final = 0.95
"""Of Muon."""
_EAGER: Final = 3
"""Steps of a stage before its graph is captured: memory is allocated, and blocks are compiled."""


@attrs.frozen(kw_only=True)
class Job:
    """One training.

    Attributes:
        grow: share of the budget, depth from there on, and the order if it is not `order`.
        order: `stack` (ABC to ABCABC), `interleave` (AABBCC), `middle` (ABCD to ABCBCD) or `tail` (ABC to ABCBC); with
            `scaled`, residual projections are multiplied by the root of old depth over new.
        moments: whether copies take their sources' moments.
        rates: peak of each stage; empty for `rate` in all. batches: windows in a batch, of each stage.
        warmup, decay: shares of the budget. vectors: whether norms have weight decay, too.
    """

    name: str
    seed: int
    budget: float
    width: int
    layers: int
    rate: float = 0.0
    grow: tuple[tuple[Any, ...], ...] = ()
    order: str = "stack"
    scaled: bool = False
    moments: bool = True
    rates: tuple[float, ...] = ()
    batches: tuple[int, ...] = ()
    warmup: float = 0.02
    decay: float = 0.4
    beta2: float = 0.95
    muon: bool = False
    vectors: bool = False
    context: int = 256

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Job:
        """The job of a JSON object."""
        lists = {"rates": tuple, "batches": tuple, "grow": lambda steps: tuple(map(tuple, steps))}
        return cls(**{key: lists.get(key, lambda value: value)(value) for key, value in told.items()})

    def step_flops(self, layers: int, batch: int) -> float:
        """Of one step, forward and backward, attention in full, as Esper counts them."""
        width, length = self.width, self.context
        return 3.0 * batch * length * (layers * (24 * width**2 + 4 * length * width) + 512 * width)

    def factor(self, share: float) -> float:
        """Of the peak rate when `share` of the budget is spent."""
        rise = min(1.0, max(share, 1e-9) / self.warmup)
        return rise * min(1.0, max(0.0, (1.0 - share) / self.decay))


class Optimizer:
    """AdamW, or Muon for the matrices of blocks, whose state outlives growth and whose step can be captured."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, device
        self.rate = torch.zeros((), device=device)
        self.state: dict[Tensor, list[Tensor]] = {}

    def follow(self, model: GPT) -> None:
        """Update the parameters that `model` has now."""
        inside = [p for p in model.blocks.parameters() if p.dim() == 2] if self.job.muon else []
        known = set(map(id, inside))
        self.others = [p for p in model.parameters() if id(p) not in known]
        self.matrices: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in inside:
            self.matrices.setdefault(parameter.shape, []).append(parameter)
            self.state.setdefault(parameter, [torch.zeros_like(parameter)])
        for parameter in self.others:
            zeros = [torch.zeros_like(parameter), torch.zeros_like(parameter), torch.zeros((), device=self.device)]
            self.state.setdefault(parameter, zeros)

    @torch.no_grad()
    def step(self) -> None:
        """Update everything once at `rate`."""
        decayed = [p for p in self.others if p.dim() > 1 or self.job.vectors]
        bare = [p for p in self.others if not (p.dim() > 1 or self.job.vectors)]
        for chosen, decay in ((decayed, WEIGHT_DECAY), (bare, 0.0)):
            if not chosen:
                continue
            first, second, steps = ([self.state[p][k] for p in chosen] for k in range(3))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                chosen, [p.grad for p in chosen], first, second, [], steps, lr=self.rate, beta1=0.9,
                beta2=self.job.beta2, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False, grad_scale=None,
                found_inf=None,
            )  # fmt: skip
        for shape, same in self.matrices.items():
            momenta, gradients = [self.state[p][0] for p in same], [p.grad for p in same]
            torch._foreach_lerp_(momenta, gradients, 1.0 - MOMENTUM)
            moves = orthogonalize(torch.stack(list(torch._foreach_lerp(gradients, momenta, MOMENTUM)))).float()
            torch._foreach_mul_(same, 1.0 - WEIGHT_DECAY * self.rate)
            torch._foreach_add_(same, list((-self.rate * 0.2 * math.sqrt(max(shape)) * moves).unbind(0)))


def order_of(order: str, old: int, new: int) -> list[int]:
    """The source of each of `new` blocks among `old` ones."""
    if order == "interleave":
        return [index * old // new for index in range(new)]
    if order == "middle":
        inside = list(range(1, old - 1)) or [0]
        return [0, *(inside[index % len(inside)] for index in range(new - 2)), old - 1]
    if order == "tail":
        return [*range(old), *range(2 * old - new, old)]
    return [index % old for index in range(new)]


def deepen(model: GPT, optimizer: Optimizer, depth: int, order: str, job: Job) -> None:
    """Give `model` copies of its blocks up to `depth`, with their moments."""
    sources, blocks = list(model.blocks), []
    for index in order_of(order, len(sources), depth):
        if sources[index] not in blocks:
            blocks.append(sources[index])
            continue
        clone = copy.deepcopy(sources[index])
        for new, old in zip(clone.parameters(), sources[index].parameters(), strict=True):
            state = optimizer.state[old]
            optimizer.state[new] = [tensor.clone() if job.moments else torch.zeros_like(tensor) for tensor in state]
        blocks.append(clone)
    model.blocks = nn.ModuleList(blocks)
    if job.scaled:
        with torch.no_grad():
            for block in blocks:
                for linear in (block.proj, block.down):
                    linear.weight.mul_(math.sqrt(len(sources) / depth))


def train(job: Job, text: Tensor, held_out: Tensor, device: str) -> dict[str, Any]:
    """Train, and read the validation text.

    Returns:
        The job with `loss` (nats a byte), `steps`, `seconds` and `curve` of (share of the budget, training loss).
    """
    began, length = time.monotonic(), job.context
    torch.manual_seed(job.seed)
    heads = max(1, job.width // (32 if job.width <= 160 else 64))
    model = GPT(256, job.layers, job.width, heads, length, 4.0, True).to(device)
    draw = torch.Generator(device=device).manual_seed(1000 + job.seed)
    optimizer, reach = Optimizer(job, device), torch.arange(length + 1, device=device)
    low = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    spent, steps, curve = 0.0, 0, list[tuple[float, float]]()
    total, counted = torch.zeros((), device=device), 0
    for stage, (end, *after) in enumerate([*job.grow, (1.0,)]):
        batch = job.batches[stage] if job.batches else 64
        rate = job.rates[stage] if job.rates else job.rate
        cost = job.step_flops(len(model.blocks), batch)
        optimizer.follow(model)
        places = torch.zeros(batch, 1, dtype=torch.long, device=device)

        def once(places: Tensor = places) -> None:
            cut = text[places + reach].long()
            with low:
                logits = model(cut[:, :-1])
                loss = F.cross_entropy(logits.float().flatten(0, 1), cut[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(list(model.parameters()), CLIP, foreach=True)
            optimizer.step()
            total.add_(loss.detach())

        step: Callable[[], None] | None = None
        for number in range(round((end * job.budget - spent) / cost)):
            optimizer.rate.fill_(rate * job.factor(spent / job.budget))
            places.copy_(torch.randint(0, len(text) - length - 1, (batch, 1), generator=draw, device=device))
            if step is None:
                model.zero_grad(set_to_none=True)
                if number < _EAGER or device == "cpu":
                    once()
                else:
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                        once()
                    step = graph.replay
            if step is not None:
                step()
            spent, steps, counted = spent + cost, steps + 1, counted + 1
            if counted == 100:
                curve.append((round(spent / job.budget, 4), round(total.item() / counted, 4)))
                total.zero_()
                counted = 0
        step = None
        model.zero_grad(set_to_none=True)
        if after:
            deepen(model, optimizer, after[0], after[1] if len(after) > 1 else job.order, job)
    loss = read(model, held_out, length, low)
    return {
        **attrs.asdict(job), "loss": loss, "steps": steps, "seconds": round(time.monotonic() - began, 1),
        "curve": curve,
    }  # fmt: skip


@torch.no_grad()
def read(model: GPT, text: Tensor, length: int, low: torch.autocast) -> float:
    """The mean loss (nats a byte) on `text` in windows one after the other."""
    losses = []
    for start in range(0, len(text) - 64 * length - 1, 64 * length):
        cut = text[start : start + 64 * length + 1].long()
        with low:
            logits = model(cut[:-1].view(64, length))
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), cut[1:]).item())
    return sum(losses) / len(losses)


def work(jobs: Any, text: str, rows: Path, device: str, deadline: float) -> None:
    """Take jobs and append their rows until none is left or time is up."""
    torch.set_num_threads(1)
    parts = [torch.frombuffer(bytearray(Path(f"{text}.{part}").read_bytes()), dtype=torch.uint8).to(device)
             for part in ("train", "validation")]  # fmt: skip
    if device == "cuda":
        from esper_hosts.gpt import Block

        Block.forward = torch.compile(Block.forward, dynamic=False)  # type: ignore[method-assign]
    longest = 0.0
    while time.monotonic() + longest < deadline:
        try:
            told = jobs.get(timeout=2)
        except queue.Empty:
            return
        row = train(Job.read(told), *parts, device)
        longest = max(longest, row["seconds"])
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{row['name']} seed {row['seed']}: {row['loss']:.4f} after {row['steps']} steps, {row['seconds']} s",
            flush=True,
        )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="prefix of the text files")
    parser.add_argument("jobs", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no job begins that would not end")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    for job in json.loads(args.jobs.read_text(encoding="utf-8")):
        jobs.put(job)
    told = (jobs, args.text, args.rows, args.device, time.monotonic() + args.limit)
    workers = [context.Process(target=work, args=told) for _ in range(args.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
