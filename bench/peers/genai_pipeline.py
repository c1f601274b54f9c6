"""openvino-genai's Text2ImagePipeline as a contender (peer.py has the requests), over what openvino_convert.py makes.

    python bench/peers/genai_pipeline.py CONVERTED --threads 2 [--caching]

--caching turns TaylorSeer on (arXiv 2503.06923), as OpenVINO's own example has it: every third step is computed after the first six, and
the last two; the others are extrapolated.
"""

import argparse
import json
from pathlib import Path

import numpy
import openvino
import openvino_genai
from peer import arguments, noise_of, serve


class Noise(openvino_genai.Generator):
    """What the request says, in place of a seed."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def next(self):
        return 0.0

    def seed(self, value):
        pass

    def randn_tensor(self, shape):
        return openvino.Tensor(self.values.reshape(list(shape)))


def taylorseer():
    caching = openvino_genai.TaylorSeerCacheConfig()
    caching.cache_interval, caching.disable_cache_before_step, caching.disable_cache_after_step = 3, 6, -2
    return caching


def main():
    parser = arguments(argparse.ArgumentParser())
    parser.add_argument("--caching", action="store_true")
    chosen = parser.parse_args()
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": chosen.threads}
    pipe, compiled = None, None

    config = json.loads((Path(chosen.model) / "config.json").read_text())

    def draw(request):
        nonlocal pipe, compiled
        size, tokens, guidance = request["size"], request["tokens"], request["guidance"]
        if compiled != (size, tokens, guidance):
            pipe = openvino_genai.Text2ImagePipeline(chosen.model)
            defaults = pipe.get_generation_config()
            defaults.max_sequence_length = tokens
            defaults.taylorseer_config = taylorseer() if chosen.caching else None
            pipe.set_generation_config(defaults)
            pipe.reshape(1, size, size, guidance)
            pipe.compile("CPU", **properties)
            compiled = (size, tokens, guidance)
        picture = pipe.generate(
            request["prompt"],
            width=size,
            height=size,
            num_inference_steps=request["steps"],
            guidance_scale=guidance,
            max_sequence_length=tokens,
            generator=Noise(noise_of(request, config["channels"], config["factor"])),
        )
        raw = pipe.get_performance_metrics().raw_metrics
        # Durations are in microseconds.
        return numpy.array(picture.data[0]), sum(raw.iteration_durations) / 1e6, len(raw.transformer_inference_durations)

    serve(chosen, draw)


if __name__ == "__main__":
    main()
