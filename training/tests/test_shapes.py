import json
import os
import signal
import subprocess
import sys
import time

import torch
from diffusers import StableDiffusion3Pipeline

from flowturbo_training.features import Features, accuracy, train_features
from flowturbo_training.predictor import build_transformer, position_table, PredictorShape, with_larger_table
from flowturbo_training.state import Stage
from flowturbo_training.vae import ideal_latents
from flowturbo_training.world import draw_scenes, render


def test_one_command_writes_a_model_and_goes_on_after_a_kill(tmp_path):
    out = tmp_path / "model"
    command = [sys.executable, "-m", "flowturbo_training", "shapes", "--out", str(out), "--scale", "0.003", "--no-compile"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "model.state/vae.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    subprocess.run(command, check=True, env={**os.environ})

    pipeline = StableDiffusion3Pipeline.from_pretrained(out, torch_dtype=torch.float32)
    result = pipeline("a red circle", num_inference_steps=2, height=64, width=64, guidance_scale=2.0, max_sequence_length=16)
    assert result.images[0].size == (64, 64)
    assert json.loads((out / "refiner/config.json").read_text())["in_channels"] == 6
    assert sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) <= 20e6
    card = (out / "README.md").read_text()
    assert "| 64 px HPPPPPPPPP | 8 |" in card and "M parameters" in card


def test_a_larger_table_draws_the_same():
    torch.manual_seed(0)
    model = build_transformer(PredictorShape(layers=1, heads=2, context_width=32, pooled_width=32)).eval()
    torch.nn.init.normal_(model.proj_out.weight)
    larger = with_larger_table(model, 32)
    inputs = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.randn(1, 4, 32),
              "pooled_projections": torch.randn(1, 32), "return_dict": False}  # fmt: skip
    with torch.no_grad():
        for side in (16, 32):
            x = torch.randn(1, 3, side, side)
            assert torch.allclose(model(x, **inputs)[0], larger(x, **inputs)[0], atol=1e-6)
    table = position_table(64, 16)[0]
    assert (table[:, None] - table[None]).norm(dim=-1).add(torch.eye(256) * 9).min() > 0.05  # no two places alike


def test_latents_are_of_unit_size():
    latents = ideal_latents(render(draw_scenes(9, 600), 64))
    assert abs(float(latents.mean())) < 0.15 and abs(float(latents.std()) - 1) < 0.25


def test_features_learn(tmp_path):
    torch.manual_seed(0)
    model = Features()
    train_features(model, Stage(tmp_path, "features", 20), 0, lambda _: None)
    result = accuracy(model, 200)
    assert result["ground"] > 0.6, result
