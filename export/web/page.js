/** The page: loads the network, and shows the view that the address names. */

import { DSD } from "./client.js";
import { ClassTable } from "./page/classes.js";
import { DrawView } from "./page/draw_view.js";
import { History, savePNG } from "./page/history.js";
import { cutClassImages, display, ImageElement } from "./page/images.js";
import { address, parseLink } from "./page/link.js";
import { fileOf } from "./page/photo_file.js";
import { PhotoView } from "./page/photo_view.js";
import { Tabs } from "./page/tabs.js";
import { WalkView } from "./page/walk_view.js";
import { announce, button, clearNotice, duration, element, megabytes, notify, sentence } from "./page/words.js";

customElements.define("dsd-image", ImageElement);

const NAMES = { wasm: "WebAssembly", webgpu: "WebGPU" };

/** What the views share: the network, its classes, the history, and the actions on images. */
class Page {
  #times = []; // milliseconds of the last images

  constructor(network) {
    this.network = network;
    this.info = network.info;
    this.table = new ClassTable(this.info.classes);
    this.history = new History(this.info.name, (drawn) => this.actionsFor(drawn));
    this.views = { draw: new DrawView(this), photo: new PhotoView(this), walk: new WalkView(this) };
    this.links = { draw: "#draw", photo: "#photo", walk: "#walk" };
    this.tabs = new Tabs(document.querySelector("[role=tablist]"), (view) => this.visit(this.links[view]));
    addEventListener("popstate", () => this.#open());
    this.#listen();
    this.spent();
    this.#explain();
    this.#open();
    this.#showClasses();
  }

  /** Put a link into the address. replace: Back does not return to the address before it. */
  go(link, { replace = false } = {}) {
    this.links[parseLink(link).view] = link;
    if (link === location.hash) return;
    history[replace ? "replaceState" : "pushState"](null, "", link);
  }

  /** Go to a link, as if it were clicked. */
  visit(link) {
    if (link !== location.hash) history.pushState(null, "", link);
    this.#open();
  }

  #open() {
    const { view, values } = parseLink(location.hash);
    clearNotice();
    this.tabs.show(view);
    this.views[view].open(values);
  }

  /** Show what runs the network, what was fetched, and the time of an image. milliseconds: of an image just drawn */
  spent(milliseconds) {
    if (milliseconds !== undefined) this.#times.push(milliseconds);
    const recent = this.#times.slice(-8).sort((a, b) => a - b);
    const time = recent.length ? [`${duration(recent[Math.floor(recent.length / 2)])} an image`] : [];
    const { provider, fetchedBytes } = this.info;
    const parts = [NAMES[provider] ?? provider, `${megabytes(fetchedBytes)} fetched`, ...time];
    document.getElementById("engine").replaceChildren(...parts.map((part) => element("span", {}, part)));
  }

  #explain() {
    const { name, imageSize, modelBytes } = this.info;
    const size = `${imageSize} × ${imageSize} pixels`;
    document.getElementById("lead").textContent = `One network draws, encodes and decodes. Its images have ${size}.`;
    document.getElementById("about").textContent =
      `The network, ${name}, is one file of ${megabytes(modelBytes)} with three roles: it encodes images to latents, ` +
      `removes noise from latents, and decodes them to images. ${size} is the true size of its images; they are shown ` +
      "enlarged.";
  }

  /** Buttons for an image. */
  actionsFor(drawn) {
    const { link, walkEnd } = drawn;
    const leave = { "data-leaves": "" };
    const walk = (end) => () => {
      this.visit(this.links.walk);
      this.views.walk.take(end, walkEnd);
    };
    const edit = () => {
      this.visit("#photo");
      this.views.photo.edit(drawn);
    };
    return [
      button("Save PNG", () => savePNG(drawn)),
      ...(link ? [button("Copy link", () => this.copy(address(link)))] : []),
      button("Edit", edit, leave),
      ...(walkEnd ? [button("Walk from here", walk(0), leave), button("Walk to here", walk(1), leave)] : []),
    ];
  }

  /** The settings of an image under the names of the HTTP API, for its file. */
  settingsOf({ label, seed, index, steps, sampler, guidance, strength }) {
    const { name, fingerprint, settings, classes } = this.info;
    const drawnClass = classes.find((one) => one.index === label) ?? null;
    const [guidance_start, guidance_stop] = [settings.guidance_start.default, settings.guidance_stop.default];
    return {
      class: drawnClass,
      seed,
      index,
      steps,
      sampler,
      guidance,
      guidance_start,
      guidance_stop,
      strength,
      model: name,
      fingerprint,
    };
  }

  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      notify("The link is copied. It draws the same image again.", { kind: "done" });
    } catch {
      notify("The browser does not let this page copy. Copy the link by hand:", {
        kind: "hint",
        actions: [element("input", { value: text, readonly: "", "aria-label": "Link" })],
      });
    }
  }

  /** The images of the classes, where the folder has them. */
  async #showClasses() {
    const { classImages, classes } = this.info;
    if (!classImages) return;
    try {
      const images = await cutClassImages(classImages, new URL("./", import.meta.url), classes.length);
      classes.forEach(({ index }, i) => this.table.images.set(index, images[i]));
      for (const view of Object.values(this.views)) view.showImages();
    } catch {
      // The names are enough.
    }
  }

  /** Keys and files that concern the whole page. */
  #listen() {
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.network.cancel();
    });
    // A wrong field may be inside closed settings.
    addEventListener("invalid", ({ target }) => target.closest("details")?.setAttribute("open", ""), true);
    addEventListener("dragover", (event) => event.preventDefault());
    addEventListener("drop", (event) => {
      event.preventDefault();
      this.#take(fileOf(event.dataTransfer));
    });
    addEventListener("paste", (event) => this.#take(fileOf(event.clipboardData)));
  }

  /** A photo that was dropped or pasted anywhere on the page. */
  #take(file) {
    if (!file) return;
    this.visit("#photo");
    this.views.photo.input.read(file);
  }
}

function showDisplay() {
  for (const radio of document.querySelectorAll("#display input")) {
    radio.onchange = () => (display.way = radio.value);
    if (radio.checked) display.way = radio.value; // browsers restore the choice when the page is reloaded
  }
}

async function open() {
  const opening = document.getElementById("opening");
  const bar = opening.querySelector("progress");
  const words = document.getElementById("fetched-words");
  opening.hidden = false;
  words.textContent = "";
  bar.removeAttribute("value");
  try {
    const network = await DSD.load("./", ({ fetched, total, stage }) => {
      if (stage === "fetching") bar.value = fetched / total;
      else bar.removeAttribute("value");
      words.textContent = stage === "fetching" ? `${megabytes(fetched)} of ${megabytes(total)}` : "Starting";
    });
    opening.hidden = true;
    announce("The network is loaded.");
    new Page(network);
  } catch (error) {
    opening.hidden = true;
    const again = () => {
      clearNotice();
      open();
    };
    notify(sentence(error), { actions: [button("Try again", again, { class: "primary" })] });
    console.error(error);
  }
}

document.documentElement.dataset.running = ""; // all modules are there, see opening.js
showDisplay();
if (!document.querySelector(".notice.error")) open();
