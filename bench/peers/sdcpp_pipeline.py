"""stable-diffusion.cpp as a contender (peer.py has the requests), through stable-diffusion-cpp-python.

    python bench/peers/sdcpp_pipeline.py MODEL.safetensors --threads 2 --type q8_0

It draws its own noise. Conditions are 77 tokens of CLIP and 77 for T5, whatever a request asks for.
"""

import argparse
import os
import sys
import time

from peer import arguments, serve


def main():
    parser = arguments(argparse.ArgumentParser())
    parser.add_argument("--type", required=True, help="of the weights: f16, q8_0")
    parser.add_argument("--flash", action="store_true")
    chosen = parser.parse_args()
    import numpy
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        model_path=chosen.model,
        n_threads=chosen.threads,
        wtype=chosen.type,
        diffusion_flash_attn=chosen.flash,
        vae_decode_only=True,
        verbose=bool(os.environ.get("SDCPP_VERBOSE")),
    )

    def draw(request):
        # Called before the first step and after each; again while the picture is decoded.
        times = []
        steps = request["steps"]

        def progress(step, of, _):
            if of == steps and len(times) <= steps:
                times.append((step, time.perf_counter()))

        pictures = model.generate_image(
            prompt=request["prompt"],
            width=request["size"],
            height=request["size"],
            cfg_scale=request["guidance"],
            sample_method="euler",
            sample_steps=steps,
            seed=request["seed"],
            progress_callback=progress,
        )
        if os.environ.get("SDCPP_VERBOSE"):
            print(times, file=sys.stderr)
        if not times or times[0][0] != 0 or times[-1][0] != steps:
            raise RuntimeError(f"its steps were not seen: {[step for step, _ in times]}")
        return numpy.asarray(pictures[0].convert("RGB")), times[-1][1] - times[0][1], steps

    serve(chosen, draw)


if __name__ == "__main__":
    main()
