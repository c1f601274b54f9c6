"""The modules of a diffusers folder as OpenVINO models, converted from torch as optimum-intel does it, and the transformer in the forms that
its users take:

    f32      float32 weights, computed in float32
    default  float32 weights, computed in what OpenVINO chooses for this CPU (bfloat16 where it has instructions for it)
    int8     weights in 8 bits by nncf.compress_weights (INT8_ASYM: what `optimum-cli export openvino --weight-format int8` makes); OpenVINO
             chooses the rest, and quantises activations as they come
    int8-sym the same, symmetric
    w8a8     weights and activations in 8 bits by nncf.quantize, with ranges from the steps of two pictures
"""

import json
import logging
import os
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def settings(form, threads):
    """Properties for compile_model: those for one picture at a time."""
    chosen = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return {**chosen, "INFERENCE_PRECISION_HINT": "f32"} if form == "f32" else chosen


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
    for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):
        for port, name in zip(ports, names):
            port.get_tensor().set_names({name})
    return model


def convert_transformer(transformer, tokens):
    """@param tokens of CLIP"""
    from modules import Transformer, transformer_inputs

    return convert(Transformer(transformer), transformer_inputs(transformer.config, tokens), ["out_sample"])


def in_form(model, form, examples):
    """The converted transformer in a form. @param examples makes inputs for w8a8, by name, in numpy"""
    if form in ("f32", "default"):
        return model
    logging.disable(logging.WARNING)
    import nncf

    modes = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int8-sym": nncf.CompressWeightsMode.INT8_SYM}
    if form in modes:
        return nncf.compress_weights(model.clone(), mode=modes[form])
    inputs = examples()
    return nncf.quantize(model.clone(), nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs))
