/** Pixels, RGBA in rows from the top, on canvases and in files. */

const SIDES = { large: 512, medium: 256, thumb: 128 }; // least side of the canvas of a smooth image

/** How images are shown: "smooth", "sharp" or "true" (their true size). */
export const display = {
  get way() {
    return document.documentElement.dataset.display ?? "smooth";
  },
  set way(way) {
    document.documentElement.dataset.display = way;
    for (const image of document.querySelectorAll("dsd-image")) image.render();
  },
};

/** An image of the network: <dsd-image>, whose `show` takes its pixels. The style sheet sets its side on the page. */
export class ImageElement extends HTMLElement {
  #canvas = document.createElement("canvas");
  #image = null; // {pixels, width}

  connectedCallback() {
    if (this.#canvas.isConnected) return;
    this.append(this.#canvas);
    this.render();
  }

  /** @param {?{pixels: Uint8ClampedArray, width: number}} image  @param {string} label what it shows, in words */
  show(image, label = "") {
    this.#image = image;
    this.toggleAttribute("data-empty", !image);
    if (label) {
      this.setAttribute("role", "img");
      this.setAttribute("aria-label", label);
    } else {
      this.removeAttribute("role");
      this.removeAttribute("aria-label");
    }
    this.render();
  }

  get image() {
    return this.#image;
  }

  render() {
    if (!this.#image) return;
    const size = Object.keys(SIDES).find((name) => this.classList.contains(name));
    draw(this.#canvas, this.#image, display.way === "smooth" ? SIDES[size] : 0);
    this.style.setProperty("--pixels", `${this.#image.width}px`);
  }
}

/** Draw an image on a canvas, doubling its side until it is `side`, which is smoother than enlarging it at once. */
function draw(canvas, { pixels, width }, side) {
  let source = canvasOf(pixels, width);
  while (source.width < side) source = resized(source, Math.min(2 * source.width, Math.max(side, width)));
  canvas.width = canvas.height = source.width;
  canvas.getContext("2d").drawImage(source, 0, 0);
}

function canvasOf(pixels, side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(pixels, side, side), 0, 0);
  return canvas;
}

function resized(source, side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, side, side);
  return canvas;
}

/** The side of a saved image: as it is shown. */
export function savedSide(width) {
  return display.way === "true" ? width : Math.max(SIDES.large, width);
}

/** A PNG file of images in a grid, each as it is shown now. */
export async function pngOf(images) {
  const columns = Math.ceil(Math.sqrt(images.length));
  const side = savedSide(images[0].width) / (images.length > 4 && display.way !== "true" ? 2 : 1);
  const sheet = document.createElement("canvas");
  sheet.width = side * columns;
  sheet.height = side * Math.ceil(images.length / columns);
  const context = sheet.getContext("2d");
  context.imageSmoothingEnabled = false;
  const one = document.createElement("canvas");
  for (const [i, image] of images.entries()) {
    draw(one, image, display.way === "smooth" ? side : 0);
    context.drawImage(one, (i % columns) * side, Math.floor(i / columns) * side, side, side);
  }
  return await new Promise((resolve) => sheet.toBlob(resolve, "image/png"));
}

/** Save a file on the device of the visitor. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Peak signal-to-noise ratio of two images in dB; alpha is ignored. */
export function psnr(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) if (i % 4 !== 3) sum += (a[i] - b[i]) ** 2;
  return 10 * Math.log10(255 ** 2 / (sum / (0.75 * a.length)));
}

/** The squares of a sheet of equal images, as images. */
export async function cutClassImages({ url, columns, perClass, size }, base, count) {
  const image = new Image();
  image.src = new URL(url, base).href;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return Array.from({ length: count }, (_, i) => {
    const n = i * perClass; // the most typical one
    const pixels = context.getImageData((n % columns) * size, Math.floor(n / columns) * size, size, size).data;
    return { pixels, width: size };
  });
}
