/** Photos: files that visitors drop, choose or paste, as pixels of the network's size. */

import { resampled } from "../pixels.js";

const MOST_BYTES = 60e6;
const MOST_PIXELS = 120e6;
const SHOWN = 512; // side of the photo as it is shown
const GAP = 4; // a large photo is halved to no less than this multiple of the network's size, and then resampled

/** A photo that cannot be used; its message is a sentence for the visitor. */
export class PhotoError extends Error {
  name = "PhotoError";
}

/**
 * Read a file.
 * @param {File|Blob} file  @param {number} side  of the images of the network
 * @returns {Promise<Photo>}  its centre square; see `squareOf`. Raises PhotoError
 */
export async function readPhoto(file, side) {
  const name = file.name ? `“${file.name}”` : "The file";
  if (!file.size) throw new PhotoError(`${name} is empty. Choose a JPEG, PNG or WebP file.`);
  if (file.size > MOST_BYTES)
    throw new PhotoError(
      `${name} has ${Math.round(file.size / 1e6)} MB, more than the ${MOST_BYTES / 1e6} MB that can be read. ` +
        "Make it smaller.",
    );
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new PhotoError(await reason(file, name));
  }
  const { width, height } = bitmap;
  try {
    if (width * height > MOST_PIXELS)
      throw new PhotoError(
        `${name} has ${width} × ${height} pixels, more than the ${MOST_PIXELS / 1e6} million that can be read. ` +
          "Make it smaller.",
      );
    return squareOf(bitmap, width, height, side);
  } finally {
    bitmap.close();
  }
}

/**
 * The centre square of an image or a video.
 * @typedef {object} Photo
 * @property {Uint8ClampedArray} pixels  RGBA of side x side, what the network gets
 * @property {number} width              side
 * @property {{pixels: Uint8ClampedArray, width: number}} shown  the same square, large
 */
export function squareOf(source, width, height, side) {
  const square = Math.min(width, height);
  const [x, y] = [(width - square) / 2, (height - square) / 2];
  const large = canvasOf(Math.max(side, Math.min(SHOWN, square)));
  large.getContext("2d").drawImage(halved(source, x, y, square, large.width), 0, 0, large.width, large.width);
  const small = pixelsOf(halved(source, x, y, square, GAP * side));
  return { pixels: resampled(small.pixels, small.width, side), width: side, shown: pixelsOf(large) };
}

/** A square of an image, on white, halved as long as its side stays at least `least`: so every pixel contributes. */
function halved(source, x, y, square, least) {
  let size = Math.min(square, Math.max(2048, least));
  let canvas = canvasOf(size);
  canvas.getContext("2d").drawImage(source, x, y, square, square, 0, 0, size, size);
  while (size / 2 >= least) {
    size = Math.ceil(size / 2);
    const half = canvasOf(size);
    half.getContext("2d").drawImage(canvas, 0, 0, size, size);
    canvas = half;
  }
  return canvas;
}

function canvasOf(side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, side, side);
  return canvas;
}

function pixelsOf(canvas) {
  return { pixels: canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.width).data, width: canvas.width };
}

/** Why the browser cannot read a file, and what to do. */
async function reason(file, name) {
  const head = new TextDecoder("latin1").decode(
    await file
      .slice(0, 16)
      .arrayBuffer()
      .catch(() => new ArrayBuffer(0)),
  );
  if (/^.{4}ftyp(hei|hev|mif1|msf1)/s.test(head) || /\.hei[cf]$/i.test(file.name ?? ""))
    return (
      `${name} is a HEIC photo, which this browser cannot read. Share it as JPEG: in the Photos app of an iPhone, ` +
      "choose Options and “Most Compatible” when you share it."
    );
  if (/^.{4}ftypavi/s.test(head))
    return `${name} is an AVIF image, which this browser cannot read. Save it as JPEG, PNG or WebP.`;
  if (/^(II\*|MM.\*)/.test(head))
    return `${name} is a TIFF or raw photo, which browsers cannot read. Save it as JPEG, PNG or WebP.`;
  const isImage = /^\xff\xd8\xff|^.PNG|^GIF8|^RIFF.{4}WEBP|^BM/s.test(head); // "latin1" decodes 0x89 as windows-1252
  if (isImage)
    return `${name} cannot be read: it is damaged, cut off, or too large for this browser. Try another copy.`;
  return `${name} is not an image that browsers can read. Choose a JPEG, PNG or WebP file.`;
}

/** The first image among files that were dropped or pasted; without one the first file, if there is any. */
export function fileOf(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((file) => file.type.startsWith("image/")) ?? files[0];
}
