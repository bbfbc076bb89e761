/** Pixels of a canvas, RGBA, and of the network: three planes of bytes. */

/** RGBA -> planes, Uint8Array of 3 x H x W; alpha is left out. */
export function toPlanes(rgba) {
  const count = rgba.length / 4;
  const planes = new Uint8Array(3 * count);
  for (let i = 0; i < count; i++) {
    for (let plane = 0; plane < 3; plane++) planes[plane * count + i] = rgba[4 * i + plane];
  }
  return planes;
}

/** Planes -> RGBA, opaque. */
export function toRGBA(planes) {
  const count = planes.length / 3;
  const rgba = new Uint8ClampedArray(4 * count);
  for (let i = 0; i < count; i++) {
    for (let plane = 0; plane < 3; plane++) rgba[4 * i + plane] = planes[plane * count + i];
    rgba[4 * i + 3] = 255;
  }
  return rgba;
}

/**
 * A square of RGBA at another size, by the Lanczos filter with three lobes: as Pillow resamples, and so the server.
 * @param {Uint8ClampedArray} rgba  width x width  @param {number} width  @param {number} side
 * @returns {Uint8ClampedArray}  side x side
 */
export function resampled(rgba, width, side) {
  const taps = Array.from({ length: side }, (_, i) => lanczosTaps(i, width, side));
  return filteredAndTransposed(filteredAndTransposed(rgba, width, taps), width, taps);
}

/** Pixel i of `side` as a weighted mean of pixels of `width`: the first of these, and their weights. */
function lanczosTaps(i, width, side) {
  const scale = width / side;
  const stretch = Math.max(scale, 1);
  const centre = (i + 0.5) * scale;
  const first = Math.max(0, Math.floor(centre - 3 * stretch + 0.5));
  const last = Math.min(width, Math.floor(centre + 3 * stretch + 0.5));
  const weights = Array.from({ length: last - first }, (_, k) => lanczos((first + k + 0.5 - centre) / stretch));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return { first, weights: weights.map((weight) => weight / sum) };
}

function lanczos(x) {
  if (x === 0) return 1;
  const angle = Math.PI * x;
  return Math.abs(x) < 3 ? (3 * Math.sin(angle) * Math.sin(angle / 3)) / angle ** 2 : 0;
}

/** Filters the rows of an image of `width` columns, and transposes it: doing so twice filters both directions. */
function filteredAndTransposed(rgba, width, taps) {
  const height = rgba.length / 4 / width;
  const out = new Uint8ClampedArray(4 * taps.length * height); // rounds and clips
  for (let y = 0; y < height; y++) {
    taps.forEach(({ first, weights }, x) => {
      for (let channel = 0; channel < 4; channel++) {
        const start = 4 * (y * width + first) + channel;
        out[4 * (x * height + y) + channel] = weights.reduce((sum, weight, k) => sum + weight * rgba[start + 4 * k], 0);
      }
    });
  }
  return out;
}
