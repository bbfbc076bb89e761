/** An animation: played, paused, and moved by a slider. Where the system asks for less motion, it waits for Play. */

import { button, element } from "./words.js";

const FRAME = 140; // milliseconds
const wantsLessMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export class Player {
  #images = [];
  #timer = 0;
  #step = 1;

  /** @param {HTMLElement} place  @param {function(number): void} onShow  called with the number of the shown image */
  constructor(place, onShow) {
    this.onShow = onShow;
    this.image = element("dsd-image", { class: "large" });
    this.range = element("input", { type: "range", min: 0, max: 1, value: 0, "aria-label": "Position on the way" });
    this.range.oninput = () => {
      this.pause();
      this.#show(this.range.valueAsNumber);
    };
    this.toggle = button("Play", () => (this.#timer ? this.pause() : this.play()), { class: "play" });
    this.controls = element("div", { class: "player", hidden: true }, this.toggle, this.range);
    place.append(this.image, this.controls);
    this.image.show(null);
  }

  /** Show images; more may follow. */
  show(images, at) {
    this.#images = images;
    this.controls.hidden = images.length < 2;
    this.range.max = Math.max(1, images.length - 1);
    if (images.length) this.#show(at);
    else this.image.show(null);
  }

  play() {
    if (this.#images.length < 2 || this.#timer) return;
    this.toggle.textContent = "Pause";
    this.#timer = setInterval(() => this.#next(), FRAME);
  }

  playUnlessStill() {
    if (!wantsLessMotion()) this.play();
  }

  pause() {
    clearInterval(this.#timer);
    this.#timer = 0;
    this.toggle.textContent = "Play";
  }

  /** Forwards, then backwards, without end. */
  #next() {
    const at = this.range.valueAsNumber;
    if (at + this.#step < 0 || at + this.#step >= this.#images.length) this.#step = -this.#step;
    this.#show(at + this.#step);
  }

  #show(at) {
    const image = this.#images[Math.min(at, this.#images.length - 1)];
    if (!image) return;
    this.range.value = at;
    this.range.setAttribute("aria-valuetext", `image ${at + 1} of ${this.#images.length}`);
    this.image.show(image, `Image ${at + 1} of ${this.#images.length} on the way`);
    this.onShow(at);
  }
}
