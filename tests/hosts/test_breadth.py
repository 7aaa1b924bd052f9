"""A fixed sample of the architectures that `make sweep-timm` and `make sweep-transformers` check in full."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

from benchmarks import sweep_timm, sweep_transformers

TIMM = (
    "coat_lite_tiny", "convnext_atto", "crossvit_tiny_240", "edgenext_xx_small", "efficientformer_l1",
    "eva02_tiny_patch14_224", "ghostnet_050", "lcnet_035", "levit_128s", "mixer_s32_224", "mobilenetv4_conv_small",
    "mobilevit_xxs", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "resmlp_12_224", "resnet18",
    "rexnet_100", "skresnet18", "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224",
    "tf_efficientnetv2_b0", "tiny_vit_5m_224", "vgg11", "visformer_tiny", "vit_tiny_patch16_224", "volo_d1_224",
    "xcit_nano_12_p8_224",
)  # fmt: skip
TRANSFORMERS = (
    "bert/AutoModel", "bloom/AutoModelForCausalLM", "clip_vision_model/AutoModel",
    "distilbert/AutoModelForSequenceClassification", "gpt2/AutoModelForCausalLM", "llama/AutoModelForCausalLM",
    "mamba/AutoModelForCausalLM", "mixtral/AutoModelForCausalLM", "opt/AutoModelForCausalLM",
    "qwen3/AutoModelForSequenceClassification", "roberta/AutoModelForSequenceClassification", "t5/AutoModel",
    "vit/AutoModel", "wav2vec2/AutoModel", "whisper/AutoModel",
)  # fmt: skip


@pytest.fixture(autouse=True)
def same_numbers():
    """The checks set the global random state; it is given back."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    result = sweep_timm.check(name)
    assert result["points"] > 0 and result["params"] > 0
    assert result["copied"] > 0 or result["no_copy"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    result = sweep_transformers.check(name)
    assert result["points"] > 0
    assert result["copied"] > 0 or result["no_copy"]
    assert result["causal"] == (name.endswith("CausalLM") or name.startswith(("qwen3", "t5", "whisper")))
