/** Points between the latents of two images, as `between` in dsd_serve/programs.py. */

const EPSILON = 1e-5; // of the normalisation, as in the encoder

/**
 * A point on the straight line, normalised over the channels of each token, as by the encoder.
 * @param {Float32Array} start  @param {Float32Array} end  L x C numbers
 * @param {number} fraction  0 is the start, 1 the end  @param {number} channels  C
 */
export function mixed(start, end, fraction, channels) {
  if (fraction === 0 || fraction === 1) return fraction ? end : start;
  const z = Float64Array.from(start, (value, i) => (1 - fraction) * value + fraction * end[i]);
  for (let at = 0; at < z.length; at += channels) {
    const token = z.subarray(at, at + channels);
    const mean = token.reduce((sum, value) => sum + value, 0) / channels;
    const variance = token.reduce((sum, value) => sum + (value - mean) ** 2, 0) / channels;
    token.forEach((value, i) => (token[i] = (value - mean) / Math.sqrt(variance + EPSILON)));
  }
  return Float32Array.from(z);
}
