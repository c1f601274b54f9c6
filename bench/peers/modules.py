"""The modules of a diffusers pipeline with tensors in and out, for exports, and what a driver of the exported ones must know."""

import json

import torch


class Clip(torch.nn.Module):
    """Token ids → (pooled projection, last hidden state, hidden states from the embeddings on)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        out = self.model(input_ids, output_hidden_states=True)
        return out[0], out.last_hidden_state, *out.hidden_states


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

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep):
        return self.model(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            return_dict=False,
        )[0]


class Decoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latent_sample):
        return self.model.decode(latent_sample, return_dict=False)[0]


def transformer_inputs(config, clip_tokens, batch=2, tokens=None, side=None):
    """Random inputs, in the order of its arguments. @param side of the latents"""
    side = side or config.sample_size
    return {
        "hidden_states": torch.randn(batch, config.in_channels, side, side),
        "encoder_hidden_states": torch.randn(batch, clip_tokens + (tokens or clip_tokens), config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 500.0),
    }


def write_driver_files(pipe, out):
    """OUT/{tokenizer,tokenizer_2,tokenizer_3}.json and OUT/config.json."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        getattr(pipe, name).backend_tokenizer.save(str(out / f"{name}.json"))
    config, vae = pipe.transformer.config, pipe.vae.config
    (out / "config.json").write_text(
        json.dumps(
            {
                "channels": config.in_channels,
                "joint": config.joint_attention_dim,
                "pooled": config.pooled_projection_dim,
                "factor": 2 ** (len(vae.block_out_channels) - 1),
                "tokens": [pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length],
                "pads": [pipe.tokenizer.pad_token_id, pipe.tokenizer_2.pad_token_id, pipe.tokenizer_3.pad_token_id],
                "scaling": vae.scaling_factor,
                "offset": vae.shift_factor,
                "shift": pipe.scheduler.config.shift,
            }
        )
    )
