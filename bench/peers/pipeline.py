"""diffusers' StableDiffusion3Pipeline on the CPU as a contender: reads one JSON request a line, answers one JSON line each.

    python bench/peers/pipeline.py MODEL [--threads N] [--compile] [--device cuda --dtype bfloat16]
    > {"prompt": "a red circle", "steps": 28, "guidance": 4.5, "size": 64, "seed": 1, "tokens": 16, "out": "picture.png"}
    < {"milliseconds": 812.4, "denoise": 633.0, "peak": 1234567}

`denoise` is the time of the transformer's calls, `peak` the largest resident size so far in bytes. With --once the first
request is taken from the command line and the process ends: for start-up times.
"""

import argparse
import json
import os
import resource
import sys
import time
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline  # noqa: E402
from diffusers.utils import logging  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--once", help="one request as JSON")
    chosen = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    pipe = StableDiffusion3Pipeline.from_pretrained(chosen.model, torch_dtype=getattr(torch, chosen.dtype)).to(chosen.device)
    pipe.set_progress_bar_config(disable=True)
    spent = [0.0]
    inner = torch.compile(pipe.transformer.forward) if chosen.compile else pipe.transformer.forward

    wait = torch.cuda.synchronize if chosen.device == "cuda" else lambda: None

    def timed(*args, **kwargs):
        wait()
        start = time.perf_counter()
        out = inner(*args, **kwargs)
        wait()
        spent[0] += time.perf_counter() - start
        return out

    pipe.transformer.forward = timed

    def answer(request: dict) -> None:
        spent[0] = 0.0
        start = time.perf_counter()
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        picture = pipe(
            request["prompt"],
            num_inference_steps=request["steps"],
            guidance_scale=request["guidance"],
            width=request["size"],
            height=request["size"],
            max_sequence_length=request["tokens"],
            generator=torch.Generator().manual_seed(request["seed"]),
        ).images[0]
        if request.get("out"):
            picture.save(request["out"])
        result = {
            "milliseconds": 1000 * (time.perf_counter() - start),
            "denoise": 1000 * spent[0],
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "torch": torch.__version__,
        }
        print(json.dumps(result), flush=True)

    if chosen.once:
        answer(json.loads(chosen.once))
        return
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        answer(json.loads(line))


if __name__ == "__main__":
    main()
