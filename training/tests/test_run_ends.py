import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from flowturbo_training.refiner import build_refiner
from flowturbo_training.sampling import run_blocks, sample, shifted_sigmas, velocity_of
from flowturbo_training.run_ends import RunEndSettings, prepare_run_ends, train_on_run_ends

SETTINGS = RunEndSettings(
    shift=2.0, guidance=(1.0, 2.0), shards=4, rows=6, schedules=2, predicted=(1, 2), refined=(1, 2), reference=6, edited=0.5,
    steps=120, batch=4, lr=3e-3, average=0.9,
)  # fmt: skip


def tiny():
    torch.manual_seed(0)
    predictor = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=12, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    with torch.no_grad():
        predictor.proj_out.weight *= 3
    return predictor.eval().requires_grad_(False)


def batch(rng, rows):
    g = rng.torch
    return torch.randn(rows, 4, 8, 8, generator=g), torch.randn(rows, 6, 16, generator=g), torch.randn(rows, 12, generator=g)


NULL = (torch.full((1, 6, 16), 0.3), torch.full((1, 12), -0.2))


def test_a_run_goes_on_from_its_state_and_cache():
    """The H and P blocks, then the R blocks from what they leave, are the whole run, with and without guidance."""
    predictor = tiny()
    refiner = build_refiner(predictor)
    torch.nn.init.normal_(refiner.proj_out.weight, std=0.1)
    networks = velocity_of(predictor), velocity_of(refiner.eval().requires_grad_(False))
    noise, context, pooled = torch.randn(3, 4, 8, 8), torch.randn(6, 6, 16), torch.randn(6, 12)
    sigmas = shifted_sigmas(5, 2.0)
    for guidance in (1.0, 2.5):
        unbroken = sample(networks[0], noise, context, pooled, blocks="HPPRR", sigmas=sigmas, guidance=guidance, refiner=networks[1])
        x, cache = run_blocks(networks[0], noise, None, context, pooled, blocks="HPP", sigmas=sigmas[:4], guidance=guidance)
        x, _ = run_blocks(None, x, cache, context, pooled, blocks="RR", sigmas=sigmas[3:], guidance=guidance, refiner=networks[1])
        assert torch.allclose(x, unbroken, atol=1e-6)


def read(file):
    with safe_open(file, "pt") as opened:
        return load_file(file), opened.metadata()


def test_runs_are_the_samplers_and_a_killed_preparation_goes_on(tmp_path):
    predictor, lines = tiny(), []
    prepare_run_ends(predictor, batch, NULL, tmp_path, SETTINGS, 0, lines.append)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4 and len(lines) == 4
    lost, kept = read(files[2]), files[0].stat()
    files[2].unlink()
    prepare_run_ends(predictor, batch, NULL, tmp_path, SETTINGS, 0, lines.append, part=(0, 2))
    assert len(lines) == 5 and files[0].stat() == kept
    again = read(files[2])
    assert again[1] == lost[1] and all(torch.equal(value, lost[0][name]) for name, value in again[0].items())

    for file in files:
        values, note = read(file)
        guidance, ends = json.loads(note["guidance"]), json.loads(note["ends"])
        condition = [torch.cat([n.expand_as(v), v]) for n, v in zip(NULL, (values["context"], values["pooled"]))]
        for k, end in enumerate(ends):
            assert len(end["sigmas"]) == len(end["blocks"]) + 1 and end["sigmas"][-1] == 0
            x, cache = values[f"x.{k}"], values[f"cache.{k}"].transpose(0, 1).flatten(0, 1)
            assert len(cache) == (6 if guidance == 1 else 12)
            # What an R block that reuses makes of them: x + (sigma' - sigma)·v, v guided.
            landed, _ = run_blocks(None, x, cache, *condition, **end, guidance=guidance)
            v = cache if guidance == 1 else cache[:6] + guidance * (cache[6:] - cache[:6])
            assert torch.allclose(landed, x - end["sigmas"][0] * v, atol=1e-5)
            # A few long steps come near where many land.
            assert (landed - values["reference"]).norm() < 0.5 * (x - values["reference"]).norm()


def test_training_on_runs_beats_reuse_and_goes_on_after_a_stop(tmp_path):
    predictor, lines = tiny(), []
    prepare_run_ends(predictor, batch, NULL, tmp_path / "runs", SETTINGS, 0, lines.append)
    torch.manual_seed(1)
    unbroken = train_on_run_ends(build_refiner(predictor), NULL, tmp_path / "runs", tmp_path / "unbroken", SETTINGS, 0, lines.append)
    assert float(lines[-1].split("= ")[1].split(" of")[0]) < 0.8, lines[-3:]

    class Killed(Exception):
        pass

    def until_100(line):
        if "step 100/" in line:
            raise Killed

    torch.manual_seed(1)
    refiner = build_refiner(predictor)
    with pytest.raises(Killed):
        train_on_run_ends(refiner, NULL, tmp_path / "runs", tmp_path / "parts", SETTINGS, 0, until_100, save_every=40)
    again = train_on_run_ends(build_refiner(predictor), NULL, tmp_path / "runs", tmp_path / "parts", SETTINGS, 0, lines.append)
    for (name, a), b in zip(unbroken.state_dict().items(), again.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-6), name
