"""What the drivers of peers in Python share: one JSON request a line, one JSON answer a line.

    > {"prompt": "a red circle", "steps": 28, "guidance": 4.5, "size": 64, "tokens": 16, "seed": 1, "out": "picture.png"}
    < {"milliseconds": 812.4, "denoise": 633.0, "evaluations": 28}

`denoise` is the time of the steps. A request may name a file of starting noise, `noise` (float32, [1, C, h, w]), and one that the decoded
picture is to be written to, `pixels` (float32, [3, H, W], from 0 to 1). With --once the first request is taken from the command line and
the process ends: for start-up times.
"""

import json
import sys
import time


def arguments(parser):
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--once", help="one request as JSON")
    return parser


def serve(chosen, draw):
    """@param draw (request) → (picture [H, W, 3] from 0 to 1 or in 8 bits, seconds of the steps, evaluations of the transformer)"""

    def answer(request):
        start = time.perf_counter()
        picture, denoise, evaluations = draw(request)
        if request.get("out"):
            save(picture, request["out"])
        took = time.perf_counter() - start
        if request.get("pixels"):
            write_pixels(picture, request["pixels"])
        print(json.dumps({"milliseconds": 1000 * took, "denoise": 1000 * denoise, "evaluations": evaluations}), flush=True)

    if chosen.once:
        answer(json.loads(chosen.once))
        return
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        answer(json.loads(line))


def noise_of(request, channels, factor):
    """Starting noise [1, C, h, w]: what the request names, or from its seed."""
    import numpy

    side = request["size"] // factor
    shape = (1, channels, side, side)
    if request.get("noise"):
        return numpy.fromfile(request["noise"], dtype=numpy.float32).reshape(shape)
    return numpy.random.default_rng(request["seed"]).standard_normal(shape, dtype=numpy.float32)


def save(picture, file):
    import numpy
    from PIL import Image

    if picture.dtype != numpy.uint8:
        picture = (255 * picture.clip(0, 1)).round().astype(numpy.uint8)
    Image.fromarray(picture).save(file)


def write_pixels(picture, file):
    import numpy

    scaled = picture.astype(numpy.float32) / 255 if picture.dtype == numpy.uint8 else picture.clip(0, 1).astype(numpy.float32)
    numpy.ascontiguousarray(scaled.transpose(2, 0, 1)).tofile(file)
