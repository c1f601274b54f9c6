import os
import signal
import subprocess
import sys
import time

import torch

from flowturbo_training.state import Average, Stage, StepRandomness

SCRIPT = """
import sys, torch
from pathlib import Path
from flowturbo_training.state import Average, Stage, StepRandomness
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
average = Average(model, 0.9)
stage = Stage(Path(sys.argv[1]), "part", 1e9, save_every=0)
stage.track(model=model, optimiser=optimiser, average=average)
while stage.step < 3000:
    rng = StepRandomness(7, stage.name, stage.step)
    x = torch.randn(8, 4, generator=rng.torch)
    (model(x) - x.flip(1)).square().mean().backward()
    optimiser.step(); optimiser.zero_grad()
    average.update(stage.step)
    stage.tick()
stage.finish()
"""


def run(folder, kill_after=None):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env={**os.environ})
    if kill_after is None:
        assert process.wait() == 0
        return
    deadline = time.monotonic() + 60
    while not (folder / "part.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(kill_after)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path):
    run(tmp_path / "unbroken")
    for wait in (0.1, 0.45):
        run(tmp_path / "broken", kill_after=wait)
    run(tmp_path / "broken")
    unbroken, broken = (torch.load(tmp_path / name / "part.pt", weights_only=True) for name in ("unbroken", "broken"))
    assert unbroken["step"] == broken["step"] == 3000 and broken["done"]
    for kind in ("model", "average"):
        for name, value in unbroken["objects"][kind].items():
            assert torch.equal(value, broken["objects"][kind][name]), (kind, name)


def test_averages_change_places():
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    average = Average(model, 0.5)
    with torch.no_grad():
        model.weight += 1
    average.swap()
    assert torch.equal(model.weight, before)
    average.swap()
    assert torch.equal(model.weight, before + 1)


def test_steps_have_their_own_randomness():
    first, again, other = StepRandomness(1, "a", 5), StepRandomness(1, "a", 5), StepRandomness(1, "a", 6)
    draws = [torch.randn(3, generator=r.torch) for r in (first, again, other)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_budget_ends(tmp_path):
    stage = Stage(tmp_path, "short", 0.2)
    stage.track()
    x = torch.randn(200, 200)
    while stage.tick():
        x = x @ x / 200
    assert stage.done and Stage(tmp_path, "short", 0.2).done
