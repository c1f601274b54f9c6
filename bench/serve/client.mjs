// The clients of bench/serve.ts, in a process of their own: HTTP on connections that stay open.
//
//   node bench/serve/client.mjs   (with a channel to whoever started it)
import { Agent, request as httpRequest } from "node:http";
import { setTimeout as pause } from "node:timers/promises";
import { answerCalls } from "./calls.mjs";
import { closedLoop, pictureOf, randomOf } from "./load.mjs";

const generations = "/v1/images/generations";
const agent = new Agent({ keepAlive: true, maxFreeSockets: 1000 });
let port = 0;

/**
 * One exchange. Only errors, and what is asked for, are read as JSON: the client's work is not what is measured.
 * @returns null for a client that hung up before it was answered
 */
function send(path, { method = "POST", body, hangUpAfterMs } = {}) {
  const start = performance.now();
  return new Promise((resolve, reject) => {
    const text = body === undefined ? "" : JSON.stringify(body);
    const headers = text === "" ? {} : { "content-type": "application/json", "content-length": Buffer.byteLength(text) };
    const call = httpRequest({ host: "127.0.0.1", port, path, method, agent, headers }, (response) => {
      const chunks = [];
      response.on("data", (chunk) => chunks.push(chunk));
      response.once("error", fail);
      response.once("end", () => {
        clearTimeout(timer);
        const milliseconds = performance.now() - start;
        resolve({ status: response.statusCode, headers: response.headers, text: Buffer.concat(chunks).toString("latin1"), milliseconds });
      });
    });
    let hasHungUp = false;
    const fail = (error) => {
      clearTimeout(timer);
      if (hasHungUp) resolve(null);
      else reject(error);
    };
    call.once("error", fail);
    const hangUp = () => {
      hasHungUp = true;
      call.destroy();
    };
    const timer = hangUpAfterMs === undefined ? undefined : setTimeout(hangUp, hangUpAfterMs);
    call.end(text);
  });
}

/** @throws Error for an answer that is no picture, or a stream that does not end with one */
function checkPicture({ status, text }, isStream = false) {
  if (status === 200 && (isStream ? text.includes("event: image_generation.completed\n") : text.includes('"b64_json"')))
    return;
  throw new Error(`${status}: ${text.slice(0, 500)}`);
}

/** One request of an open loop: asks again when it was told to, until it is drawn or nothing helps. */
async function persist(body, mostTries) {
  const waits = [];
  for (;;) {
    const { status, headers, text, milliseconds } = await send(generations, { body });
    if (status === 200) return { status, waits, milliseconds, total: JSON.parse(text).timings.total };
    const retryAfterMs = headers["retry-after-ms"];
    if (status !== 429 || retryAfterMs === undefined || waits.length === mostTries) return { status, waits };
    waits.push(Number(retryAfterMs));
    await pause(Number(retryAfterMs));
  }
}

/** Follows the events of a job to their end. */
async function followJob(id) {
  const { text } = await send(`/v1/jobs/${id}/events`, { method: "GET" });
  return text.includes("event: job.completed\n") ? "job, followed" : "job, failed";
}

async function pollJob(id) {
  for (;;) {
    const { status } = JSON.parse((await send(`/v1/jobs/${id}`, { method: "GET" })).text);
    if (status !== "queued" && status !== "in_progress") return status === "completed" ? "job, polled" : "job, failed";
    await pause(20);
  }
}

/** What happens in turn where requests are mixed, each with what it should come to. */
const kinds = [
  ...Array(9).fill(plain),
  ...Array(4).fill(stream),
  ...[(body) => job(body, followJob), (body) => job(body, pollJob), (body) => job(body, cancelJob)],
  ...[wrong, impossible, (body, random) => hangUp(body, random), (body, random) => hangUp(streamed(body), random)],
];
const streamed = (body) => ({ ...body, stream: true, partial_images: 2 });

async function plain(body) {
  checkPicture(await send(generations, { body }));
  return "drawn";
}
async function stream(body) {
  checkPicture(await send(generations, { body: streamed(body) }), true);
  return "streamed";
}
async function job(body, end) {
  const { status, text } = await send("/v1/jobs", { body: { ...body, partial_images: 2 } });
  if (status !== 202) throw new Error(`${status}: ${text}`);
  return end(JSON.parse(text).id);
}
async function cancelJob(id) {
  await send(`/v1/jobs/${id}`, { method: "DELETE" });
  return "job, cancelled";
}
async function wrong(body) {
  const { status, text } = await send(generations, { body: { ...body, size: "huge" } });
  if (status !== 400) throw new Error(`${status}: ${text}`);
  return "refused (400)";
}
async function impossible(body) {
  const { status, text } = await send(generations, { body: { ...body, deadline_ms: 1 } });
  if (status !== 422) throw new Error(`${status}: ${text}`);
  return "refused (422)";
}
async function hangUp(body, random) {
  const answer = await send(generations, { body, hangUpAfterMs: 200 * random() });
  return answer === null ? "hung up" : "answered before it hung up";
}

answerCalls({
  connect(number) {
    port = number;
  },
  metrics: async () => (await send("/metrics", { method: "GET" })).text,
  one: async ({ body, hangUpAfterMs }) => {
    const answer = await send(generations, { body: { ...body, ...pictureOf(1) }, hangUpAfterMs });
    if (answer) checkPicture(answer);
    return answer && { milliseconds: answer.milliseconds, total: JSON.parse(answer.text).timings.total };
  },
  closed: ({ body, ...load }) =>
    closedLoop(async (index) => {
      checkPicture(await send(generations, { body: { ...body, ...pictureOf(index) } }), body.stream);
    }, load),
  /** Arrivals at random, as many on average in each second. */
  async open({ body, perSecond, seconds, seed, mostTries }) {
    const random = randomOf(seed);
    const calls = [];
    const start = performance.now();
    for (let at = 0; ; ) {
      at += (-Math.log(1 - random()) / perSecond) * 1000;
      if (at > seconds * 1000) break;
      await pause(Math.max(0, start + at - performance.now()));
      calls.push(persist({ ...body, ...pictureOf(calls.length) }, mostTries));
    }
    return Promise.all(calls);
  },
  /**
   * A closed loop in which a part of the requests, always the same, is given up after a random time, at most so many milliseconds, or (0)
   * none is. Who hangs up asks for the next picture at once.
   */
  async impatient({ body, callers, requests, part, withinMs, seed }) {
    const random = randomOf(seed);
    const patience = Array.from({ length: requests }, () => {
      const [leaves, after] = [random() < part, random()];
      return leaves ? after : null;
    });
    // When each of those who leave left, and how long the others took.
    const [left, stayed] = [[], []];
    const { milliseconds } = await closedLoop(async (index) => {
      const { [index]: after } = patience;
      const hangUpAfterMs = after === null || withinMs === 0 ? undefined : after * withinMs;
      const answer = await send(generations, { body: { ...body, ...pictureOf(index) }, hangUpAfterMs });
      if (answer) checkPicture(answer);
      if (answer === null) left.push(hangUpAfterMs);
      else if (after === null) stayed.push(answer.milliseconds);
    }, { callers, requests });
    return { milliseconds, left, stayed, leaving: patience.filter((after) => after !== null).length };
  },
  /** A part of many requests of all kinds. @returns how many came to what */
  async mixed({ body, callers, from, requests }) {
    const random = randomOf(from + 1);
    const counts = {};
    await closedLoop(async (index) => {
      const number = from + index;
      const outcome = await kinds[number % kinds.length]({ ...body, ...pictureOf(number) }, random);
      counts[outcome] = (counts[outcome] ?? 0) + 1;
    }, { callers, requests });
    return counts;
  },
  close() {
    agent.destroy();
    setImmediate(() => process.disconnect());
  },
});
