import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from flowturbo_training.__main__ import main
from flowturbo_training.refiner import RefinerSettings, build_refiner, draw_times, refiner_loss, train_refiner
from flowturbo_training.state import StepRandomness
from flowturbo_training.world import draw_scenes, render
from PIL import Image

from conftest import FIXTURES, LARGE, MEDIUM


def test_the_requirements_of_medium_and_large(capsys, config_file):
    for config, parameters in ((MEDIUM, 2243), (LARGE, 8056)):
        assert main(["refiner", "--model", str(config_file(config)), "--dry-run"]) == 0
        printed = capsys.readouterr().out
        # 2.24 and 8.06 billion: what the published models have.
        assert f"predictor: {parameters}" in printed, printed
        share = float(printed.split(" M parameters, ")[1].split("%")[0])
        assert 0 < share <= 5, printed
        assert "memory:" in printed and "disk:" in printed


def test_the_table_of_the_readme(capsys, config_file):
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| SD3")]
    assert len(rows) == 5
    configs = {"SD3-medium": {**MEDIUM, "dual_attention_layers": [], "qk_norm": None, "pos_embed_max_size": 192},
               "SD3.5-medium": MEDIUM, "SD3.5-large": LARGE}  # fmt: skip
    for name, predictor, refiner, share, *figures in rows:
        model, _, layers = name.replace("`", "").partition(", --layers ")
        assert main(["refiner", "--model", str(config_file(configs[model])), "--dry-run", "--layers", layers or "1"]) == 0
        printed = capsys.readouterr().out
        assert f"predictor: {predictor} parameters" in printed, (name, printed)
        assert f"refiner: {refiner} parameters, {share} of" in printed, (name, printed)
        weights, training, activations, memory, disk = figures
        assert f"memory: {weights} GB predictor + {training} GB refiner" in printed, (name, printed)
        assert f"about {activations} GB activations = {memory} GB" in printed and f"{disk} GB for 1,000" in printed, (name, printed)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (scene, pixels) in enumerate(zip(draw_scenes(1, 12), render(draw_scenes(1, 12), 80))):
        image = Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.caption)
    return folder


@pytest.mark.parametrize("name", ["sd3", "medium", "large"])
def test_from_pictures_to_a_refiner_and_on_after_a_stop(name, pictures, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / name / "model", model)
    shutil.rmtree(model / "refiner", ignore_errors=True)
    common = ["refiner", "--model", str(model), "--size", "64", "--batch", "4", "--lr", "1e-3", "--precision", "no", "--cpu"]
    common += ["--average", "0.9", "--clip", "1"]
    assert main([*common, "--images", str(pictures), "--steps", "6"]) == 0
    config = json.loads((model / "refiner/config.json").read_text())
    predictor = json.loads((model / "transformer/config.json").read_text())
    assert config["in_channels"] == 2 * predictor["in_channels"]
    assert config["out_channels"] == predictor["in_channels"] and config["num_layers"] == 1
    weights = load_file(model / "refiner/diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert weights["proj_out.weight"].abs().sum() > 0

    # The cache of the first run is the second's data; the state goes on.
    capsys.readouterr()
    cache = model / "refiner.state/cache"
    assert main([*common, "--latents", str(cache), "--steps", "9"]) == 0
    assert "going on at step 6" in capsys.readouterr().out
    after = load_file(model / "refiner/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(weights[k], after[k]) for k in weights)

    # Then on the ends of runs of the sampler, at two guidance scales.
    runs = ["--runs", "10", "--runs-guidance", "1,3", "--runs-steps", "3", "--runs-batch", "2"]
    assert main([*common, "--latents", str(cache), "--steps", "9", *runs]) == 0
    printed = capsys.readouterr().out
    assert "shard 2 of 2" in printed and "run-ends step 3/3" in printed
    landing = load_file(model / "refiner/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(landing[k], after[k]) for k in weights) and all(torch.isfinite(w).all() for w in landing.values())

    # A trained refiner is where another training begins: no steps of it leave the weights as they are.
    again = ["--init", "trained", "--steps", "0", "--out", str(tmp_path / "again")]
    assert main([*common, "--latents", str(cache), *again]) == 0
    kept = load_file(tmp_path / "again/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(landing[k], kept[k]) for k in weights)


def test_a_dataset_on_disk(pictures, tmp_path, fixture_model, capsys):
    datasets = pytest.importorskip("datasets")
    files = sorted(pictures.glob("*.png"))
    data = datasets.Dataset.from_dict(
        {"picture": [str(f) for f in files], "words": [f.with_suffix(".txt").read_text() for f in files]}
    ).cast_column("picture", datasets.Image())
    data.save_to_disk(tmp_path / "data")
    command = ["refiner", "--model", str(fixture_model), "--dataset", str(tmp_path / "data"), "--size", "64", "--steps", "2"]
    command += ["--batch", "2", "--precision", "no", "--cpu", "--limit", "5", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert 'no column "image": it has picture, words' in capsys.readouterr().err
    assert main([*command, "--image-column", "picture", "--caption-column", "words"]) == 0
    assert (tmp_path / "out/config.json").exists()


def tiny(**other):
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
             "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 16, "caption_projection_dim": 32,
             "pooled_projection_dim": 12, "pos_embed_max_size": 8, "qk_norm": "rms_norm"}  # fmt: skip
    return SD3Transformer2DModel(**{**sizes, **other})


def batch(rng, rows):
    g = rng.torch
    return torch.randn(rows, 4, 16, 16, generator=g), torch.randn(rows, 6, 16, generator=g), torch.randn(rows, 12, generator=g)


def test_an_untrained_refiner_keeps_the_velocity():
    predictor = tiny()
    for kind, heads in (("block", None), ("fresh", 2)):
        refiner = build_refiner(predictor, initialise_from=kind, heads=heads)
        loss, reuse = refiner_loss(predictor, refiner, *batch(StepRandomness(0, "a", 0), 3), StepRandomness(0, "b", 0), RefinerSettings())
        assert torch.equal(loss, reuse) and loss > 0


def test_a_block_is_copied_and_the_velocity_comes_unseen():
    predictor = tiny(dual_attention_layers=(1,))
    refiner = build_refiner(predictor)
    own, theirs = refiner.state_dict(), predictor.state_dict()
    assert torch.equal(own["transformer_blocks.0.attn.to_q.weight"], theirs["transformer_blocks.1.attn.to_q.weight"])
    assert torch.equal(own["transformer_blocks.0.attn2.to_q.weight"], theirs["transformer_blocks.1.attn2.to_q.weight"])
    assert torch.equal(own["pos_embed.proj.weight"][:, :4], theirs["pos_embed.proj.weight"])
    assert own["pos_embed.proj.weight"][:, 4:].abs().sum() == 0


def test_times_stay_on_the_trajectory():
    settings = RefinerSettings(schedules=[(10, 3.0)], schedule_share=0.5)
    now, then = draw_times(StepRandomness(0, "t", 0), 4000, settings)
    assert (then <= now).all() and (then >= 0).all() and (now <= 1).all()
    longest = float((now - then).max())
    # The last step of the schedule of 10 with shift 3 is .25, outside the paper's range.
    assert abs(longest - 0.25) < 1e-6
    now, then = draw_times(StepRandomness(0, "t", 0), 4000, RefinerSettings(schedule_share=0))
    assert float((now - then).max()) <= 0.12


class Known(torch.nn.Module):
    """A predictor that is a known function: x·(1 + t) + the mean of the pooled vector."""

    dtype = torch.float32

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        t = (timestep / 1000)[:, None, None, None]
        return (hidden_states[:, :4] * (1 + t) + pooled_projections.mean(1)[:, None, None, None],)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_loss_is_the_formula(share):
    """Against a direct transcription."""
    known = Known()
    latents, context, pooled = batch(StepRandomness(0, "d", 0), 5)
    settings = RefinerSettings(same_point_share=share)
    loss, reuse = refiner_loss(known, known, latents, context, pooled, StepRandomness(3, "l", 0), settings)
    rng = StepRandomness(3, "l", 0)
    now, then = (v[:, None, None, None] for v in draw_times(rng, 5, settings))
    noise = torch.randn(latents.shape, generator=rng.torch)
    c = pooled.mean(1)[:, None, None, None]
    x = (1 - now) * latents + now * noise
    v = x * (1 + now) + c
    euler = x + (then - now) * v
    target = euler * (1 + then) + c
    if share == 1:
        state = x + (then - now) / 2 * (v + target)
        v, target = target, state * (1 + then) + c
    else:
        state = euler
    offset = state * (1 + then) + c
    assert torch.allclose(loss, ((target - v - offset) ** 2).mean(), rtol=1e-5)
    assert torch.allclose(reuse, ((target - v) ** 2).mean(), rtol=1e-5)


def test_the_last_step_lands_where_the_predictor_lands():
    """A refiner that answers the loss with zero makes the corrected step end where m Euler steps end."""
    latents, context, pooled = batch(StepRandomness(0, "d", 0), 3)
    settings = RefinerSettings(schedules=[(3, 2.0)], schedule_share=1, last_intervals=1, landing_steps=3, same_point_share=1)
    now, then = draw_times(StepRandomness(3, "l", 0), 3, settings)
    assert (then == 0).all() and torch.allclose(now, torch.tensor(0.5))
    rng = StepRandomness(3, "l", 0)
    draw_times(rng, 3, settings)
    x = 0.5 * latents + 0.5 * torch.randn(latents.shape, generator=rng.torch)
    c = pooled.mean(1)[:, None, None, None]
    v = x * 1.5 + c
    landed = x
    for t in (1 / 2, 1 / 3, 1 / 6):
        landed = landed - (landed * (1 + t) + c) / 6

    def perfect(hidden_states, **_):
        assert torch.allclose(hidden_states, torch.cat([x - v / 2, v], 1), atol=1e-6)
        velocity = 2 * (x - landed) / 0.5 - v
        assert torch.allclose(x - 0.5 / 2 * (v + velocity), landed, atol=1e-5)
        return (velocity - v,)

    loss, reuse = refiner_loss(Known(), perfect, latents, context, pooled, StepRandomness(3, "l", 0), settings)
    assert loss < 1e-8 < reuse


def test_a_tail_is_the_end_of_the_grid():
    settings = RefinerSettings(schedules=[(10, 3.0)], schedule_share=1, last_intervals=2)
    now, _ = draw_times(StepRandomness(0, "t", 0), 200, settings)
    assert sorted({round(float(t), 3) for t in now}) == [0.25, 0.429]


def test_training_beats_reuse(tmp_path):
    predictor = tiny()
    with torch.no_grad():
        predictor.proj_out.weight *= 3
    lines = []
    settings = RefinerSettings(steps=150, batch=8, lr=3e-3, clip=1.0, average=0.9, delta_max=0.3)
    train_refiner(predictor, build_refiner(predictor), batch, tmp_path, settings, 0, lines.append, checkpointing=True)
    assert float(lines[-1].split("= ")[1].split(" of")[0]) < 0.7, lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--images", "x"], "no transformer/config.json there"),
        (["--model", "MODEL"], "Expected the data"),
        (["--model", "MODEL", "--images", "EMPTY", "--cpu"], "no captioned pictures"),
        (["--model", "MODEL", "--latents", "EMPTY", "--cpu"], "no cached latents"),
        (["--model", "MODEL", "--images", "PICTURES", "--size", "60", "--cpu"], "to be a multiple of"),
        (["--model", "MODEL", "--images", "PICTURES", "--heads", "1", "--cpu", "--size", "64"], "use --init fresh"),
    ],
)
def test_bad_input(arguments, message, tmp_path, fixture_model, pictures, capsys):
    (tmp_path / "empty").mkdir()
    names = {"MODEL": str(fixture_model), "EMPTY": str(tmp_path / "empty"), "PICTURES": str(pictures)}
    command = ["refiner", *[names.get(a, a) for a in arguments], "--out", str(tmp_path / "out"), "--precision", "no"]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
