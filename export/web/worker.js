/**
 * The worker: loads the network and carries out the calls of client.js one after another.
 *
 * A message {number, call, options} is answered by {number, event, value} any number of times and then by
 * {number, result} or {number, error}. {call: "cancel"} drops all calls before it.
 */

import { DSDError, inputError, toMessage } from "./errors.js";
import { fetchDescription } from "./files.js";
import { Network } from "./network.js";
import { arrayOf, labelOf, samplingParams, strengthOf, whole } from "./params.js";
import { toPlanes, toRGBA } from "./pixels.js";
import { decode, edit, encode, generate, interpolate, reconstruct } from "./programs.js";

const MOST_IMAGES = 100; // of a walk

let network = null;
let info = null;
let waiting = Promise.resolve();
let era = 0; // counts the cancellations

self.onmessage = ({ data: { number, call, options } }) => {
  if (call === "cancel") {
    era++;
    return;
  }
  const own = era;
  waiting = waiting.then(async () => {
    const send = (event, value) => self.postMessage({ number, event, value });
    try {
      if (!network && call !== "load") throw inputError("the network is not loaded yet");
      const result = await CALLS[call](options, { send, run: (program) => runUnless(() => era !== own, program) });
      self.postMessage({ number, result });
    } catch (error) {
      self.postMessage({ number, error: toMessage(error) });
    }
  });
};

/** Run a program unless its call was cancelled: {value, rows, milliseconds}. */
async function runUnless(isCancelled, program) {
  const began = performance.now();
  let rows = 0;
  const value = await network.runProgram(program, async (count) => {
    await messages();
    if (isCancelled()) throw new DSDError("CancelledError", "Stopped.");
    rows += count;
  });
  return { value, rows, milliseconds: performance.now() - began };
}

const channel = new MessageChannel();

/** Waits until the messages that have arrived are handled: a cancellation may be among them. */
function messages() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

const CALLS = {
  async load({ url, provider }, { send }) {
    const began = performance.now();
    const description = await fetchDescription(url);
    network = await Network.open(url, description, provider, (progress) => send("progress", progress));
    const { config, files } = description;
    info = {
      name: description.name,
      fingerprint: description.fingerprint,
      version: description.version,
      imageSize: config.imageSize,
      latentShape: config.latentShape,
      classes: description.classes,
      nullLabel: config.nullLabel,
      settings: description.settings,
      provider: network.provider,
      runtime: description.runtime.version,
      modelBytes: files[description.graph].bytes + files[description.weights].bytes,
      fetchedBytes: network.fetchedBytes,
      milliseconds: performance.now() - began,
      classImages: description.classImages,
    };
    return info;
  },

  async generate(options, { send, run }) {
    const params = samplingParams(info.settings, options);
    const labels = [[labelOf(options.label, info), 1]];
    return image(await run(generate(network.config, labels, params, previewsOf(options, send))));
  },

  async edit(options, { send, run }) {
    const params = samplingParams(info.settings, options);
    const label = labelOf(options.label, info);
    const strength = strengthOf(options.strength);
    const [pixels, mask, preview] = [pixelsOf(options), maskOf(options), previewsOf(options, send)];
    return image(await run(edit(network.config, pixels, label, params, strength, mask, preview)));
  },

  async walk(options, { send, run }) {
    const params = samplingParams(info.settings, options);
    const n = whole("n", options.n, 2, MOST_IMAGES);
    const [start, end] = [options.start, options.end].map((one) => {
      const { seed, index } = samplingParams(info.settings, { seed: one?.seed, index: one?.index });
      return { label: labelOf(one?.label, info), seed, index };
    });
    const images = [];
    for (let number = 0; number < n; number++) {
      images.push(image(await run(interpolate(network.config, start, end, number / (n - 1), params))));
      send("image", { number, image: images[number] });
    }
    return images;
  },

  async encode(options, { run }) {
    const { value: latents, milliseconds } = await run(encode(pixelsOf(options)));
    return { latents, milliseconds };
  },

  async decode(options, { run }) {
    return image(await run(decode(latentsOf(options))));
  },

  async reconstruct(options, { run }) {
    const { value, ...costs } = await run(reconstruct(pixelsOf(options)));
    return { ...image({ value: value.pixels, ...costs }), latents: value.latents };
  },
};

function image({ value, rows, milliseconds }) {
  return { pixels: toRGBA(value), width: info.imageSize, height: info.imageSize, milliseconds, rows };
}

function previewsOf({ previews, previewEvery }, send) {
  if (!previews) return null;
  const size = { width: info.imageSize, height: info.imageSize };
  const show = (step, steps, pixels) => send("step", { step, steps, pixels: toRGBA(pixels), ...size });
  return { every: whole("previewEvery", previewEvery ?? 1, 1, info.settings.steps.most), show };
}

function pixelsOf({ pixels }) {
  const what = `pixels, RGBA of ${info.imageSize} x ${info.imageSize},`;
  return toPlanes(arrayOf(pixels, [Uint8ClampedArray, Uint8Array], 4 * info.imageSize ** 2, what));
}

function maskOf({ mask }) {
  return mask ? arrayOf(mask, [Uint8Array, Uint8ClampedArray], info.imageSize ** 2, "mask") : null;
}

function latentsOf({ latents }) {
  const [tokens, channels] = info.latentShape;
  const z = arrayOf(latents, [Float32Array], tokens * channels, `latents of ${tokens} x ${channels}`);
  if (z.every(Number.isFinite)) return z;
  throw inputError("latents must be finite numbers");
}
