/** The control for a photo, which visitors drop, choose, paste or take. */

import { hasCamera, takePhoto } from "./camera.js";
import { fileOf, readPhoto } from "./photo_file.js";
import { button, clearNotice, element, notify, sentence } from "./words.js";

export class PhotoInput {
  /** @type {?Photo} */
  photo = null;

  /** @param {string} label  of the button  @param {number} side  @param {function(Photo): void} onPhoto */
  constructor(label, side, onPhoto) {
    this.side = side;
    this.onPhoto = onPhoto;
    this.file = element("input", {
      type: "file",
      accept: "image/*",
      class: "hidden",
      tabindex: -1,
      "aria-label": label,
    });
    this.file.onchange = () => {
      this.read(this.file.files[0]);
      this.file.value = ""; // so that the same file can be chosen again
    };
    this.preview = element("dsd-image", { class: "thumb", "data-empty": "" });
    const words = element("p", {}, "Drop a photo here, or paste one.");
    const choose = button(label, () => this.file.click());
    const take = button("Take a photo", () => this.#take());
    const actions = element("div", { class: "actions" }, choose, ...(hasCamera ? [take] : []));
    this.element = element("div", { class: "dropzone" }, this.preview, words, actions, this.file);
    this.#acceptDrops();
  }

  #acceptDrops() {
    const over = (isOver) => this.element.classList.toggle("over", isOver);
    this.element.ondragover = (event) => {
      event.preventDefault();
      over(true);
    };
    this.element.ondragleave = () => over(false);
    this.element.ondrop = (event) => {
      event.preventDefault();
      event.stopPropagation();
      over(false);
      const file = fileOf(event.dataTransfer);
      if (file) this.read(file);
      else notify("No file was dropped. Save the image first, then drop its file here.");
    };
  }

  async read(file) {
    if (!file) return;
    try {
      this.take(await readPhoto(file, this.side));
      clearNotice();
    } catch (error) {
      notify(sentence(error));
    }
  }

  async #take() {
    try {
      const photo = await takePhoto(this.side);
      if (photo) this.take(photo);
    } catch (error) {
      notify(sentence(error));
    }
  }

  /** Use a photo, or an image of the network. */
  take(photo) {
    this.photo = photo;
    this.preview.show(photo.shown ?? photo, "The chosen photo");
    this.onPhoto(photo);
  }
}
