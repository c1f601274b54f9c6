/**
 * The tiny autoencoder (diffusers' AutoencoderTiny: TAESD3 and its like), distilled from another: convolutions and
 * ReLU alone. Scale and shift of the latents are part of the graphs, as in vae.ts.
 */

import type { Part, TinyVaeConfig } from "../checkpoint/index.js";
import type { EmitOptions, GraphBuilder, Value } from "../onnx/index.js";
import { Layers } from "./layers.js";

/** Latents are squashed to ±3 before they are decoded. */
const magnitude = 3;

export class TinyAutoencoder extends Layers {
  readonly #config: TinyVaeConfig;

  /** @param input whose rows are those of the activations */
  constructor(g: GraphBuilder, { weights, config }: Part<TinyVaeConfig>, options: EmitOptions, input: Value) {
    super(g, weights, options, g.shapeOf(input, 0, 1));
    this.#config = config;
  }

  /** x0 = 2·decoder(3·tanh((z / scale + shift) / 3)) − 1; float32 in and out. */
  decode(latents: Value): Value {
    const { g } = this;
    const { latentChannels, outChannels, scalingFactor, shiftFactor, decoderBlockOutChannels } = this.#config;
    const blocks = this.#config.numDecoderBlocks;
    const z = this.add(g.op("Div", [latents, this.#scalar(scalingFactor)]), this.#scalar(shiftFactor));
    const bounded = g.op("Tanh", [g.op("Div", [z, this.#scalar(magnitude)])]);
    let x = g.cast(this.mul(bounded, this.#scalar(magnitude)), this.compute);
    // The names number the layers, activations and enlarging among them.
    let layer = 0;
    const next = () => `decoder.layers.${layer++}`;
    x = g.op("Relu", [this.#conv(x, next(), latentChannels, decoderBlockOutChannels[0]!)]);
    layer++;
    for (const [index, channels] of decoderBlockOutChannels.entries()) {
      for (let block = 0; block < blocks[index]!; block++) x = this.#block(x, next(), channels);
      const isLast = index === decoderBlockOutChannels.length - 1;
      if (!isLast) {
        x = this.enlarged(x);
        layer++;
      }
      x = this.#conv(x, next(), channels, isLast ? outChannels : channels, { bias: isLast });
    }
    const doubled = this.mul(g.cast(x, "float32"), this.#scalar(2));
    return g.op("Sub", [doubled, this.#scalar(1)]);
  }

  /** z = (encoder((x + 1) / 2) − shift) · scale; float32 in and out. */
  encode(image: Value): Value {
    const { g } = this;
    const { inChannels, latentChannels, scalingFactor, shiftFactor, encoderBlockOutChannels } = this.#config;
    const blocks = this.#config.numEncoderBlocks;
    let x = g.cast(g.op("Div", [this.add(image, this.#scalar(1)), this.#scalar(2)]), this.compute);
    let layer = 0;
    const next = () => `encoder.layers.${layer++}`;
    for (const [index, channels] of encoderBlockOutChannels.entries()) {
      x = this.#conv(x, next(), index === 0 ? inChannels : channels, channels, {
        ...{ stride: index === 0 ? 1 : 2, bias: index === 0 },
      });
      for (let block = 0; block < blocks[index]!; block++) x = this.#block(x, next(), channels);
    }
    const z = g.cast(this.#conv(x, next(), encoderBlockOutChannels.at(-1)!, latentChannels), "float32");
    return this.mul(g.op("Sub", [z, this.#scalar(shiftFactor)]), this.#scalar(scalingFactor));
  }

  #scalar(value: number): Value {
    return this.g.scalar(value, "float32");
  }

  #conv(x: Value, name: string, from: number, to: number, { stride = 1, bias = true } = {}): Value {
    return this.conv(x, name, from, to, 3, { strides: [stride, stride], pads: [1, 1, 1, 1], bias });
  }

  #block(x: Value, name: string, channels: number): Value {
    const conv = (y: Value, index: number) => this.#conv(y, `${name}.conv.${index}`, channels, channels);
    const relu = (y: Value) => this.g.op("Relu", [y]);
    return relu(this.add(conv(relu(conv(relu(conv(x, 0)), 2)), 4), x));
  }
}
