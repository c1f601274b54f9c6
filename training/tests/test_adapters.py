import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel, StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from flowturbo_training.__main__ import main
from flowturbo_training.adapters import load_transformer
from flowturbo_training.controlnet import build_controlnet, residuals_of, train_controlnet
from flowturbo_training.flow import FlowSettings, draw_sigmas, flow_loss
from flowturbo_training.lora import LoraSettings, add_lora, save_lora, train_lora
from flowturbo_training.state import StepRandomness
from flowturbo_training.styles import to_image
from flowturbo_training.world import draw_scenes, render

SHAPES = Path(__file__).parents[2] / "models" / "shapes"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    scenes = draw_scenes(1, 10)
    for i, (scene, pixels) in enumerate(zip(scenes, render(scenes, 80))):
        to_image(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.caption)
    return folder


def tiny(**other):
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
             "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 16, "caption_projection_dim": 32,
             "pooled_projection_dim": 12, "pos_embed_max_size": 8, "qk_norm": "rms_norm"}  # fmt: skip
    return SD3Transformer2DModel(**{**sizes, **other})


def batch(rng, rows):
    """Latents that are all alike: what noise they hold can be learnt."""
    g = rng.torch
    return torch.full((rows, 4, 8, 8), 0.7), torch.randn(rows, 6, 16, generator=g), torch.randn(rows, 12, generator=g)


def controlled(rng, rows):
    """Latents that the control latents tell."""
    _, *text = batch(rng, rows)
    control = torch.randn(rows, 4, 1, 1, generator=rng.torch).expand(-1, -1, 8, 8)
    return control, *text, control


def without_t5(model):
    """SD3 without T5 has to be asked for."""
    return {} if (model / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}


SETTINGS = FlowSettings(shift=3.0, steps=60, batch=8, lr=1e-2, warm_up=5, average=0.9)


def test_the_loss_is_the_formula():
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    loss = flow_loss(lambda x, sigma: x * sigma[:, None, None, None], latents, StepRandomness(3, "l", 0), SETTINGS)
    rng = StepRandomness(3, "l", 0)
    sigma = draw_sigmas(rng, 5, SETTINGS)[:, None, None, None]
    noise = torch.randn(latents.shape, generator=rng.torch)
    x = latents + sigma * (noise - latents)
    assert torch.allclose(loss, (sigma * x - noise + latents).square().mean(), rtol=1e-5)


def test_noise_levels_are_logit_normal_about_the_shifted_middle():
    sigma = draw_sigmas(StepRandomness(0, "s", 0), 20_000, FlowSettings(shift=3.0, logit_mean=0.5, logit_std=0.8))
    logits = torch.logit(sigma)
    # The shift adds its logarithm.
    assert abs(float(logits.mean()) - 0.5 - torch.tensor(3.0).log()) < 0.02 and abs(float(logits.std()) - 0.8) < 0.02


def test_a_lora_learns_and_leaves_the_model_alone(tmp_path):
    transformer = tiny()
    before = {k: v.clone() for k, v in transformer.state_dict().items()}
    add_lora(transformer, LoraSettings(rank=4, targets=["attention", "feed-forward"]))
    without, with_lora = train_lora(transformer, batch, batch, tmp_path, SETTINGS, 0, lambda _: None, checkpointing=True)
    assert with_lora < 0.8 * without
    after = transformer.state_dict()
    for name, value in before.items():
        found = after.get(name, after.get(name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")))
        assert torch.equal(found, value), name
    # The state holds what was trained, and not the model.
    stored = torch.load(tmp_path / "lora.pt", weights_only=True)["model"]
    assert stored and all("lora_" in name for name in stored)


class Stopped(Exception):
    pass


def stopping(source, after):
    calls = []

    def limited(rng, rows):
        calls.append(rng)
        if len(calls) > after:
            raise Stopped
        return source(rng, rows)

    return limited


@pytest.mark.parametrize("kind", ["lora", "controlnet"])
def test_a_stopped_training_ends_where_an_unbroken_one_does(kind, tmp_path):
    settings = FlowSettings(shift=3.0, steps=8, batch=2, lr=1e-2, warm_up=2, average=0.9)

    def train(state, source):
        transformer = tiny()
        if kind == "lora":
            network, data = add_lora(transformer, LoraSettings(rank=2)), batch
            train_lora(network, source or data, data, state, settings, 0, lambda _: None, save_every=3)
        else:
            network, data = build_controlnet(transformer, 2), controlled
            train_controlnet(transformer, network, source or data, data, state, settings, 0, lambda _: None, save_every=3)
        return {k: p.detach().clone() for k, p in network.named_parameters() if p.requires_grad}

    unbroken = train(tmp_path / "unbroken", None)
    with pytest.raises(Stopped):
        train(tmp_path / "broken", stopping(batch if kind == "lora" else controlled, 5))
    broken = train(tmp_path / "broken", None)
    assert unbroken and all(torch.equal(value, broken[name]) for name, value in unbroken.items())


def test_a_state_of_another_lora_is_refused(tmp_path):
    settings = FlowSettings(shift=3.0, steps=1, batch=2)
    train_lora(add_lora(tiny(), LoraSettings(rank=2)), batch, batch, tmp_path, settings, 0, lambda _: None)
    with pytest.raises(ValueError, match="the state of another training"):
        train_lora(add_lora(tiny(), LoraSettings(rank=4)), batch, batch, tmp_path, settings, 0, lambda _: None)


def test_the_file_is_what_diffusers_reads(tmp_path):
    pipeline = StableDiffusion3Pipeline.from_pretrained(SHAPES, torch_dtype=torch.float32)
    transformer = add_lora(load_transformer(SHAPES, torch.float32), LoraSettings(rank=4, alpha=2, targets=["attention", "ff.net.2"]))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    save_lora(transformer, tmp_path / "a.safetensors", torch.float32)
    # Often enough that an order left to chance would show.
    for _ in range(8):
        save_lora(transformer, tmp_path / "b.safetensors", torch.float32)
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names, metadata = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
        down = file.get_tensor("transformer.transformer_blocks.0.attn.to_q.lora_A.weight")
        up = file.get_tensor("transformer.transformer_blocks.0.ff.net.2.lora_B.weight")
    assert down.shape == (4, 192) and up.shape == (192, 4)
    assert metadata["transformer.r"] == 4 and metadata["transformer.lora_alpha"] == 2
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)
    assert not any("ff_context" in name for name in names) and any("add_k_proj" in name for name in names)

    # The pipeline with the file draws what the trained transformer draws.
    inputs = {"hidden_states": torch.randn(1, 3, 16, 16), "timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.randn(1, 32, 192),
              "pooled_projections": torch.randn(1, 192), "return_dict": False}  # fmt: skip
    with torch.no_grad():
        own = transformer(**inputs)[0]
        plain = pipeline.transformer(**inputs)[0]
        pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
        loaded = pipeline.transformer(**inputs)[0]
    assert torch.allclose(own, loaded, atol=1e-5) and (own - plain).abs().max() > 0.01


def test_a_controlnet_starts_as_nothing_and_learns_its_control(tmp_path):
    transformer = tiny(dual_attention_layers=(0, 1))
    controlnet = build_controlnet(transformer, 1)
    # diffusers' from_transformer would have left other numbers in the transformer's configuration.
    assert transformer.config.num_layers == 3 and "extra_conditioning_channels" not in transformer.config
    assert controlnet.config.num_layers == 1 and controlnet.config.dual_attention_layers == (0,) and controlnet.config.extra_conditioning_channels == 0
    assert torch.equal(controlnet.transformer_blocks[0].attn2.to_q.weight, transformer.transformer_blocks[0].attn2.to_q.weight)
    latents, context, pooled, control = controlled(StepRandomness(0, "c", 0), 2)
    residuals = residuals_of(controlnet, control, context, pooled)(latents, torch.tensor([0.5, 0.2]))
    assert len(residuals) == 1 and not residuals[0].any()
    without, with_control = train_controlnet(transformer, controlnet, controlled, controlled, tmp_path, SETTINGS, 0, lambda _: None, checkpointing=True)
    assert with_control < 0.8 * without


@pytest.mark.parametrize("name", ["sd3", "medium", "large"])
def test_from_pictures_to_a_lora(name, pictures, tmp_path, capsys):
    model = Path(__file__).parents[2] / "test/fixtures" / name / "model"
    out = tmp_path / "style.safetensors"
    command = ["lora", "--model", str(model), "--out", str(out), "--batch", "2", "--precision", "no", "--cpu", "--rank", "2", "--max-sequence-length", "32"]
    assert main([*command, "--images", str(pictures), "--size", "64,96", "--held", "2", "--steps", "3", "--gradient-checkpointing", "--trigger", "flat shapes"]) == 0
    weights = load_file(out)
    assert all(torch.isfinite(w).all() and w.dtype == torch.float16 for w in weights.values())
    assert any(w.any() for n, w in weights.items() if "lora_B" in n)
    card = out.with_suffix(".md").read_text()
    assert "16 pictures with captions, `pictures`" in card and "`flat shapes`" in card and str(tmp_path) not in card
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=torch.float32, **without_t5(model))
    pipeline.load_lora_weights(tmp_path, weight_name=out.name)
    assert {p.name for p in (tmp_path / "style.safetensors.state/cache").iterdir()} == {"64", "96", "held-64", "held-96"}

    # The cache of the first training is the second's data; the state goes on.
    capsys.readouterr()
    assert main([*command, "--latents", str(tmp_path / "style.safetensors.state/cache"), "--steps", "4"]) == 0
    assert "going on at step 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd3", "medium"])
def test_from_pictures_to_a_controlnet(name, pictures, tmp_path):
    model = Path(__file__).parents[2] / "test/fixtures" / name / "model"
    controls = tmp_path / "controls"
    controls.mkdir()
    for file in pictures.glob("*.png"):
        Image.open(file).convert("L").save(controls / f"{file.stem}.webp")
    out = tmp_path / "control"
    command = ["controlnet", "--model", str(model), "--out", str(out), "--batch", "2", "--precision", "no", "--cpu", "--size", "64", "--layers", "1"]
    command += ["--images", str(pictures), "--steps", "3", "--max-sequence-length", "32", "--dtype", "float32"]
    assert main([*command, "--conditions", str(controls)]) == 0
    assert "A ControlNet" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["_class_name"] == "SD3ControlNetModel" and config["num_layers"] == 1 and config["force_zeros_for_pooled_projection"] is True
    assert str(tmp_path.anchor) not in config.get("_name_or_path", "")
    controlnet = SD3ControlNetModel.from_pretrained(out)
    assert controlnet.pos_embed_input.proj.weight.any() and controlnet.controlnet_blocks[0].weight.any()
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(model, controlnet=controlnet, torch_dtype=torch.float32, **without_t5(model))
    result = pipeline("a dog", control_image=Image.new("RGB", (64, 64)), height=64, width=64, num_inference_steps=2, max_sequence_length=32)
    assert result.images[0].size == (64, 64)
    # Edges instead, which is another cache.
    assert main([*command, "--canny"]) == 1
    assert main([*command, "--canny", "--state", str(tmp_path / "other")]) == 0


def test_both_for_the_shapes_model(tmp_path, capsys):
    common = ["--model", str(SHAPES), "--cpu", "--precision", "no", "--size", "64,128", "--limit", "8", "--held", "4", "--steps", "2", "--batch", "4", "--trial", "4"]
    assert main(["lora", *common, "--shapes", "outlined", "--out", str(tmp_path / "a.safetensors"), "--rank", "2"]) == 0
    assert main(["controlnet", *common, "--shapes", "--out", str(tmp_path / "control"), "--layers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "128 px, with: outlined" in printed and "128 px, with: " in printed.split("controlnet step")[1]
    assert "| 64 px, without | 0.000 |" in (tmp_path / "a.md").read_text()
    assert "edges (F1)" in (tmp_path / "control/README.md").read_text()


OVERFLOW = ("--lr", "1e30", "--warm-up", "1", "--batch", "1", "--limit", "2", "--max-sequence-length", "16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora", "--images", "PICTURES", "--out", "OUT"], "ends in .safetensors"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--targets", "attention,to_x"], 'but received "to_x"'),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--rank", "0"], "--rank to be at least 1"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--size", "big"], "--size to be a number"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--size", "60"], "to be a multiple of"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--size", "64,0"], "to be a multiple of 16 but received 0"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--size", "400"], "at most 384, for which the transformer has positions"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--steps", "0"], "--steps to be at least 1 but received 0"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--batch", "0"], "--batch to be at least 1"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--limit", "0"], "--limit to be at least 1"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--held", "-1"], "--held to be at least 0"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--alpha", "nan"], "--alpha to be above 0 but received nan"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--lr", "-1"], "--lr to be above 0"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--caption-dropout", "2"], "--caption-dropout to be from 0 to 1"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", *OVERFLOW], "lower its learning rate"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", *OVERFLOW, "--steps", "1"], "nothing is written"),
        (["lora", "--images", "nowhere", "--out", "OUT.safetensors"], "nowhere: no such folder"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--model", "nowhere"], "nowhere: no such folder"),
        (["controlnet", "--images", "PICTURES", "--out", "OUT", "--canny", "--model", "EMPTY"], "empty: not a diffusers folder"),
        (["controlnet", "--images", "PICTURES", "--out", "OUT", "--canny", "--layers", "0"], "--layers to be at least 1"),
        (["controlnet", "--images", "PICTURES", "--out", "OUT", "--conditions", "nowhere"], "nowhere: no such folder"),
        (["lora", "--images", "PICTURES", "--out", "OUT.safetensors", "--held", "10"], "--held to be less than the 10 examples"),
        (["lora", "--latents", "EMPTY", "--out", "OUT.safetensors"], "no cached latents"),
        (["controlnet", "--images", "PICTURES", "--out", "OUT"], "Expected the control pictures"),
        (["controlnet", "--images", "PICTURES", "--out", "OUT", "--conditions", "EMPTY"], "no control picture for 10 of 10"),
        (["controlnet", "--images", "PICTURES", "--out", "OUT", "--conditions", "EMPTY", "--canny"], "one source of control pictures"),
        (["controlnet", "--images", "PICTURES", "--out", "OUT", "--canny", "--layers", "9"], "--layers from 1 to"),
    ],
)
def test_bad_input(arguments, message, tmp_path, fixture_model, pictures, capsys):
    (tmp_path / "empty").mkdir()
    names = {"OUT": str(tmp_path / "out"), "OUT.safetensors": str(tmp_path / "out.safetensors"), "EMPTY": str(tmp_path / "empty"), "PICTURES": str(pictures)}
    command = [names.get(a, a) for a in arguments]
    assert main([command[0], "--model", str(fixture_model), "--precision", "no", "--cpu", *([] if "--size" in command else ["--size", "64"]), *command[1:]]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()
