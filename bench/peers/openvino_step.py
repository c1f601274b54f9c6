"""Time of a transformer step in OpenVINO, in each of the forms of openvino_models.py, in turn.

    python bench/peers/openvino_step.py MODEL --size 256 [--batch 2] [--tokens 32] [--rounds 7] [--forms f32,default,int8,w8a8] [--dynamic]

MODEL is a folder in the diffusers layout, of which transformer/ is read. Guidance makes two rows of a picture, so --batch 2 is one guided
step. Prints for each form the median, least and greatest milliseconds, and the largest difference from torch's float32 output over the
largest value. Shapes are fixed before compiling, unless --dynamic.
"""

import argparse
import os
import statistics
import time

from openvino_models import clip_tokens, convert_transformer, in_form, settings, vae_factor


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--size", type=int, required=True, help="pixels")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--tokens", type=int, default=32, help="of T5")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--forms", default="f32,default,int8,w8a8")
    parser.add_argument("--dynamic", action="store_true")
    chosen = parser.parse_args()

    import openvino
    import torch
    from diffusers import SD3Transformer2DModel
    from modules import transformer_inputs

    torch.set_num_threads(chosen.threads)
    torch.manual_seed(1)
    transformer = SD3Transformer2DModel.from_pretrained(chosen.model, subfolder="transformer", torch_dtype=torch.float32).eval()
    tokens, side = clip_tokens(chosen.model), chosen.size // vae_factor(chosen.model)
    inputs = transformer_inputs(transformer.config, tokens, chosen.batch, chosen.tokens, side)
    with torch.no_grad():
        expected = transformer(**inputs, return_dict=False)[0].numpy()
    model = convert_transformer(transformer, tokens)
    feed = {name: value.numpy() for name, value in inputs.items()}
    if not chosen.dynamic:
        model.reshape({name: value.shape for name, value in feed.items()})
    core = openvino.Core()
    requests, times, errors = {}, {}, {}
    for form in chosen.forms.split(","):
        compiled = core.compile_model(in_form(model, form, lambda: [feed]), "CPU", settings(form, chosen.threads))
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        requests[f"{form} ({precision})"] = compiled.create_infer_request()
    for round in range(-2, chosen.rounds):
        for name, request in requests.items():
            start = time.perf_counter()
            request.infer(feed)
            took = 1000 * (time.perf_counter() - start)
            if round >= 0:
                times.setdefault(name, []).append(took)
            errors[name] = abs(request.get_output_tensor(0).data - expected).max() / abs(expected).max()
    for name, values in times.items():
        spread = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) ms"
        print(f"OpenVINO {openvino.__version__.split('-')[0]}, {name}: {spread}, error {errors[name]:.1e}", flush=True)


if __name__ == "__main__":
    main()
