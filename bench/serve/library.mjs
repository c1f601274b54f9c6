// The library called in this process: what bench/serve.ts compares the server with. Pictures become PNG and base64, as the server's do.
//
//   node bench/serve/library.mjs '{"load": {}}'   (with a channel to whoever started it)
import { FlowTurbo } from "flowturbo";
import { answerCalls } from "./calls.mjs";
import { closedLoop, pictureOf } from "./load.mjs";

const options = JSON.parse(process.argv[2]);
const model = await FlowTurbo.load(undefined, options.load);
const encoded = async (picture) => (await picture.encode("png")).toString("base64");

answerCalls({
  profile: (options) => model.profile(options).then(() => null),
  /** @param previewCount pictures that each request shows before it is done; 0 for none */
  closed: ({ options, previewCount, ...load }) =>
    closedLoop(async (index) => {
      const { images } = await model.generate({
        ...{ ...options, ...pictureOf(index), metadata: "parameters" },
        ...(previewCount > 0 && {
          ...{ preview: "decoded", previewCount },
          onStep: ({ previews }) => Promise.all(previews.map(encoded)),
        }),
      });
      await Promise.all(images.map(encoded));
    }, load),
  async close() {
    await model.dispose();
    setImmediate(() => process.disconnect());
  },
});
