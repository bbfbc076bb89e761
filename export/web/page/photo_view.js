/** A photo: what the network keeps of it, and editing. */

import { Brush } from "./brush.js";
import { ClassField } from "./classes.js";
import { Compare } from "./compare.js";
import { savePNG, showCaption } from "./history.js";
import { pngOf, psnr, save } from "./images.js";
import { randomSeed } from "./link.js";
import { PhotoInput } from "./photo_input.js";
import { SamplingFields } from "./sampling.js";
import { previewEvery } from "./steps.js";
import { announce, button, duration, element, isStop, notify, sentence } from "./words.js";
import { Work } from "./work.js";

const EXAMPLES = 5; // images to use instead of a photo

export class PhotoView {
  constructor(page) {
    this.page = page;
    const { info, network, table } = page;
    this.input = new PhotoInput("Choose a photo", info.imageSize, (photo) => this.#use(photo));
    document.getElementById("photo-drop").append(this.input.element);
    document.querySelector("#photo-hint p").textContent =
      `The network encodes a photo as ${info.latentShape[0] * info.latentShape[1]} numbers and decodes them again. ` +
      "See what it keeps, then redraw parts of it.";
    this.compare = new Compare(document.getElementById("compare"));
    this.form = document.getElementById("edit-form");
    this.work = new Work(this.form, network);
    this.sampling = new SamplingFields(document.getElementById("edit-sampling"), info, "edit-form");
    this.field = new ClassField(table, "Towards");
    this.field.value = table.classes[0]?.index ?? null;
    if (table.classes.length) document.getElementById("edit-class").append(this.field.element);
    this.brush = new Brush(document.getElementById("brush"), info.imageSize);
    this.edited = document.getElementById("edit-image");
    this.edited.show(null);
    const { strength, shown } = this.form.elements;
    const say = () => (shown.value = `${Math.round(100 * strength.valueAsNumber)} %`);
    strength.oninput = say;
    say();
    this.form.onsubmit = (event) => {
      event.preventDefault();
      this.#edit();
    };
  }

  showImages() {
    this.field.showImage();
  }

  open() {
    document.title = "Photo · DSD";
    this.page.go("#photo", { replace: true });
    this.#showExamples();
  }

  /** Images to use instead of a photo: those that were drawn, then those of the classes. */
  #showExamples() {
    const { history, table } = this.page;
    const ofClasses = table.classes
      .map(({ title, index }) => ({ ...table.images.get(index), title }))
      .filter(({ pixels }) => pixels);
    const examples = [...history.images, ...ofClasses].slice(0, EXAMPLES);
    const place = document.getElementById("photo-examples");
    place.hidden = !examples.length;
    const entries = examples.map((example) => {
      const image = element("dsd-image", { class: "thumb" });
      const taker = button("", () => this.input.take(example), {
        "aria-label": `${example.title}: use it as the photo`,
      });
      taker.append(image);
      image.show(example);
      return element("li", {}, taker);
    });
    place.querySelector("ul").replaceChildren(...entries);
  }

  /** Use an image that was drawn as the photo. */
  edit(drawn) {
    this.input.take(drawn);
    if (drawn.walkEnd) this.field.value = drawn.walkEnd.label;
    this.form.querySelector("h2").scrollIntoView({ block: "start" });
    this.field.opener.focus({ preventScroll: true });
  }

  async #use(photo) {
    this.brush.show(photo);
    this.form.hidden = false;
    try {
      this.page.network.cancel();
      const kept = await this.page.network.reconstruct({ pixels: photo.pixels });
      this.page.spent(kept.milliseconds);
      this.#showKept(photo, kept);
    } catch (error) {
      if (isStop(error)) return; // other work was started
      notify(sentence(error), { actions: [button("Try again", () => this.#use(photo))] });
    }
  }

  #showKept(photo, kept) {
    const { imageSize, latentShape } = this.page.info;
    document.getElementById("kept").hidden = false;
    document.getElementById("photo-hint").hidden = true;
    this.compare.show(photo, photo.shown ? "Your photo" : "The image", kept, "What is kept");
    const numbers = latentShape[0] * latentShape[1];
    const values = (3 * imageSize ** 2).toLocaleString("en");
    const detail =
      `${numbers} numbers for ${values} colour values. ` +
      `PSNR ${psnr(photo.pixels, kept.pixels).toFixed(1)} dB; higher is closer. ${duration(kept.milliseconds)}.`;
    showCaption(document.getElementById("kept-caption"), "What the network keeps", detail);
    const { pixels, width } = kept;
    const drawn = { pixels, width, title: "What is kept", detail: "of a photo", link: null, settings: {} };
    document.getElementById("kept-actions").replaceChildren(
      button("Save PNG", () => savePNG(drawn)),
      button("Save both", async () => save(await pngOf([photo, kept]), "dsd-photo-and-kept.png")),
    );
    this.page.history.add(drawn);
    announce("The network has encoded and decoded the photo.");
  }

  async #edit() {
    const { photo } = this.input;
    const label = this.field.value;
    const strength = this.form.elements.strength.valueAsNumber;
    const title = `Edit: ${this.page.table.title(label)}`;
    const caption = document.getElementById("edit-caption");
    const settings = {
      pixels: photo.pixels,
      label,
      strength,
      mask: this.brush.value,
      seed: randomSeed(),
      ...this.sampling.value,
    };
    const onStep = (step) => {
      this.edited.show(step, `${title}, step ${step.step} of ${step.steps}`);
      showCaption(caption, title, `Step ${step.step} of ${step.steps}`);
    };
    const outcome = await this.work.run(async () => {
      const made = await this.page.network.edit({ ...settings, onStep, previewEvery: previewEvery(settings.steps) });
      const detail = `Strength ${Math.round(100 * strength)} % · seed ${settings.seed}`;
      const { pixels, width } = made;
      const drawn = {
        pixels,
        width,
        title,
        detail,
        link: null,
        settings: this.page.settingsOf({ ...settings, index: "0" }),
      };
      this.page.spent(made.milliseconds);
      this.page.history.add(drawn);
      this.edited.show(drawn, title);
      showCaption(caption, title, detail);
      document.getElementById("edit-actions").replaceChildren(...this.page.actionsFor(drawn));
    });
    if (outcome === "done") announce("The photo is redrawn.");
  }
}
