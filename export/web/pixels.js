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
