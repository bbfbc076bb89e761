/**
 * Programs, as in dsd_serve/programs.py: generators that yield rows, are sent their outputs and return a result.
 *
 * Rows: {kind: "encode", pixels}, {kind: "denoise", z, t, r, label}, {kind: "decode", z}. Pixels are Uint8Array of
 * 3 x H x W, latents Float32Array of L x C. config: {imageSize, patchSize, latentShape, nullLabel}. params: complete, as
 * params.js makes them. preview: null, or {every, show(step, steps, pixels)}; `show` is called with the decoded clean
 * estimate of every `every`-th step but the last.
 */

import { SAMPLERS, addNoise, guided, initialNoise, keeping, timesteps } from "./samplers.js";

const { acos, ceil, max, min, sin, sqrt } = Math;

export function* encode(pixels) {
  const [z] = yield [{ kind: "encode", pixels }];
  return z;
}

export function* decode(z) {
  const [pixels] = yield [{ kind: "decode", z }];
  return pixels;
}

/** Draw an image. labels: [[label, weight], ...], weights summing to 1. noise: used instead of the seed's. */
export function* generate(config, labels, params, preview = null, noise = initialNoise(params, config.latentShape)) {
  const denoise = guided(labels, params, config.nullLabel);
  return yield* decode(yield* sample(noise, timesteps(params.steps), denoise, params, preview));
}

/** What the network keeps of an image: {latents, pixels}. */
export function* reconstruct(pixels) {
  const latents = yield* encode(pixels);
  return { latents, pixels: yield* decode(latents) };
}

/**
 * Add noise to an image and sample from there towards a class (SDEdit).
 * mask: a number per pixel, not 0 where to redraw.
 */
export function* edit(config, pixels, label, params, strength, mask = null, preview = null) {
  const z = yield* encode(pixels);
  const ts = timesteps(ceil(params.steps * strength), 1 - strength);
  const noised = addNoise(z, initialNoise(params, config.latentShape), ts[0]);
  let denoise = guided([[label, 1]], params, config.nullLabel);
  if (mask) denoise = keeping(denoise, z, tokensOf(mask, config));
  const drawn = yield* decode(yield* sample(noised, ts, denoise, params, preview));
  return mask ? drawn.map((value, i) => (mask[i % mask.length] ? value : pixels[i])) : drawn;
}

/** The image at `fraction` of the way between two ends {label, seed, index}. */
export function interpolate(config, start, end, fraction, params) {
  const noises = [start, end].map((one) => initialNoise(one, config.latentShape));
  const isMixed = start.label !== end.label && fraction > 0 && fraction < 1;
  const [one, other] = [fraction === 1 ? end.label : start.label, end.label];
  // One label where one is enough, because every label costs a row.
  const labels = isMixed ? [[one, 1 - fraction], [other, fraction]] : [[one, 1]];
  return generate(config, labels, params, null, between(...noises, fraction));
}

/** A point on the great circle between two noises; at 0 and 1 the ends themselves. */
export function between(start, end, fraction) {
  if (fraction === 0) return start;
  if (fraction === 1) return end;
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const cosine = dot(start, end) / (sqrt(dot(start, start)) * sqrt(dot(end, end)));
  const angle = acos(min(max(cosine, -1), 1));
  if (angle < 1e-6) return start;
  const [first, second] = [sin((1 - fraction) * angle), sin(fraction * angle)];
  return start.map((value, i) => (first * value + second * end[i]) / sin(angle));
}

/** The tokens that a mask of pixels touches: one item per token. */
function tokensOf(mask, { imageSize, patchSize }) {
  const grid = imageSize / patchSize;
  const tokens = new Uint8Array(grid * grid);
  mask.forEach((value, i) => {
    const [row, column] = [Math.floor(i / imageSize), i % imageSize];
    if (value) tokens[Math.floor(row / patchSize) * grid + Math.floor(column / patchSize)] = 1;
  });
  return tokens;
}

function sample(z, ts, denoise, params, preview) {
  return SAMPLERS[params.sampler](z, ts, preview ? withPreviews(denoise, ts, preview) : denoise);
}

/** `denoise` that also decodes the clean estimate of a step, in the same call of the network as its next evaluation. */
function withPreviews(denoise, ts, { every, show }) {
  const count = ts.length - 1;
  const remaining = new Map(ts.slice(0, -1).map((t, i) => [t, i + 1]));
  let pending = null;
  return function* (z, t, r) {
    const inner = denoise(z, t, r);
    const rows = inner.next().value;
    const shown = pending;
    pending = null;
    const outputs = yield shown ? [...rows, { kind: "decode", z: shown.zHat }] : rows;
    if (shown) show(shown.step, count, outputs.at(-1));
    const zHat = inner.next(outputs.slice(0, rows.length)).value;
    const step = remaining.get(t);
    remaining.delete(t);
    if (step && step % every === 0 && step < count) pending = { step, zHat };
    return zHat;
  };
}
