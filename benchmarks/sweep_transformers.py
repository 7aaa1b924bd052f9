"""Every architecture of transformers that can be built small: points, identity, a seed that trains.

python -m benchmarks.sweep_transformers --workers 16
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers import CONFIG_MAPPING

from benchmarks.host_check import check_host, fast_initialisation, quiet_forever, ready_registry, stage
from benchmarks.sample_inputs import sample_inputs
from benchmarks.sweeping import arguments, markdown, sweep
from benchmarks.tiny_configs import tiny_settings
from esper_core.kasmina.feature_trace import pick_logits
from esper_core.kasmina.module_host import host_from_module

FAMILIES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
LARGEST = 400_000_000
"""Parameters above which a configuration does not count as small."""


def names() -> list[str]:
    """`kind/family` for every kind of model that a family offers."""
    found = []
    for family in FAMILIES:
        mapping = getattr(transformers, family)._model_mapping
        found += [f"{kind}/{family}" for kind in sorted(mapping._model_mapping)]
    return sorted(found)


ROWS, PAGE = "benchmarks/results/sweep-transformers.jsonl", "docs/sweep-transformers.md"


def check(name: str) -> dict[str, Any]:
    """Build one small model with random weights and run the whole check on it."""
    kind, family = name.split("/")
    with stage("build"):
        model, inputs, params = build(kind, family)
    with stage("points"):
        host = host_from_module(model, example=inputs)
    return {
        **check_host(host, inputs),
        "inputs": {k: list(v.shape) for k, v in inputs.items()},
        "params": params,
    }


def build(kind: str, family: str) -> tuple[Any, dict[str, torch.Tensor], int]:
    """The smallest configuration that builds, with inputs on which it runs.

    Raises:
        RuntimeError: there is none; every reason is told, the first of each sort.
    """
    reasons: dict[str, str] = {}
    for settings in tiny_settings(kind):
        try:
            config = CONFIG_MAPPING[kind](**settings)
        except Exception as error:  # noqa: BLE001 - each class checks its settings in a way of its own; the next ones are tried
            reasons.setdefault("config", f"{type(error).__name__}: {error}"[:200])
            continue
        _complete(config, family)
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in getattr(transformers, family).from_config(config).parameters())
        except Exception as error:  # noqa: BLE001 - some compute with values while they are built; tried for real below
            reasons.setdefault("meta", f"{type(error).__name__}: {error}"[:200])
            size = 0
        if size > LARGEST:
            reasons.setdefault("size", f"{size / 1e6:.0f}M parameters")
            continue
        try:
            torch.manual_seed(0)
            model = getattr(transformers, family).from_config(config).eval()
        except Exception as error:  # noqa: BLE001 - the next configuration is tried
            reasons.setdefault("build", f"{type(error).__name__}: {error}"[:200])
            continue
        for inputs in sample_inputs(model):
            try:
                with torch.no_grad():
                    output = model(**inputs)
                if pick_logits(output).isnan().any():
                    reasons.setdefault("nan", "its output is not a number")
                    continue
                return model, inputs, sum(p.numel() for p in model.parameters())
            except Exception as error:  # noqa: BLE001 - the next inputs are tried
                reasons.setdefault("forward", f"{sorted(inputs)}: {type(error).__name__}: {error}"[:300])
    raise RuntimeError("; ".join(f"{what}: {why}" for what, why in reasons.items()) or "no configuration can be made")


def _complete(config: Any, family: str) -> None:
    """Settle what the default settings leave open."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"  # grouped products want rows of 16 bytes, which small widths are not
        known = getattr(part, "__dict__", {})  # looked up here, since some fields differ by layer and refuse otherwise
        if known.get("num_key_value_heads", 0) is None and "num_attention_heads" in known:
            part.num_key_value_heads = part.num_attention_heads
        if known.get("head_dim", 0) is None and {"hidden_size", "num_attention_heads"} <= known.keys():
            part.head_dim = part.hidden_size // part.num_attention_heads
        if known.get("layer_types", 0) is None and "num_hidden_layers" in known:
            part.layer_types = ["full_attention"] * part.num_hidden_layers
        if "Sequence" in family and getattr(part, "pad_token_id", 0) is None:
            part.pad_token_id = 0
        for name in [name for name in getattr(part, "__dict__", ()) if name.endswith("layerdrop")]:
            setattr(part, name, 0.0)  # a layer left out by chance trains no seed
    if not hasattr(config, "pad_token_id") and "Sequence" in family:
        config.pad_token_id = 0
    if "Causal" in family and getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    if getattr(config, "default_language", "") is None and getattr(config, "languages", None):
        config.default_language = config.languages[0]
    if getattr(config, "backbone", "") is None and getattr(config, "backbone_config", None) is None:
        config.backbone = "resnet18"


def main() -> int:
    """Sweep and write the table."""
    parser = arguments(__doc__.splitlines()[0], ROWS, PAGE)
    parser.set_defaults(memory=6)
    options = parser.parse_args()
    quiet_forever()
    ready_registry()
    fast_initialisation()
    for kind in ("bert", "gpt2", "llama", "vit", "t5", "wav2vec2", "mixtral", "clip", "whisper"):  # before forking
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    every = names()
    results = sweep(every, check, options)
    notes = [
        f"Every kind of model in transformers {transformers.__version__} with torch {torch.__version__}, through",
        "AutoModel, AutoModelForCausalLM and AutoModelForSequenceClassification: built small from its default settings",
        "with random weights, at least one point found, output bit-identical with dormant slots and with an isolated",
        "seed, the seed trained for one step. Weights that start at zero get small noise first, since no gradient",
        "passes through them before the host's own first step. Stage `build`: no small configuration was found that",
        "builds and runs on plain inputs, which is for the sweep to learn, not for the host.",
    ]
    page = markdown("transformers sweep", "make sweep-transformers", results, notes, every)
    if options.table != "-":
        Path(options.table).write_text(page)
    print("\n".join(page.splitlines()[4:60]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
