"""diffusers' StableDiffusion3Pipeline as a contender (peer.py has the requests).

    python bench/peers/pipeline.py MODEL --threads 2 [--compile] [--dtype bfloat16]
"""

import argparse
import os
import time
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from peer import arguments, noise_of, serve  # noqa: E402


def main() -> None:
    parser = arguments(argparse.ArgumentParser())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dtype", default="float32")
    chosen = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(chosen.threads)
    dtype = getattr(torch, chosen.dtype)
    pipe = StableDiffusion3Pipeline.from_pretrained(chosen.model, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    spent = [0.0, 0]
    inner = torch.compile(pipe.transformer.forward) if chosen.compile else pipe.transformer.forward

    def timed(*args, **kwargs):
        start = time.perf_counter()
        out = inner(*args, **kwargs)
        spent[0] += time.perf_counter() - start
        spent[1] += 1
        return out

    pipe.transformer.forward = timed

    def draw(request: dict):
        spent[:] = [0.0, 0]
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        noise = noise_of(request, pipe.transformer.config.in_channels, pipe.vae_scale_factor)
        picture = pipe(
            request["prompt"],
            num_inference_steps=request["steps"],
            guidance_scale=request["guidance"],
            width=request["size"],
            height=request["size"],
            max_sequence_length=request["tokens"],
            latents=torch.from_numpy(noise).to(dtype),
            output_type="np",
        ).images[0]
        return picture, *spent

    serve(chosen, draw)


if __name__ == "__main__":
    main()
