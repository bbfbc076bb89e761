/**
 * Samplers of the flow dz/dt = velocity from t = 0 (noise) to t = 1 (data), as in dsd_serve/samplers.py.
 *
 * A sampler takes noise z, increasing timesteps that end at 1, and `denoise`, a generator function (z_t, t, r) -> z_hat;
 * r is the time that a flow map jumps to. It yields the rows that `denoise` yields, and is sent their outputs. Latents
 * are Float32Array, and every operation on them is rounded to float32, as NumPy rounds it; times are doubles.
 */

import { standardNormal } from "./philox.js";

const { fround, log } = Math;

/** steps + 1 evenly spaced times from `start` to 1. */
export function timesteps(steps, start = 0) {
  return [...Array.from({ length: steps }, (_, i) => start + ((1 - start) * i) / steps), 1];
}

/** Standard normal noise of a seed and an index, for latents of the shape [L, C]. */
export function initialNoise({ seed, index }, [tokens, channels]) {
  return standardNormal(seed, index, tokens * channels);
}

/** z_t, the point on the straight path from noise to z. */
export function addNoise(z, noise, t) {
  const [data, rest] = [fround(t), fround(1 - fround(t))];
  return z.map((value, i) => fround(data * value) + fround(rest * noise[i]));
}

/** The velocity at z_t that the clean estimate z_hat implies; t < 1. */
export function velocity(zHat, z, t) {
  const rest = fround(1 - t);
  return zHat.map((value, i) => fround(value - z[i]) / rest);
}

const along = (z, by, v) => z.map((value, i) => value + fround(fround(by) * v[i]));

/** Whether a step at time t needs the row without a class. */
export function isGuided(params, t) {
  return params.guidance !== 1 && params.guidance_start <= t && t <= params.guidance_stop;
}

/**
 * Clean estimates with classifier-free guidance. labels: [[label, weight], ...], weights summing to 1.
 */
export function guided(labels, params, nullLabel) {
  return function* (z, t, r) {
    const rows = labels.map(([label]) => ({ kind: "denoise", z, t, r, label }));
    const needsNull = isGuided(params, t);
    if (needsNull) rows.push({ kind: "denoise", z, t, r, label: nullLabel });
    const outputs = yield rows;
    const zHat = average(outputs.slice(0, labels.length), labels);
    if (!needsNull) return zHat;
    const scale = fround(params.guidance);
    const zNull = outputs.at(-1);
    return zNull.map((value, i) => value + fround(scale * fround(zHat[i] - value)));
  };
}

function average(estimates, labels) {
  if (estimates.length === 1) return estimates[0];
  const total = new Float32Array(estimates[0].length);
  estimates.forEach((estimate, number) => {
    const weight = fround(labels[number][1]);
    for (let i = 0; i < total.length; i++) total[i] += fround(weight * estimate[i]);
  });
  return total;
}

/** `denoise` that redraws only the tokens marked in `drawn`, one item per token; the others are those of z. */
export function keeping(denoise, z, drawn) {
  const channels = z.length / drawn.length;
  return function* (zt, t, r) {
    const zHat = yield* denoise(zt, t, r);
    return zHat.map((value, i) => (drawn[Math.floor(i / channels)] ? value : z[i]));
  };
}

function* steps(ts) {
  for (let i = 0; i + 1 < ts.length; i++) yield [ts[i], ts[i + 1]];
}

function* euler(z, ts, denoise) {
  for (const [t, next] of steps(ts)) z = along(z, next - t, velocity(yield* denoise(z, t, t), z, t));
  return z;
}

function* heun(z, ts, denoise) {
  for (const [t, next] of steps(ts)) {
    const v = velocity(yield* denoise(z, t, t), z, t);
    let zNext = along(z, next - t, v);
    if (next < 1) {
      const vNext = velocity(yield* denoise(zNext, next, next), zNext, next);
      const by = fround(next - t);
      zNext = z.map((value, i) => value + fround(by * fround(v[i] + vNext[i])) / 2);
    }
    z = zNext;
  }
  return z;
}

/** DPM-Solver++(2M): the first step is first order, the last, and from noise also the second. */
function* dpmpp2m(z, ts, denoise) {
  let previous = null;
  for (const [t, next] of steps(ts)) {
    const zHat = yield* denoise(z, t, t);
    let estimate = zHat;
    if (previous !== null && previous.t > 0 && next < 1) {
      const ratio = (halfLogSNR(t) - halfLogSNR(previous.t)) / (halfLogSNR(next) - halfLogSNR(t));
      const [before, by] = [previous.zHat, fround(2 * ratio)];
      estimate = zHat.map((value, i) => value + fround(fround(value - before[i]) / by));
    }
    z = along(z, next - t, velocity(estimate, z, t));
    previous = { t, zHat };
  }
  return z;
}

/** A flow map: each estimate is for the jump from t to the next time. */
function* flowMap(z, ts, denoise) {
  for (const [t, next] of steps(ts)) z = along(z, next - t, velocity(yield* denoise(z, t, next), z, t));
  return z;
}

const halfLogSNR = (t) => log(t / (1 - t));

export const SAMPLERS = { euler, heun, dpmpp_2m: dpmpp2m, flow_map: flowMap };
