/** How an image forms: its steps as a strip, and a slider that goes through them. */

import { element } from "./words.js";

const MOST = 16; // steps in the strip

/** The number of steps from one preview to the next. */
export function previewEvery(steps) {
  return Math.ceil(steps / MOST);
}

export class StepStrip {
  #frames = []; // {step, image}

  /** @param {HTMLElement} place  has a list and a range  @param {function(object, number)} onShow  image, step */
  constructor(place, onShow) {
    this.place = place;
    this.list = place.querySelector("ol");
    this.range = place.querySelector("input");
    this.onShow = onShow;
    this.range.oninput = () => this.#choose(this.range.valueAsNumber - 1);
  }

  /** Show the steps of an image. isDone: the last of them is the image itself */
  show(frames, isDone) {
    if (frames.length < this.#frames.length || frames[0] !== this.#frames[0]) this.list.replaceChildren();
    for (let i = this.list.children.length; i < frames.length; i++) this.list.append(this.#frame(frames[i], i));
    this.#frames = [...frames];
    this.place.hidden = !frames.length;
    this.range.max = Math.max(1, frames.length);
    this.range.value = frames.length;
    this.range.disabled = !isDone || frames.length < 2;
    this.#mark(frames.length - 1);
  }

  #frame({ image }, at) {
    const thumb = element("dsd-image", { class: "thumb" });
    thumb.show(image);
    const item = element("li", {}, thumb);
    item.onclick = () => {
      if (this.range.disabled) return;
      this.range.value = at + 1;
      this.#choose(at);
    };
    return item;
  }

  #choose(at) {
    const { image, step } = this.#frames[at];
    this.#mark(at);
    this.onShow(image, step);
  }

  #mark(at) {
    for (const [i, item] of [...this.list.children].entries()) item.classList.toggle("chosen", i === at);
    if (at >= 0) this.range.setAttribute("aria-valuetext", `step ${this.#frames[at].step}`);
  }
}
