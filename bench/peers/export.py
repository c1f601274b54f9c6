"""The modules of a diffusers folder as ONNX graphs, one each, with dynamic axes and float32 weights, the way that optimum exports them.

    python bench/peers/export.py MODEL OUT

Writes OUT/{text_encoder,text_encoder_2,text_encoder_3,transformer,vae_decoder}.onnx, the tokenizers as
OUT/{tokenizer,tokenizer_2,tokenizer_3}.json and OUT/config.json with what a driver must know.
"""

import sys
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from modules import T5, Clip, Decoder, Transformer, transformer_inputs, write_driver_files

warnings.filterwarnings("ignore")


class TwoOutputs(Clip):
    """Token ids → (pooled projection, hidden states before the last layer)."""

    def forward(self, input_ids):
        pooled, _, *states = super().forward(input_ids)
        return pooled, states[-2]


def main(folder: Path, out: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    config, tokens = pipe.transformer.config, pipe.tokenizer.model_max_length
    ids = torch.ones(2, tokens, dtype=torch.int64)

    def export(name, module, inputs, dynamic, outputs):
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            out / f"{name}.onnx",
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=dynamic,
            opset_version=18,
            dynamo=False,
        )

    axes = {0: "batch"}
    for name in ("text_encoder", "text_encoder_2"):
        export(name, TwoOutputs(getattr(pipe, name)), {"input_ids": ids}, {"input_ids": axes}, ["pooled", "hidden"])
    export("text_encoder_3", T5(pipe.text_encoder_3), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "tokens"}}, ["hidden"])
    picture = {0: "batch", 2: "height", 3: "width"}
    varying = {
        "hidden_states": picture,
        "timestep": axes,
        "encoder_hidden_states": {0: "batch", 1: "tokens"},
        "pooled_projections": axes,
        "out": picture,
    }
    export("transformer", Transformer(pipe.transformer), transformer_inputs(config, tokens), varying, ["out"])
    latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    export("vae_decoder", Decoder(pipe.vae), {"latents": latents}, {"latents": picture}, ["image"])
    write_driver_files(pipe, out)


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
