"""The modules of a diffusers folder as ONNX graphs, one each, with dynamic axes and float32 weights, the way that optimum exports them.

    python bench/peers/export.py MODEL OUT

Writes OUT/{text_encoder,text_encoder_2,text_encoder_3,transformer,vae_decoder}.onnx, the tokenizers as
OUT/{tokenizer,tokenizer_2,tokenizer_3}.json and OUT/config.json with what a driver must know.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

warnings.filterwarnings("ignore")


class Clip(torch.nn.Module):
    """Token ids → (pooled projection, hidden states before the last layer)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        out = self.model(input_ids, output_hidden_states=True)
        return out[0], out.hidden_states[-2]


class T5(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids)[0]


class Transformer(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections):
        return self.model(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]


class Decoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latents):
        return self.model.decode(latents, return_dict=False)[0]


def main(folder: Path, out: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    config = pipe.transformer.config
    side, tokens = config.sample_size, pipe.tokenizer.model_max_length
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
        export(name, Clip(getattr(pipe, name)), {"input_ids": ids}, {"input_ids": axes}, ["pooled", "hidden"])
    export("text_encoder_3", T5(pipe.text_encoder_3), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "tokens"}}, ["hidden"])
    picture = {0: "batch", 2: "height", 3: "width"}
    export(
        "transformer",
        Transformer(pipe.transformer),
        {
            "hidden_states": torch.randn(2, config.in_channels, side, side),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 2 * tokens, config.joint_attention_dim),
            "pooled_projections": torch.randn(2, config.pooled_projection_dim),
        },
        {
            "hidden_states": picture,
            "timestep": axes,
            "encoder_hidden_states": {0: "batch", 1: "tokens"},
            "pooled_projections": axes,
            "out": picture,
        },
        ["out"],
    )
    export("vae_decoder", Decoder(pipe.vae), {"latents": torch.randn(1, config.in_channels, side, side)}, {"latents": picture}, ["image"])

    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        getattr(pipe, name).backend_tokenizer.save(str(out / f"{name}.json"))
    vae = pipe.vae.config
    (out / "config.json").write_text(
        json.dumps(
            {
                "channels": config.in_channels,
                "joint": config.joint_attention_dim,
                "factor": 2 ** (len(vae.block_out_channels) - 1),
                "tokens": [pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length],
                "pads": [pipe.tokenizer.pad_token_id, pipe.tokenizer_2.pad_token_id, pipe.tokenizer_3.pad_token_id],
                "scaling": vae.scaling_factor,
                "offset": vae.shift_factor,
                "shift": pipe.scheduler.config.shift,
            }
        )
    )


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
