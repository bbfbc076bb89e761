/** The images that were drawn: a strip, kept for this tab of the browser, and a dialog that shows one of them large. */

import { pngOf, save } from "./images.js";
import { withOrigin } from "./origin.js";
import { button, clearNotice, element, fileWord, notify } from "./words.js";

const MOST = 60; // images that are kept

/**
 * @typedef {object} Drawn  an image that was drawn
 * @property {Uint8ClampedArray} pixels
 * @property {number} width
 * @property {string} title   such as King penguin
 * @property {string} detail  its settings, in words
 * @property {?string} link   the hash that draws it again; null where a photo is needed
 * @property {?{label: number, seed: string, index: string}} [walkEnd]  for images of a class
 * @property {object} settings  those that draw it again, by their names in the HTTP API
 */

export class History {
  /** @type {Drawn[]} newest first */
  images = [];

  /** @param {string} model  its name  @param {function(Drawn): Node[]} actionsFor  buttons for an image */
  constructor(model, actionsFor) {
    this.key = `dsd-history:${model}`;
    this.actionsFor = actionsFor;
    this.section = document.getElementById("history");
    this.list = this.section.querySelector("ul");
    this.dialog = document.getElementById("lightbox");
    document.getElementById("history-actions").append(
      button("Save all as one image", () => this.#saveAll()),
      button("Clear", () => this.#clear()),
    );
    this.#prepareDialog();
    this.#fill(stored(this.key));
    addEventListener("pagehide", () => store(this.key, this.images)); // a reload may come before the timer
  }

  #fill(images) {
    this.images = images;
    this.list.replaceChildren(...images.map((drawn) => this.#entry(drawn)));
    this.#changed();
  }

  /** @param {Drawn} drawn */
  add(drawn) {
    this.images.unshift(drawn);
    this.list.prepend(this.#entry(drawn));
    while (this.images.length > MOST) {
      this.images.pop();
      this.list.lastElementChild.remove();
    }
    this.#changed();
  }

  #entry(drawn) {
    const image = element("dsd-image", { class: "thumb" });
    const opener = button("", () => this.open(drawn), {
      "aria-label": `${drawn.title}, ${drawn.detail}: enlarge`,
    });
    opener.append(image);
    image.show(drawn);
    return element("li", {}, opener);
  }

  #changed() {
    this.section.hidden = !this.images.length;
    // Soon, and once for many images in a row.
    clearTimeout(this.timer);
    this.timer = setTimeout(() => store(this.key, this.images), 300);
  }

  #clear() {
    const { images } = this;
    this.#fill([]);
    const undo = button("Undo", () => {
      this.#fill([...this.images, ...images].slice(0, MOST));
      clearNotice();
    });
    notify(`${images.length} images were cleared.`, { kind: "done", actions: [undo] });
    undo.focus();
  }

  async #saveAll() {
    save(await pngOf([...this.images].reverse()), "dsd-images.png");
  }

  #prepareDialog() {
    this.large = element("dsd-image", { class: "large" });
    this.caption = element("div", { class: "caption", role: "status" });
    this.actions = element("div", { class: "actions" });
    const step = (by) => {
      const to = this.images[this.images.indexOf(this.shown) + by];
      if (to) this.#show(to);
    };
    const before = button("Newer", () => step(-1));
    const after = button("Older", () => step(1));
    const close = button("Close", () => this.dialog.close());
    this.ends = { before, after };
    this.dialog.append(
      this.large,
      this.caption,
      this.actions,
      element("div", { class: "actions" }, before, after, close),
    );
    this.dialog.onkeydown = (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) step(by);
    };
    this.dialog.onclick = (event) => {
      if (event.target === this.dialog || event.target.closest("[data-leaves]")) this.dialog.close();
    };
  }

  open(drawn) {
    this.#show(drawn);
    this.dialog.showModal();
  }

  #show(drawn) {
    this.shown = drawn;
    this.large.show(drawn, `${drawn.title}, ${drawn.detail}`);
    showCaption(this.caption, drawn.title, drawn.detail);
    this.actions.replaceChildren(...this.actionsFor(drawn));
    const at = this.images.indexOf(drawn);
    this.ends.before.disabled = at <= 0;
    this.ends.after.disabled = at === this.images.length - 1;
  }
}

export function showCaption(place, title, detail) {
  place.replaceChildren(element("strong", {}, title), element("p", {}, detail));
}

/** Save an image as it is shown, with its origin in the file. */
export async function savePNG(drawn) {
  const { title, walkEnd, settings } = drawn;
  const number = walkEnd ? `-${walkEnd.seed}-${walkEnd.index}` : "";
  save(await withOrigin(await pngOf([drawn]), settings, Boolean(walkEnd)), `dsd-${fileWord(title)}${number}.png`);
}

/** The images that were kept. They may be from another version of the page, so they are checked. */
function stored(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key) ?? "[]").map(({ rgba, ...rest }) => {
      const pixels = Uint8ClampedArray.from(atob(rgba), (byte) => byte.charCodeAt(0));
      if (pixels.length !== 4 * rest.width ** 2 || typeof rest.title !== "string") throw new Error("not an image");
      return { ...rest, pixels };
    });
  } catch {
    return [];
  }
}

/** Keep images, as many as the browser has room for. */
function store(key, images) {
  const texts = images.map(({ title, detail, link, walkEnd, settings, width, pixels }) => {
    const rgba = btoa(Array.from(pixels, (byte) => String.fromCharCode(byte)).join(""));
    return { title, detail, link, walkEnd, settings, width, rgba };
  });
  for (const kept of [MOST, 20, 5, 0]) {
    try {
      sessionStorage.setItem(key, JSON.stringify(texts.slice(0, kept)));
      return;
    } catch {
      // Full, or forbidden: fewer images, then none.
    }
  }
}
