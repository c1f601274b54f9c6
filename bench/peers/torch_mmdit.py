"""The transformer of SD3.5 in plain torch, as a contender of bench/gpu.ts: no other package is needed.

    python bench/peers/torch_mmdit.py MODEL --side 128 --steps 28 --rounds 5 [--compile] [--device cuda]

MODEL is a folder in the diffusers layout, of which transformer/ is read (one file, bfloat16). Guided Euler steps, as
diffusers makes them: both rows in one launch, guidance and update in float32 outside of the network. Prints a JSON line for
the machine, one for the first picture (which compiles), and one for each round: milliseconds of each step by CUDA events, and
of all of them by the clock. --check FILE instead writes the network's output for fixed inputs, for a comparison.

The network is written from diffusers' SD3Transformer2DModel: the same modules, names and order of operations, with torch's
own scaled_dot_product_attention.
"""

import argparse
import json
import math
import os
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("python3 has no torch")

from torch import nn
from torch.nn import functional as F


def read_safetensors(path):
    """Tensors of a file by name, mapped."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    data = torch.from_file(path, shared=False, size=os.path.getsize(path), dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        # A copy: the offset need not be a multiple of the element's size.
        tensors[name] = data[begin:end].clone().view(types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class Embedder(nn.Module):
    def __init__(self, into, width):
        super().__init__()
        self.linear_1 = nn.Linear(into, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class Conditions(nn.Module):
    def __init__(self, pooled, width):
        super().__init__()
        self.timestep_embedder = Embedder(256, width)
        self.text_embedder = Embedder(pooled, width)

    def forward(self, timestep, pooled):
        exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32, device=timestep.device) / 128
        angles = timestep[:, None].float() * exponents.exp()[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(pooled.dtype)
        return self.timestep_embedder(waves) + self.text_embedder(pooled)


class Patches(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.largest, patch = config["pos_embed_max_size"], config["patch_size"]
        self.proj = nn.Conv2d(config["in_channels"], width, patch, patch)
        self.register_buffer("pos_embed", torch.zeros(1, self.largest**2, width))

    def forward(self, x):
        x = self.proj(x)
        height, width = x.shape[-2:]
        table = self.pos_embed.reshape(1, self.largest, self.largest, -1)
        top, left = (self.largest - height) // 2, (self.largest - width) // 2
        table = table[:, top : top + height, left : left + width].reshape(1, height * width, -1)
        return (x.flatten(2).transpose(1, 2) + table).to(table.dtype)


class Modulation(nn.Module):
    """Shifts, scales and gates from the conditions."""

    def __init__(self, width, parts):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, conditions):
        return [part[:, None] for part in self.linear(F.silu(conditions)).chunk(self.parts, dim=1)]


def normed(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config, text, out_text):
        super().__init__()
        self.heads, self.size = config["num_attention_heads"], config["attention_head_dim"]
        width = self.heads * self.size
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = Norm(self.size), Norm(self.size)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.norm_added_q, self.norm_added_k = Norm(self.size), Norm(self.size)
        if out_text:
            self.to_add_out = nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, self.size)).transpose(1, 2)

    def forward(self, x, text=None):
        q, k, v = (self.split(part(x)) for part in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if text is not None:
            aq, ak, av = (self.split(part(text)) for part in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
            aq, ak = self.norm_added_q(aq), self.norm_added_k(ak)
            q, k, v = torch.cat([q, aq], 2), torch.cat([k, ak], 2), torch.cat([v, av], 2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if text is None:
            return self.to_out[0](out)
        image, other = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self.to_out[0](image), self.to_add_out(other) if hasattr(self, "to_add_out") else None


class Projected(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([Projected(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, width, dual, last):
        super().__init__()
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = Attention(config, text=True, out_text=not last)
        self.attn2 = Attention(config, text=False, out_text=False) if dual else None
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(self, x, text, conditions):
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(conditions)
        context = self.norm1_context(conditions)
        if self.ff_context is None:
            scale_text, shift_text = context
        else:
            shift_text, scale_text, gate_text, shift_text_ff, scale_text_ff, gate_text_ff = context
        image, other = self.attn(normed(x, shift, scale), normed(text, shift_text, scale_text))
        after = x + gate * image
        if self.attn2 is not None:
            shift2, scale2, gate2 = second
            after = after + gate2 * self.attn2(normed(x, shift2, scale2))
        x = after + gate_ff * self.ff(normed(after, shift_ff, scale_ff))
        if self.ff_context is None:
            return x, None
        text = text + gate_text * other
        return x, text + gate_text_ff * self.ff_context(normed(text, shift_text_ff, scale_text_ff))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        layers = config["num_layers"]
        self.pos_embed = Patches(config, width)
        self.time_text_embed = Conditions(config["pooled_projection_dim"], width)
        self.context_embedder = nn.Linear(config["joint_attention_dim"], width)
        self.transformer_blocks = nn.ModuleList(
            Block(config, width, layer in config["dual_attention_layers"], layer == layers - 1) for layer in range(layers)
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, config["patch_size"] ** 2 * config["out_channels"])

    def forward(self, latents, text, pooled, timestep):
        patch = self.config["patch_size"]
        height, width = (side // patch for side in latents.shape[-2:])
        x = self.pos_embed(latents)
        conditions = self.time_text_embed(timestep, pooled)
        text = self.context_embedder(text)
        for block in self.transformer_blocks:
            x, text = block(x, text, conditions)
        scale, shift = self.norm_out(conditions)
        x = self.proj_out(normed(x, shift, scale))
        x = x.reshape(x.shape[0], height, width, patch, patch, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], -1, height * patch, width * patch)


def load(folder, device, dtype):
    with open(f"{folder}/transformer/config.json") as file:
        config = json.load(file)
    with torch.device("meta"):
        model = Transformer(config)
    weights = read_safetensors(f"{folder}/transformer/diffusion_pytorch_model.safetensors")
    model.load_state_dict({name: value.to(device, dtype) for name, value in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--side", type=int, default=128, help="of the latents")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=333)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check", help="a file for the inputs and the output, by torch.save")
    chosen = parser.parse_args()
    on_gpu = chosen.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device")
    say = lambda **line: print(json.dumps(line), flush=True)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    say(event="machine", torch=torch.__version__, gpu=name)

    start = time.perf_counter()
    dtype = torch.bfloat16
    model = load(chosen.model, chosen.device, dtype)
    config = model.config
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    noise = draw(1, config["in_channels"], chosen.side, chosen.side)
    text = draw(2, chosen.tokens, config["joint_attention_dim"]).to(chosen.device, dtype)
    pooled = draw(2, config["pooled_projection_dim"]).to(chosen.device, dtype)
    if chosen.check:
        model = model.float()
        inputs = [noise.repeat(2, 1, 1, 1).to(chosen.device), text.float(), pooled.float()]
        timestep = torch.tensor([700.0, 300.0], device=chosen.device)
        with torch.inference_mode():
            torch.save({"inputs": [*inputs, timestep], "output": model(*inputs, timestep)}, chosen.check)
        return
    network = torch.compile(model) if chosen.compile else model

    def picture():
        sigmas = torch.linspace(1, 1 / chosen.steps, chosen.steps).tolist() + [0.0]
        latents = noise.to(chosen.device)
        events = []
        for sigma, after in zip(sigmas, sigmas[1:]):
            if on_gpu:
                events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                events[-1][0].record()
            begin = time.perf_counter()
            pair = latents.to(dtype).repeat(2, 1, 1, 1)
            timestep = torch.full((2,), 1000 * sigma, device=chosen.device)
            without, with_text = network(pair, text, pooled, timestep).float().chunk(2)
            latents = latents + (after - sigma) * (without + chosen.guidance * (with_text - without))
            if on_gpu:
                events[-1][1].record()
            else:
                events.append(1000 * (time.perf_counter() - begin))
        if on_gpu:
            torch.cuda.synchronize()
            return [first.elapsed_time(second) for first, second in events]
        return events

    with torch.inference_mode():
        picture()
        say(event="first", milliseconds=1000 * (time.perf_counter() - start))
        picture()
        for _ in range(chosen.rounds):
            start = time.perf_counter()
            steps = picture()
            say(event="round", steps=steps, denoise=1000 * (time.perf_counter() - start))


main()
