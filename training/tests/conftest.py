import json
from pathlib import Path

import pytest
import torch

FIXTURES = Path(__file__).parents[2] / "test" / "fixtures"

torch.set_num_threads(2)


@pytest.fixture
def fixture_model():
    return FIXTURES / "medium" / "model"


MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
"""stabilityai/stable-diffusion-3.5-medium's transformer/config.json."""
LARGE = {
    **MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}  # fmt: skip
"""stabilityai/stable-diffusion-3.5-large's."""


@pytest.fixture
def config_file(tmp_path):
    def write(config):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return path

    return write
