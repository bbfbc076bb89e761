/** Drawing images of a class. */

import { ClassChooser } from "./classes.js";
import { showCaption } from "./history.js";
import { formatLink, isSeed, laterIndex, LinkReader, modelMark, MOST_IMAGES, plainSeed, randomSeed } from "./link.js";
import { SamplingFields } from "./sampling.js";
import { previewEvery, StepStrip } from "./steps.js";
import { announce, element, notify } from "./words.js";
import { Work } from "./work.js";

const KEPT = 20; // drawings to which Back returns without drawing again
const FIRST = { imagenet: 779, seed: "10" }; // school buses, which small models of ImageNet classes draw well

export class DrawView {
  #drawings = new Map(); // link -> {settings, link, images, isStopped}
  #shown = null; // the drawing on the page
  #at = 0; // which of its images is chosen

  /** @param {object} page  network, info, table, history, go, actionsFor, spent: see page.js */
  constructor(page) {
    this.page = page;
    this.form = document.getElementById("draw-form");
    this.work = new Work(this.form, page.network);
    this.chooser = new ClassChooser(page.table);
    if (page.table.classes.length) document.getElementById("draw-class").append(this.chooser.element);
    this.sampling = new SamplingFields(document.getElementById("draw-sampling"), page.info, "draw-form");
    this.sheet = document.getElementById("draw-sheet");
    this.steps = new StepStrip(document.getElementById("draw-steps"), (image, step) =>
      this.cells[this.#at].show(image, this.#label(this.#at, step)),
    );
    document.getElementById("draw-settings").hidden = false;
    const { seed, keep } = this.form.elements;
    seed.oninput = () => {
      keep.checked = true;
      seed.setCustomValidity(
        !seed.value || isSeed(seed.value) ? "" : "A seed is a whole number from 0 to 9223372036854775807.",
      );
    };
    this.form.onsubmit = (event) => {
      event.preventDefault();
      this.#submit();
    };
  }

  showImages() {
    this.chooser.showImages();
  }

  /** Show what a link names: from memory, or drawn again. */
  open(values) {
    if (this.#shown && location.hash === this.#shown.link) {
      this.#start(this.#shown.settings, this.#shown.link); // what the visitor has changed in the form stays
      return;
    }
    const { settings, problems } = this.#read(values);
    this.#fill(settings);
    const link = this.#link(settings);
    this.page.go(link, { replace: true });
    this.#start(settings, link);
    if (problems.length) notify(problems.join(" "), { kind: "hint" });
  }

  #read(values) {
    const { info, table } = this.page;
    const reader = new LinkReader(values, info);
    const first = table.byIndex.has(FIRST.imagenet) ? FIRST.imagenet : (table.classes[0]?.index ?? null);
    const n = reader.number("n", { least: 1, most: MOST_IMAGES, default: 4, whole: true });
    const settings = {
      label: reader.label("class", first),
      seed: reader.seed("seed", FIRST.seed),
      index: reader.index(n),
      n,
      ...reader.sampling(),
    };
    return { settings, problems: reader.problems };
  }

  #fill(settings) {
    this.chooser.value = settings.label;
    this.form.elements.n.value = settings.n;
    this.form.elements.seed.value = settings.seed;
    this.form.elements.seed.setCustomValidity("");
    this.sampling.value = settings;
  }

  #link({ label, index, ...rest }, changes = {}) {
    const values = {
      class: label,
      ...rest,
      index: index === "0" ? undefined : index,
      model: modelMark(this.page.info),
      ...changes,
    };
    return formatLink("draw", values);
  }

  #submit() {
    const { n, seed, keep } = this.form.elements;
    if (!keep.checked) seed.value = randomSeed();
    const settings = {
      label: this.chooser.value,
      seed: plainSeed(seed.value),
      index: "0",
      n: n.valueAsNumber,
      ...this.sampling.value,
    };
    const link = this.#link(settings);
    this.#drawings.delete(link); // the visitor asks for a new drawing
    this.page.go(link);
    this.#start(settings, link);
    document.getElementById("draw-result").scrollIntoView({ block: "nearest" });
  }

  #start(settings, link) {
    const known = this.#drawings.get(link);
    const images = Array.from({ length: settings.n }, () => ({ frames: [], drawn: null }));
    if (!known || known !== this.#shown) this.#at = 0;
    this.#shown = known ?? { settings, link, images };
    this.#drawings.set(link, this.#shown);
    if (this.#drawings.size > KEPT) this.#drawings.delete(this.#drawings.keys().next().value);
    document.title = `${this.page.table.title(settings.label)} · DSD`;
    this.#layOut();
    if (this.#shown.images.some(({ drawn }) => !drawn)) this.#draw(this.#shown);
  }

  /** Draw the images of a drawing that are missing. */
  async #draw(drawing) {
    const { settings, images } = drawing;
    drawing.isStopped = false;
    const missing = images.filter(({ drawn }) => !drawn);
    const outcome = await this.work.run(async () => {
      for (const [i, image] of images.entries()) {
        if (image.drawn) continue;
        image.frames = [];
        const { label, seed, steps, sampler, guidance } = settings;
        const index = laterIndex(settings.index, i);
        const onStep = (step) => {
          image.frames.push({ step: step.step, image: step });
          this.#refresh(drawing, i);
        };
        const made = await this.page.network.generate({
          label,
          seed,
          index,
          steps,
          sampler,
          guidance,
          previewEvery: previewEvery(steps),
          onStep,
        });
        image.drawn = this.#record(settings, index, made);
        image.frames.push({ step: steps, image: image.drawn });
        this.page.spent(made.milliseconds);
        this.page.history.add(image.drawn);
        this.#refresh(drawing, i);
      }
    });
    drawing.isStopped = outcome !== "done";
    if (this.#shown !== drawing) return;
    const title = this.page.table.title(settings.label);
    if (outcome === "done")
      announce(`${title}: ${missing.length === 1 ? "the image is" : `${missing.length} images are`} drawn.`);
    this.#refresh(drawing, this.#at);
  }

  #record(settings, index, { pixels, width }) {
    const { label, seed, steps, guidance } = settings;
    const detail = [
      `Seed ${seed}${index === "0" ? "" : `, image ${laterIndex(index, 1)}`}`,
      `${steps} ${steps === 1 ? "step" : "steps"}`,
      ...(guidance === 1 ? [] : [`guidance ${guidance}`]),
    ].join(" · ");
    return {
      pixels,
      width,
      title: this.page.table.title(label),
      detail,
      link: this.#link({ ...settings, index, n: 1 }),
      walkEnd: { label, seed, index },
      settings: this.page.settingsOf({ ...settings, index }),
    };
  }

  /** A sheet with a place for every image of the drawing. */
  #layOut() {
    const { images } = this.#shown;
    this.cells = images.map(() =>
      element("dsd-image", { class: images.length > 1 ? "medium" : "large", "data-empty": "" }),
    );
    const places = this.cells.map((cell, i) => {
      const radio = element("input", {
        type: "radio",
        name: "image",
        value: i,
        checked: i === this.#at,
        "aria-label": this.#label(i),
      });
      radio.onchange = () => this.#choose(i);
      return element("label", {}, radio, cell);
    });
    this.sheet.replaceChildren(this.sheet.firstElementChild, ...places);
    this.sheet.dataset.columns = Math.ceil(Math.sqrt(images.length));
    for (const i of images.keys()) this.#refresh(this.#shown, i);
  }

  #choose(i) {
    const before = this.#at;
    this.#at = i;
    this.#refresh(this.#shown, before);
    this.#refresh(this.#shown, i);
  }

  /** One image of a drawing has changed, or was chosen. */
  #refresh(drawing, i) {
    if (drawing !== this.#shown) return;
    const { frames, drawn } = drawing.images[i];
    const newest = frames.at(-1)?.image ?? null;
    this.cells[i].show(newest, newest ? this.#label(i) : "");
    if (i !== this.#at) return;
    this.steps.show(frames, Boolean(drawn));
    const { label, steps } = drawing.settings;
    const progress = drawing.isStopped ? "Stopped" : newest ? `Step ${newest.step} of ${steps}` : "Waiting";
    showCaption(document.getElementById("draw-caption"), this.page.table.title(label), drawn?.detail ?? progress);
    document.getElementById("draw-actions").replaceChildren(...(drawn ? this.page.actionsFor(drawn) : []));
  }

  #label(i, step) {
    const { settings, images } = this.#shown;
    const number = images.length > 1 ? `, image ${i + 1} of ${images.length}` : "";
    return `${this.page.table.title(settings.label)}${number}${step ? `, step ${step}` : ""}`;
  }
}
