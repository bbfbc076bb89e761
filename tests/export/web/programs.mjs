// Runs programs of the page on a small stand-in for the network, and prints the rows of each and its result.
// Input: JSON, a list of {config, call, params, ...}; tests/export/test_web_maths.py has the same stand-in.

import { readFileSync } from "node:fs";
import { samplingParams } from "../../../export/web/params.js";
import { edit, generate, interpolate, reconstruct } from "../../../export/web/programs.js";

const { fround, floor, max, min } = Math;

function output({ kind, pixels, z, t, r, label }, { imageSize, latentShape }) {
  const size = latentShape[0] * latentShape[1];
  if (kind === "encode") return Float32Array.from({ length: size }, (_, i) => pixels[i] / 64 - 2);
  if (kind === "decode") {
    const value = (_, i) => max(0, min(255, floor(z[i % size] * 32) + 128));
    return Uint8Array.from({ length: 3 * imageSize ** 2 }, value);
  }
  const shift = fround(fround(fround(t) + fround(r)) * fround(label / 16));
  return z.map((value) => fround(0.75 * value) + shift);
}

const end = ({ seed, index, ...rest }) => ({ ...rest, seed: BigInt(seed), index: BigInt(index) });

const MAKERS = {
  generate: (c, params, preview) => generate(c.config, c.labels, params, preview),
  edit: (c, params, preview) => {
    const mask = c.mask && Uint8Array.from(c.mask);
    return edit(c.config, Uint8Array.from(c.pixels), c.label, params, c.strength, mask, preview);
  },
  interpolate: (c, params) => interpolate(c.config, end(c.start), end(c.end), c.fraction, params),
  reconstruct: (c) => reconstruct(Uint8Array.from(c.pixels)),
};

const results = JSON.parse(readFileSync(0, "utf-8")).map((c) => {
  const [rows, previews] = [[], []];
  const preview = c.every && { every: c.every, show: (step, steps, pixels) => previews.push([step, [...pixels]]) };
  const program = MAKERS[c.call](c, samplingParams(c.settings, c.params), preview);
  let step = program.next();
  while (!step.done) {
    const denoise = step.value.filter((row) => row.kind === "denoise");
    rows.push(...denoise.map(({ z, t, label }) => [fround(t), label, [...z]]));
    step = program.next(step.value.map((row) => output(row, c.config)));
  }
  return { rows, previews, pixels: [...(step.value.pixels ?? step.value)] };
});
process.stdout.write(JSON.stringify(results));
