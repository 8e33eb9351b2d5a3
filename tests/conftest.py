"""Settings and fixtures of all tests: quiet, deterministic and offline."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start, too
sys.path.insert(
    0, str(Path(__file__).parent)
)  # helper modules such as `broken` are imported by name

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from transformers import LlavaNextForConditionalGeneration, SiglipVisionConfig

from tokenprune.adapter import adapter_of
from tokenprune.models.llava_next import LlavaNext
from tokenprune.testing.host import Host

settings.register_profile(
    "tokenprune",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tokenprune")
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads slow models of this size down, and results must not depend on them."""
    torch.set_num_threads(1)


@pytest.fixture
def host() -> Host:
    """A new tiny LLaVA-NeXT, which a test may damage."""
    return Host.tiny("LLaVA-NeXT")


@pytest.fixture
def siglip() -> Host:
    """A tiny LLaVA-NeXT with a SigLIP vision encoder, which has no CLS token."""
    torch.manual_seed(0)
    config = LlavaNext.tiny().config
    config.vision_config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=12,
        patch_size=3,
        initializer_range=0.3,
    )
    config.vision_feature_select_strategy = "full"
    return Host(adapter_of(LlavaNextForConditionalGeneration(config).eval()))
