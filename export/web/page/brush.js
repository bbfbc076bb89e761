/** A mask to paint over an image: by mouse, by touch, and with the keys. */

import { button, element } from "./words.js";

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Brush {
  /** @param {HTMLElement} place  @param {number} side  of the images of the network */
  constructor(place, side) {
    this.side = side;
    this.mask = new Uint8Array(side * side);
    this.radius = side / 10;
    this.at = [side / 2, side / 2]; // where the keys paint
    this.image = element("dsd-image", { class: "large" });
    this.canvas = element("canvas", { width: side, height: side });
    this.cursor = element("span", { class: "cursor" });
    this.area = element("div", {
      class: "frame paint",
      tabindex: 0,
      role: "application",
      "aria-label": "Area to redraw",
      "aria-describedby": "brush-help",
    });
    this.area.append(this.image, this.canvas, this.cursor);
    this.words = element("p", { class: "found", role: "status" });
    this.size = element("input", { type: "range", min: 1, max: side / 4, step: 0.5, value: this.radius });
    this.size.oninput = () => {
      this.radius = this.size.valueAsNumber;
      this.#place();
    };
    this.eraser = button("Eraser", () => this.eraser.setAttribute("aria-pressed", this.#value === 1), {
      "aria-pressed": "false",
    });
    place.append(
      element("h3", {}, "Area to redraw"),
      this.area,
      element(
        "small",
        { id: "brush-help" },
        "Paint over the part to redraw; if nothing is painted, all of the image is redrawn. With the keyboard: the " +
          "arrow keys move the brush, Space paints, Delete erases.",
      ),
      this.words,
      element("label", { class: "field" }, element("span", {}, "Brush"), this.size),
      element("div", { class: "actions" }, this.eraser, ...this.#presets()),
    );
    this.#listen();
    this.#place();
  }

  /** Buttons for common areas, which need no brush. */
  #presets() {
    const { side } = this;
    const within = (low, high) => (value) => value >= low * side && value < high * side;
    const centre = within(0.25, 0.75);
    const set = (holds) => () => this.#fill(holds);
    return [
      button(
        "Centre",
        set((x, y) => centre(x) && centre(y)),
      ),
      button(
        "Left half",
        set((x) => x < side / 2),
      ),
      button(
        "Top half",
        set((_, y) => y < side / 2),
      ),
      button(
        "Invert",
        set((x, y, old) => !old),
      ),
      button(
        "Clear",
        set(() => false),
      ),
    ];
  }

  get #value() {
    return this.eraser.getAttribute("aria-pressed") === "true" ? 0 : 1;
  }

  /** The mask, or null if nothing is painted: then all of the image is redrawn. */
  get value() {
    return this.mask.some(Boolean) ? this.mask : null;
  }

  /** Show an image to paint over; the mask is kept. */
  show(image) {
    this.image.show(image, "");
  }

  #fill(holds) {
    this.mask.forEach((old, i) => (this.mask[i] = holds(i % this.side, Math.floor(i / this.side), old) ? 1 : 0));
    this.#painted();
  }

  /** Paint a disc, or erase it. */
  #dab([cx, cy], value) {
    const { side, radius } = this;
    for (let y = Math.max(0, Math.floor(cy - radius)); y <= Math.min(side - 1, cy + radius); y++)
      for (let x = Math.max(0, Math.floor(cx - radius)); x <= Math.min(side - 1, cx + radius); x++)
        if ((x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 <= radius ** 2) this.mask[y * side + x] = value;
  }

  /** Paint discs along a line, so that a quick stroke has no gaps. */
  #stroke(from, to, value) {
    const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1])));
    for (let i = 0; i <= steps; i++)
      this.#dab(
        [0, 1].map((k) => from[k] + ((to[k] - from[k]) * i) / steps),
        value,
      );
    this.#painted();
  }

  #painted() {
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(this.side, this.side);
    this.mask.forEach((value, i) => image.data.set(value ? [15, 118, 110, 255] : [0, 0, 0, 0], 4 * i));
    context.putImageData(image, 0, 0);
    const share = this.mask.reduce((sum, value) => sum + value, 0) / this.mask.length;
    this.words.textContent = share ? `${Math.round(100 * share)} % of the image will be redrawn.` : "";
  }

  #listen() {
    let last = null;
    this.area.onpointerdown = (event) => {
      if (event.button) return;
      this.area.setPointerCapture(event.pointerId);
      event.preventDefault(); // no scrolling, no selection
      this.area.focus({ preventScroll: true });
      this.area.classList.remove("by-keys");
      last = this.#point(event);
      this.#stroke(last, last, this.#value);
    };
    this.area.onpointermove = (event) => {
      if (!last) return;
      const next = this.#point(event);
      this.#stroke(last, next, this.#value);
      last = next;
    };
    this.area.onpointerup = this.area.onpointercancel = () => (last = null);
    this.area.onkeydown = (event) => this.#key(event);
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const within = (value) => Math.min(this.side - 0.01, Math.max(0, value * this.side));
    return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
  }

  #key(event) {
    const step = KEYS[event.key];
    const value = { " ": 1, Enter: 1, Delete: 0, Backspace: 0 }[event.key];
    if (!step && value === undefined) return;
    event.preventDefault(); // Enter paints here; elsewhere it submits the form
    this.area.classList.add("by-keys");
    if (step) {
      const far = event.shiftKey ? this.radius * 2 : Math.max(1, this.side / 32);
      this.at = this.at.map((old, k) => Math.min(this.side - 0.5, Math.max(0.5, old + far * step[k])));
      this.#place();
    } else {
      this.#stroke(this.at, this.at, value);
    }
  }

  /** Move the circle that shows where the keys paint. */
  #place() {
    for (const [name, size] of [
      ["--x", this.at[0]],
      ["--y", this.at[1]],
      ["--r", this.radius],
    ])
      this.area.style.setProperty(name, `${(100 * size) / this.side}%`);
  }
}
