"""A diffusers folder in the layout that openvino-genai reads (optimum-intel's), and what openvino_pipeline.py needs.

    python bench/peers/openvino_convert.py MODEL OUT [--form int8] [--no-tokenizers]

Writes OUT/<module>/openvino_model.xml of every module, the tokenizers as OUT/<tokenizer>/openvino_tokenizer.xml, and the files of
modules.py. With --form the transformer alone, in a form of openvino_models.py, as OUT/transformer-<form>/openvino_model.xml, from the one
that is there. Without tokenizers, which openvino-tokenizers converts, openvino-genai cannot read the folder.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from openvino_models import convert, convert_transformer, in_form


def save(model, folder):
    import openvino

    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)


def whole(source, out, tokenizers):
    import openvino
    import torch
    from diffusers import StableDiffusion3Pipeline
    from modules import T5, Clip, Decoder, write_driver_files

    pipe = StableDiffusion3Pipeline.from_pretrained(source, torch_dtype=torch.float32)
    tokens, config = pipe.tokenizer.model_max_length, pipe.transformer.config
    ids = {"input_ids": torch.ones(2, tokens, dtype=torch.int64)}
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name)
        states = [f"hidden_states.{layer}" for layer in range(encoder.config.num_hidden_layers + 1)]
        save(convert(Clip(encoder), ids, ["text_embeds", "last_hidden_state", *states]), out / name)
    save(convert(T5(pipe.text_encoder_3), ids, ["last_hidden_state"]), out / "text_encoder_3")
    save(convert_transformer(pipe.transformer, tokens), out / "transformer")
    latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    save(convert(Decoder(pipe.vae), {"latent_sample": latents}, ["sample"]), out / "vae_decoder")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        (out / name).mkdir(exist_ok=True)
        for file in (source / name).iterdir():
            if file.suffix in (".json", ".txt"):
                shutil.copy(file, out / name)
    shutil.copy(source / "vae/config.json", out / "vae_decoder")
    shutil.copy(source / "model_index.json", out)
    write_driver_files(pipe, out)
    if not tokenizers:
        return
    from openvino_tokenizers import convert_tokenizer

    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        openvino.save_model(convert_tokenizer(getattr(pipe, name), with_detokenizer=False), out / name / "openvino_tokenizer.xml")


def quantised(out, form):
    import openvino

    model = openvino.Core().read_model(out / "transformer/openvino_model.xml")
    save(in_form(model, form, lambda: drawn_inputs(out)), out / f"transformer-{form}")


def drawn_inputs(out):
    """What the transformer is given while it draws two pictures."""
    from openvino_pipeline import Pipeline

    pipeline = Pipeline(out, "default", len(os.sched_getaffinity(0)))
    pipeline.recorded = []
    size = json.loads((out / "transformer/config.json").read_text())["sample_size"] * pipeline.config["factor"]
    for seed, prompt in enumerate(("a red circle above a blue square", "a small green triangle on a yellow background")):
        tokens = pipeline.config["tokens"][0]
        pipeline.draw({"prompt": prompt, "steps": 8, "guidance": 2, "size": size, "tokens": tokens, "seed": seed})
    return pipeline.recorded


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--form")
    parser.add_argument("--no-tokenizers", action="store_true")
    chosen = parser.parse_args()
    quantised(chosen.out, chosen.form) if chosen.form else whole(chosen.model, chosen.out, not chosen.no_tokenizers)
