"""Growth inside `transformers.Trainer`: a GPT-2 of random weights on Python's own reference text, byte by byte.

Run: python examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from esper_core import GrowthCallback
from esper_core.leyline.events import Event


def windows(length: int = 64) -> Tensor:
    """The text as rows of bytes, (rows, length)."""
    text = torch.tensor(list("\n".join(topics.values()).encode()), dtype=torch.long)
    return text[: len(text) // length * length].view(-1, length)


def tell(event: Event) -> None:
    """Print what grows and what is undone."""
    if event.kind in ("stage_changed", "rolled_back", "governor_alarm"):
        print(event.to_json())


def main(rows: int = 2048, epochs: int = 2) -> GrowthCallback:
    """Train, and return the callback with everything that has grown."""
    torch.manual_seed(0)
    data = windows()[: rows + 64]
    config = GPT2Config(
        vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    growth = GrowthCallback(
        [{"input_ids": data[-64:], "labels": data[-64:]}],
        blueprints=["bottleneck_adapter", "ffn"],
        points=["transformer.h.0", "transformer.h.1"],
        budget_params="40%",
        on_event=tell,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=3e-3,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", seed=0,
        )  # fmt: skip
        items = [{"input_ids": row, "labels": row} for row in data[:rows]]
        Trainer(GPT2LMHeadModel(config), arguments, train_dataset=items, callbacks=[growth]).train()
    return growth


if __name__ == "__main__":
    done = main()
    assert done.tolaria is not None
    print(f"validation loss {done.tolaria.clock.history[-1][1]:.4f} nats a byte")
    print("a plain module of", sum(p.numel() for p in done.compose().parameters()), "parameters")
