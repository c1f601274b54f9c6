"""OpenVINO as a contender (peer.py has the requests): the modules that openvino_convert.py makes, the Euler loop and guidance in numpy.

    python bench/peers/openvino_pipeline.py CONVERTED --threads 2 --form default

Shapes are fixed before compiling, as OpenVINO recommends for pictures; another size compiles again.
"""

import argparse
import json
import time
from pathlib import Path

import numpy
import openvino
from openvino_models import settings
from peer import arguments, noise_of, serve
from tokenizers import Tokenizer


class Pipeline:
    def __init__(self, folder, form, threads):
        self.folder, self.form = Path(folder), form
        self.core, self.properties = openvino.Core(), settings(form, threads)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.tokenizers = [Tokenizer.from_file(str(self.folder / f"{name}.json")) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
        for tokenizer in self.tokenizers:
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self.shape, self.requests = None, {}
        # A list that the transformer's inputs are put into.
        self.recorded = None

    def compile(self, size, tokens):
        if self.shape == (size, tokens):
            return
        config, side = self.config, size // self.config["factor"]
        first, second = config["tokens"]
        transformer = "transformer" if self.form in ("f32", "default") else f"transformer-{self.form}"
        shapes = {
            "text_encoder": {"input_ids": [2, first]},
            "text_encoder_2": {"input_ids": [2, second]},
            "text_encoder_3": {"input_ids": [2, tokens]},
            transformer: {
                "hidden_states": [2, config["channels"], side, side],
                "encoder_hidden_states": [2, first + tokens, config["joint"]],
                "pooled_projections": [2, config["pooled"]],
                "timestep": [2],
            },
            "vae_decoder": {"latent_sample": [1, config["channels"], side, side]},
        }
        for name, inputs in shapes.items():
            model = self.core.read_model(self.folder / name / "openvino_model.xml")
            model.reshape(inputs)
            self.requests[name.split("-")[0]] = self.core.compile_model(model, "CPU", self.properties).create_infer_request()
        self.shape = (size, tokens)

    def ids(self, index, texts, length):
        ids = numpy.full((len(texts), length), self.config["pads"][index], dtype=numpy.int64)
        for row, text in enumerate(texts):
            found = self.tokenizers[index].encode(text).ids[:length]
            ids[row, : len(found)] = found
        return ids

    def encode(self, texts, tokens):
        first, second = self.config["tokens"]
        hidden, pooled = [], []
        for name, index, length in (("text_encoder", 0, first), ("text_encoder_2", 1, second)):
            request = self.requests[name]
            request.infer({0: self.ids(index, texts, length)})
            outputs = len(request.output_tensors)
            pooled.append(request.get_output_tensor(0).data.copy())
            hidden.append(request.get_output_tensor(outputs - 2).data.copy())
        self.requests["text_encoder_3"].infer({0: self.ids(2, texts, tokens)})
        t5 = self.requests["text_encoder_3"].get_output_tensor(0).data
        clip = numpy.concatenate(hidden, axis=-1)
        context = numpy.zeros((len(texts), clip.shape[1] + t5.shape[1], self.config["joint"]), dtype=numpy.float32)
        context[:, : clip.shape[1], : clip.shape[2]] = clip
        context[:, clip.shape[1] :] = t5
        return context, numpy.concatenate(pooled, axis=-1)

    def draw(self, request):
        steps, guidance, shift = request["steps"], request["guidance"], self.config["shift"]
        self.compile(request["size"], request["tokens"])
        context, pooled = self.encode(["", request["prompt"]], request["tokens"])
        # diffusers' FlowMatchEulerDiscreteScheduler: noise levels from the shifted 1 to the shifted 1/1000, shifted once more, then 0.
        shifted = lambda sigma: shift * sigma / (1 + (shift - 1) * sigma)  # noqa: E731
        sigmas = [*(float(shifted(sigma)) for sigma in numpy.linspace(shifted(1.0), shifted(1 / 1000), steps)), 0.0]
        x = noise_of(request, self.config["channels"], self.config["factor"])
        network = self.requests["transformer"]
        start = time.perf_counter()
        for sigma, after in zip(sigmas, sigmas[1:]):
            inputs = {
                "hidden_states": numpy.concatenate([x, x]),
                "encoder_hidden_states": context,
                "pooled_projections": pooled,
                "timestep": numpy.full(2, 1000 * sigma, dtype=numpy.float32),
            }
            if self.recorded is not None:
                self.recorded.append(inputs)
            network.infer(inputs)
            without, with_text = network.get_output_tensor(0).data
            x = x + numpy.float32(after - sigma) * (without + numpy.float32(guidance) * (with_text - without))[None]
        took = time.perf_counter() - start
        decoder = self.requests["vae_decoder"]
        decoder.infer({0: x / self.config["scaling"] + self.config["offset"]})
        return decoder.get_output_tensor(0).data[0].transpose(1, 2, 0) / 2 + 0.5, took, steps


if __name__ == "__main__":
    parser = arguments(argparse.ArgumentParser())
    parser.add_argument("--form", required=True)
    chosen = parser.parse_args()
    serve(chosen, Pipeline(chosen.model, chosen.form, chosen.threads).draw)
