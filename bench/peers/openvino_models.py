"""The modules of a diffusers folder as OpenVINO models: converted from torch as optimum-intel does it, in the forms that its users take.

Forms of the transformer, by name:
    f32      float32 weights, computed in float32
    default  float32 weights, computed in what OpenVINO chooses for this CPU (bfloat16 where it has instructions for it)
    int8     weights in 8 bits by nncf.compress_weights (INT8_ASYM: what `optimum-cli export openvino --weight-format int8` makes); OpenVINO
             chooses the rest, and quantises activations as they come
    int8-sym the same, symmetric
    w8a8     weights and activations in 8 bits by nncf.quantize, with ranges from a few steps of random noise
"""

import json
import logging
import os
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

FORMS = ("f32", "default", "int8", "int8-sym", "w8a8")


def settings(form, threads):
    """Properties for compile_model: those for one picture at a time."""
    chosen = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return {**chosen, "INFERENCE_PRECISION_HINT": "f32"} if form == "f32" else chosen


def described(compiled):
    """What OpenVINO chose, in words."""
    return compiled.get_property("INFERENCE_PRECISION_HINT").to_string()


def example(config, clip_tokens, batch=2, tokens=16, height=None, width=None):
    """Random inputs of the transformer, in the order of its arguments."""
    import torch

    height, width = height or config.sample_size, width or config.sample_size
    return {
        "hidden_states": torch.randn(batch, config.in_channels, height, width),
        "encoder_hidden_states": torch.randn(batch, clip_tokens + tokens, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 500.0),
    }


def clip_tokens(folder):
    file = Path(folder) / "text_encoder/config.json"
    return json.loads(file.read_text())["max_position_embeddings"] if file.exists() else 77


def vae_factor(folder):
    file = Path(folder) / "vae/config.json"
    return 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1) if file.exists() else 8


def convert(module, inputs, outputs):
    """A torch module with the arguments `inputs` by name; every axis that may vary does."""
    import openvino
    import torch

    with torch.no_grad():
        model = openvino.convert_model(module.eval(), example_input=inputs)
    for port, name in zip(model.inputs, inputs):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, outputs):
        port.get_tensor().set_names({name})
    return model


def convert_transformer(transformer, tokens):
    """@param tokens of CLIP"""
    import torch

    class Transformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformer

        def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep):
            return self.model(hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=False)[0]

    return convert(Transformer(), example(transformer.config, tokens), ["out_sample"])


def in_form(model, form, examples=None):
    """The converted transformer in a form. @param examples inputs for w8a8, by name, in numpy"""
    if form in ("f32", "default"):
        return model
    logging.disable(logging.WARNING)
    import nncf

    modes = nncf.CompressWeightsMode
    if form == "int8":
        return nncf.compress_weights(model.clone(), mode=modes.INT8_ASYM)
    if form == "int8-sym":
        return nncf.compress_weights(model.clone(), mode=modes.INT8_SYM)
    return nncf.quantize(model.clone(), nncf.Dataset(examples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(examples))
