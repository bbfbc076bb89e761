/** Two images in one place: a slider moves the border between them. */

import { element } from "./words.js";

export class Compare {
  /** @param {HTMLElement} place */
  constructor(place) {
    this.before = element("dsd-image", { class: "large" });
    this.after = element("dsd-image", { class: "large" });
    this.range = element("input", {
      type: "range",
      min: 0,
      max: 100,
      value: 50,
      "aria-label": "Border between the two images",
    });
    this.frame = element(
      "div",
      { class: "frame" },
      this.after,
      this.before,
      this.range,
      element("span", { class: "handle", "aria-hidden": "true" }),
    );
    const names = element("div", { class: "names-of-sides", "aria-hidden": "true" }, element("span"), element("span"));
    this.names = names.children;
    place.append(element("div", { class: "compare" }, this.frame, names));
    this.range.oninput = () => this.#move();
    this.#move();
  }

  /** Show an image on the left and one on the right, with their names. */
  show(before, nameBefore, after, nameAfter) {
    this.before.show(before, `On the left: ${nameBefore}`);
    this.after.show(after, `On the right: ${nameAfter}`);
    [this.names[0].textContent, this.names[1].textContent] = [nameBefore, nameAfter];
  }

  #move() {
    this.frame.style.setProperty("--at", `${this.range.value}%`);
    this.range.setAttribute("aria-valuetext", `${this.range.value} % from the left`);
  }
}
