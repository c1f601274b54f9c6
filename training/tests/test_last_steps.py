import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from flowturbo_training.__main__ import main
from flowturbo_training.last_steps import (
    FittedSteps,
    LastSteps,
    LastStepSettings,
    gains,
    mark_refined,
    prepare_last_steps,
    read_schedules,
    refine_end,
    train_on_last_steps,
)
from flowturbo_training.refiner import build_refiner
from flowturbo_training.sampling import velocity_of

from conftest import FIXTURES
from test_refiner import pictures  # noqa: F401
from test_run_ends import NULL, batch, tiny

SETTINGS = LastStepSettings(shift=2.0, shards=5, rows=6, held=1, reference=12, steps=120, batch=4, lr=3e-3, average=0.9)
WEIGHTS = ((-0.3, 0.0, 0.0), (-0.45, 0.1, 0.0), (-0.4, 0.1, -0.05))
SCHEDULES = [
    FittedSteps(1.0, (1.0, 0.7, 0.35, 0.0), WEIGHTS, (None, None, None)),
    FittedSteps(2.5, (1.0, 0.8, 0.4, 0.0), WEIGHTS, (3.0, 1.75, 2.75)),
    FittedSteps(2.5, (1.0, 0.6, 0.3, 0.0), WEIGHTS, (None, 2.5, None)),
]


def identity(latents):
    return latents


def test_runs_are_the_schedules_and_a_killed_preparation_goes_on(tmp_path):
    predictor, lines = tiny(), []
    prepare_last_steps(predictor, batch, NULL, SCHEDULES, tmp_path, SETTINGS, 0, lines.append)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5 and len(lines) == 5
    lost, kept = load_file(files[3]), files[0].stat()
    files[3].unlink()
    prepare_last_steps(predictor, batch, NULL, SCHEDULES, tmp_path, SETTINGS, 0, lines.append, part=(1, 2))
    assert len(lines) == 6 and files[0].stat() == kept
    again = load_file(files[3])
    assert all(torch.equal(value, lost[name]) for name, value in again.items())

    network = velocity_of(predictor)
    runs = LastSteps(tmp_path, SCHEDULES, SETTINGS, NULL, "cpu")
    assert len(runs.trained) == 3 and len(runs.held) == 2
    # The noise follows the batch in the generator; from it everything is computed here once more, each half of guidance alone.
    from flowturbo_training.state import StepRandomness

    for shard, k, steps in ((0, 0, SCHEDULES[0]), (1, 0, SCHEDULES[1]), (1, 1, SCHEDULES[2])):
        rng = StepRandomness(0, "last-steps/runs", shard)
        latents, context, pooled = batch(rng, 6)
        x = torch.randn(latents.shape, generator=rng.torch)
        known, own = [], steps.scales
        # Each step reuses the velocity before it at its own scale if both are guided, and the one before that as it was guided.
        for i, (sigma, weights) in enumerate(zip(steps.sigmas, steps.weights)):
            at = torch.full((6,), sigma)
            u = network(x, at, NULL[0].expand(6, -1, -1), NULL[1].expand(6, -1))
            c = network(x, at, context, pooled)
            known.insert(0, (u, c))
            scales = [own[i], own[i] if own[i] and own[i - 1] else own[i - 1], own[i - 2]]
            x = x + sum(w * (c if s is None else (1 - s) * u + s * c) for w, (u, c), s in zip(weights, known, scales))
        read, end, v, before, condition, _ = runs.read(runs.trained[shard], k, [4, 2])
        assert read == steps and torch.allclose(end, x[[4, 2]], atol=1e-4)
        for found, (u, c), scale in ((v, known[0], own[2]), (before, known[1], own[1])):
            expected = c[[4, 2]] if scale is None else torch.cat([u[[4, 2]], c[[4, 2]]])
            assert torch.allclose(found, expected, atol=1e-4)
        assert len(condition[0]) == len(v)


@pytest.mark.parametrize("steps", SCHEDULES)
def test_the_end_is_the_formula(steps):
    """As flowturbo launches it: x + a_in·guide(v), x' = x + a_old·guide(v) + a_new·guide(refiner + v), v extrapolated to the middle."""
    g = steps.scales[-1]
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, 8, 8), torch.randn(2 if g is None else 4, 4, 8, 8)
    before = torch.randn(2 if steps.scales[-2] is None else 4, 4, 8, 8)
    context, pooled = torch.randn(len(v), 6, 16), torch.randn(len(v), 12)
    refiner = build_refiner(tiny())
    torch.nn.init.normal_(refiner.proj_out.weight, std=0.3)
    network = velocity_of(refiner.eval().requires_grad_(False))
    guided = (lambda w: w) if g is None else (lambda w: (1 - g) * w[:2] + g * w[2:])
    last, start = steps.sigmas[2], steps.sigmas[1]
    # A pair and a single velocity have no difference.
    slope = (v - before) / (last - start) if v.shape == before.shape else torch.zeros_like(v)
    middle = v + slope * (last / 2 - last)
    a_in, a_old, a_new = last / 2, last, -last
    point = x + a_in * guided(middle)
    refined = network(torch.cat([point if g is None else torch.cat([point, point]), middle], 1), torch.full((len(v),), last / 2), context, pooled) + middle
    expected = x + a_old * guided(middle) + a_new * guided(refined)
    result = refine_end(network, x, v, before, context, pooled, steps)
    assert torch.allclose(result, expected, atol=1e-5)
    assert (result - x).abs().max() > 1e-2
    torch.nn.init.zeros_(refiner.proj_out.weight)
    assert torch.equal(refine_end(network, x, v, before, context, pooled, steps), x)


def test_training_beats_the_schedules_and_goes_on_after_a_stop(tmp_path):
    predictor, lines = tiny(), []
    prepare_last_steps(predictor, batch, NULL, SCHEDULES, tmp_path / "runs", SETTINGS, 0, lines.append)
    runs = LastSteps(tmp_path / "runs", SCHEDULES, SETTINGS, NULL, "cpu")
    torch.manual_seed(1)
    untrained = build_refiner(predictor)
    assert all(gain == 0 for gain, _ in gains(untrained, runs, identity, lines.append).values())
    unbroken = train_on_last_steps(untrained, runs, identity, tmp_path / "unbroken", SETTINGS, 0, lines.append)
    assert float(lines[-1].split("= ")[1].split(" of")[0]) < 0.8, lines[-3:]
    measured = gains(unbroken, runs, identity, lines.append, batch=4)
    assert set(measured) == set(SCHEDULES) and all(gain > interval > 0 for gain, interval in measured.values()), measured

    class Killed(Exception):
        pass

    def until_100(line):
        if "step 100/" in line:
            raise Killed

    torch.manual_seed(1)
    with pytest.raises(Killed):
        train_on_last_steps(build_refiner(predictor), runs, identity, tmp_path / "parts", SETTINGS, 0, until_100, save_every=40)
    again = train_on_last_steps(build_refiner(predictor), runs, identity, tmp_path / "parts", SETTINGS, 0, lines.append)
    for (name, a), b in zip(unbroken.state_dict().items(), again.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-6), name
    with pytest.raises(ValueError, match="made for other schedules"):
        LastSteps(tmp_path / "runs", SCHEDULES[:2], SETTINGS, NULL, "cpu")


def entry(**changes):
    steps = {"guidanceScale": 2.5, "guided": [True] * 3, "rows": 6, "sigmas": [1, 0.8, 0.4, 0], "weights": [list(w) for w in WEIGHTS]}
    return {"width": 64, "height": 64, **steps, **changes}


def test_schedules_are_read_and_marked(tmp_path):
    file = tmp_path / "schedules.json"
    with pytest.raises(ValueError, match="flowturbo calibrate"):
        read_schedules(file, 64, 64)
    others = [entry(width=128, refined=True), entry(sigmas=[0.9, 0.8, 0.4, 0])]
    content = {"version": 1, "model": "m", "ladder": ["H1P4"], "calibrated": [
        entry(scales=[1.2, 0.7, 1.1]), *others, entry(sigmas=[1, 0.6, 0.3, 0], guided=[False, True, False]),
    ]}  # fmt: skip
    file.write_text(json.dumps(content))
    assert read_schedules(file, 64, 64) == SCHEDULES[1:]
    with pytest.raises(ValueError, match="32 x 32"):
        read_schedules(file, 32, 32)
    mark_refined(file, 64, 64, {SCHEDULES[1]: True, SCHEDULES[2]: False})
    content["calibrated"][0]["refined"], content["calibrated"][-1]["refined"] = True, False
    # That of another size was of another refiner.
    del content["calibrated"][1]["refined"]
    assert json.loads(file.read_text()) == content


def test_from_the_command_line(pictures, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "medium" / "model", model)
    shutil.rmtree(model / "refiner", ignore_errors=True)
    common = ["refiner", "--model", str(model), "--size", "64", "--batch", "2", "--steps", "2", "--precision", "no", "--cpu", "--images", str(pictures)]
    last = ["--last-steps", "16", "--last-steps-for", "3", "--last-steps-batch", "2"]
    assert main([*common, *last]) == 1
    assert "flowturbo calibrate" in capsys.readouterr().err and not (model / "refiner").exists()
    (model / "schedules.json").write_text(json.dumps({"version": 1, "model": "m", "calibrated": [entry()]}))
    assert main([*common, *last]) == 0
    printed = capsys.readouterr().out
    assert "shard 3 of 3" in printed and "last-steps step 3/3" in printed and "8 runs kept apart" in printed
    (marked,) = json.loads((model / "schedules.json").read_text())["calibrated"]
    assert marked.pop("refined") in (True, False) and marked == entry()
    weights = load_file(model / "refiner/diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())
    # A refiner that was not trained for them takes the marks away.
    assert main(common) == 0
    assert json.loads((model / "schedules.json").read_text())["calibrated"] == [entry()]
