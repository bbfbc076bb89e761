/** Walks between two drawn images or two photos. */

import { ClassField } from "./classes.js";
import { showCaption } from "./history.js";
import { pngOf, save } from "./images.js";
import { mixed } from "./latents.js";
import { address, formatLink, isSeed, LinkReader, modelMark, plainSeed, randomSeed } from "./link.js";
import { PhotoInput } from "./photo_input.js";
import { Player } from "./player.js";
import { SamplingFields } from "./sampling.js";
import { announce, button, element, notify, titled } from "./words.js";
import { Work } from "./work.js";

const ENDS = ["from", "to"];
const SEEDS = ["3", "8"];
const FIRST = [323, 301, 970, 950]; // labels of ImageNet between which walks look good
const N = { least: 3, most: 32, default: 12, whole: true };

export class WalkView {
  #link = "#walk";
  #images = []; // of the walk that is shown

  constructor(page) {
    this.page = page;
    this.form = document.getElementById("walk-form");
    this.work = new Work(this.form, page.network);
    this.sampling = new SamplingFields(document.getElementById("walk-sampling"), page.info, "walk-form");
    this.player = new Player(document.getElementById("walk-player"), (at) => this.#mark(at));
    this.strip = element("ol", { class: "strip", "aria-hidden": "true" });
    document.getElementById("walk-player").append(this.strip);
    this.ends = ENDS.map((name, i) => this.#end(name, i));
    document.getElementById("walk-ends").append(...this.ends.map(({ place }) => place));
    this.caption = document.getElementById("walk-caption");
    this.actions = document.getElementById("walk-actions");
    const { n, shown } = this.form.elements;
    n.oninput = () => (shown.value = n.value);
    for (const kind of this.form.elements.kind) kind.onchange = () => this.#showKind();
    this.#showKind();
    this.form.onsubmit = (event) => {
      event.preventDefault();
      if (this.#kind === "photos") this.#walkPhotos();
      else this.#submit();
    };
  }

  #end(name, i) {
    const { table, info } = this.page;
    const field = new ClassField(table, titled(name));
    const first = FIRST.filter((label) => table.byIndex.has(label))[i];
    field.value = first ?? table.classes[i ? table.classes.length - 1 : 0]?.index ?? null;
    const seed = element("input", {
      name: `${name}-seed`,
      inputmode: "numeric",
      pattern: "[0-9]{1,19}",
      required: true,
      autocomplete: "off",
      value: SEEDS[i],
    });
    const end = { field, seed, index: "0" };
    seed.oninput = () => {
      end.index = "0";
      seed.setCustomValidity(
        !seed.value || isSeed(seed.value) ? "" : "A seed is a whole number from 0 to 9223372036854775807.",
      );
    };
    const roll = button("New seed", () => {
      seed.value = randomSeed();
      seed.oninput();
    });
    const row = element(
      "div",
      { class: "row" },
      element("label", { class: "field" }, element("span", {}, "Seed"), seed),
      roll,
    );
    const drawn = element("div", { class: "end" }, ...(table.classes.length ? [field.element] : []), row);
    const photo = new PhotoInput(`Choose photo ${i + 1}`, info.imageSize, () => {});
    const place = element("fieldset", {}, element("legend", {}, titled(name)), drawn, photo.element);
    return Object.assign(end, { place, drawn, photo });
  }

  get #kind() {
    return this.form.elements.kind.value;
  }

  #showKind() {
    const isPhotos = this.#kind === "photos";
    for (const { drawn, photo } of this.ends) {
      drawn.hidden = isPhotos;
      photo.element.hidden = !isPhotos;
      for (const input of drawn.querySelectorAll("input")) input.disabled = isPhotos;
    }
  }

  showImages() {
    for (const { field } of this.ends) field.showImage();
  }

  /** Show what a link names; its walk is drawn, unless it is shown already. */
  open(values) {
    document.title = "Walk · DSD";
    if (!Object.keys(values).length || (location.hash === this.#link && this.#images.length)) {
      this.page.go(this.#link, { replace: true });
      return; // what the visitor has changed in the form stays
    }
    const reader = new LinkReader(values, this.page.info);
    for (const [i, end] of this.ends.entries()) {
      end.field.value = reader.label(ENDS[i], end.field.value);
      end.seed.value = reader.seed(`${ENDS[i]}_seed`, end.seed.value);
      end.index = reader.seed(`${ENDS[i]}_index`, "0");
    }
    this.form.elements.n.value = this.form.elements.shown.value = reader.number("n", N);
    this.sampling.value = reader.sampling();
    this.form.elements.kind.value = "classes";
    this.#showKind();
    const link = this.#linkOfForm();
    this.page.go(link, { replace: true });
    this.#walk(link);
    if (reader.problems.length) notify(reader.problems.join(" "), { kind: "hint" });
  }

  /** Use an image of a class as an end; 0 is the start. */
  take(number, { label, seed, index }) {
    const end = this.ends[number];
    this.form.elements.kind.value = "classes";
    this.#showKind();
    end.field.value = label;
    Object.assign(end, { index });
    end.seed.value = seed;
    end.seed.focus();
  }

  #linkOfForm() {
    const values = {};
    for (const [i, { field, seed, index }] of this.ends.entries())
      Object.assign(values, {
        [ENDS[i]]: field.value,
        [`${ENDS[i]}_seed`]: plainSeed(seed.value),
        [`${ENDS[i]}_index`]: index === "0" ? undefined : index,
      });
    return formatLink("walk", {
      ...values,
      n: this.form.elements.n.value,
      ...this.sampling.value,
      model: modelMark(this.page.info),
    });
  }

  #submit() {
    const link = this.#linkOfForm();
    this.page.go(link);
    this.#walk(link);
  }

  async #walk(link) {
    this.#link = link;
    const n = this.form.elements.n.valueAsNumber;
    const [start, end] = this.ends.map(({ field, seed, index }) => ({
      label: field.value,
      seed: plainSeed(seed.value),
      index,
    }));
    const names = this.ends.map(({ field }) => this.page.table.title(field.value));
    await this.#run(names.join(" to "), n, link, async (onImage) => {
      await this.page.network.walk({ start, end, n, ...this.sampling.value, onImage: ({ image }) => onImage(image) });
    });
  }

  async #walkPhotos() {
    const n = this.form.elements.n.valueAsNumber;
    const photos = this.ends.map(({ photo }) => photo.photo);
    const missing = photos.findIndex((photo) => !photo);
    if (missing >= 0) {
      notify(`Photo ${missing + 1} is missing: choose, drop or take one.`);
      return;
    }
    const { network, info } = this.page;
    await this.#run("Photo 1 to photo 2", n, null, async (onImage) => {
      const [start, end] = await Promise.all(photos.map(({ pixels }) => network.encode({ pixels })));
      for (let i = 0; i < n; i++)
        onImage(await network.decode({ latents: mixed(start.latents, end.latents, i / (n - 1), info.latentShape[1]) }));
    });
  }

  async #run(title, n, link, draw) {
    const images = (this.#images = []);
    this.player.pause();
    this.strip.replaceChildren();
    this.actions.replaceChildren();
    this.player.show(images, 0);
    showCaption(this.caption, title, "Waiting");
    document.getElementById("walk-result").scrollIntoView({ block: "nearest" });
    const outcome = await this.work.run(async () => {
      images.length = 0;
      this.strip.replaceChildren();
      await draw((image) => {
        images.push(image);
        this.page.spent(image.milliseconds);
        const thumb = element("dsd-image", { class: "thumb" });
        thumb.show(image);
        this.strip.append(element("li", {}, thumb));
        this.player.show(images, images.length - 1);
        showCaption(this.caption, title, `Image ${images.length} of ${n}`);
      });
    });
    if (images !== this.#images || !images.length) return;
    showCaption(
      this.caption,
      title,
      images.length === n ? `${n} images` : `Stopped after ${images.length} of ${n} images`,
    );
    const copy = link ? [button("Copy link", () => this.page.copy(address(link)))] : [];
    this.actions.replaceChildren(
      button("Save as one image", async () => save(await pngOf(images), "dsd-walk.png")),
      ...copy,
    );
    if (outcome !== "done") return;
    announce(`The walk of ${n} images is drawn.`);
    this.player.playUnlessStill();
  }

  #mark(at) {
    for (const [i, item] of [...this.strip.children].entries()) item.classList.toggle("chosen", i === at);
  }
}
