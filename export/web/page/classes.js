/** Choosing a class: tiles for a few, a list with a search for many, and a field that opens either in a dialog. */

import { button, element, titled } from "./words.js";

const MOST_TILES = 24;
let count = 0; // of choosers, for the names of their radio buttons

/** The classes of a model with their images, where the folder has these. */
export class ClassTable {
  constructor(classes) {
    this.classes = classes.map((one) => ({ ...one, title: titled(one.name), text: searchable(one) }));
    this.byIndex = new Map(this.classes.map((one) => [one.index, one]));
    this.images = new Map(); // index -> {pixels, width}
  }

  title(label) {
    return this.byIndex.get(label)?.title ?? "Image";
  }

  /** The classes that have all words of the query in their name, wnid or index. */
  search(query) {
    const words = plain(query).split(/\s+/).filter(Boolean);
    return this.classes.filter((one) => words.every((word) => one.text.includes(word)));
  }
}

function searchable({ name, wnid = "", index }) {
  return `${plain(name)} ${wnid} ${index}`;
}

/** A text in lower case and without accents. */
function plain(text) {
  return text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
}

/** Radio buttons for all classes: arrow keys choose, Enter submits their form. */
export class ClassChooser {
  #radios = new Map(); // index -> {radio, row, thumb}

  /** @param {ClassTable} table  @param {function(number): void} onChange */
  constructor(table, onChange = () => {}) {
    this.table = table;
    this.onChange = onChange;
    const hasTiles = table.classes.length <= MOST_TILES;
    const name = `class-${count++}`;
    this.list = element("div", { class: hasTiles ? "tiles" : "names" });
    for (const one of table.classes) this.list.append(this.#row(one, name));
    this.found = element("p", { class: "found", role: "status" });
    this.query = element("input", {
      type: "search",
      placeholder: "Any part of a name",
      autocomplete: "off",
      enterkeyhint: "search",
    });
    this.query.oninput = () => this.#filter();
    this.query.onkeydown = (event) => this.#key(event);
    const search = element(
      "label",
      { class: "field" },
      element("span", {}, `Search ${table.classes.length} classes`),
      this.query,
    );
    this.element = element(
      "fieldset",
      { class: "classes" },
      element("legend", {}, "Class"),
      ...(hasTiles ? [] : [search]),
      this.list,
      this.found,
    );
  }

  #row(one, name) {
    const radio = element("input", { type: "radio", name, value: one.index });
    radio.onchange = () => {
      this.chosen = one.index;
      this.onChange(one.index);
    };
    const thumb = element("dsd-image", { class: "thumb", "data-empty": "" });
    const row = element("label", { class: "class" }, radio, thumb, element("span", {}, one.title));
    this.#radios.set(one.index, { radio, row, thumb });
    return row;
  }

  /** Show the images of the classes, as far as they are loaded. */
  showImages() {
    for (const [index, image] of this.table.images) this.#radios.get(index)?.thumb.show(image);
    this.list.classList.toggle("has-images", this.table.images.size > 0);
  }

  get value() {
    return this.chosen ?? null;
  }

  set value(label) {
    this.chosen = label;
    const entry = this.#radios.get(label);
    if (!entry) return;
    entry.radio.checked = true;
    this.reveal();
  }

  /** Scroll the list, and not the page, to the chosen class. */
  reveal() {
    const row = this.#radios.get(this.chosen)?.row;
    if (row && this.list.scrollHeight > this.list.clientHeight)
      this.list.scrollTop = row.offsetTop - this.list.clientHeight / 2;
  }

  #filter() {
    const found = this.table.search(this.query.value);
    const shown = new Set(found.map((one) => one.index));
    for (const [index, { row }] of this.#radios) row.hidden = !shown.has(index);
    const { value } = this.query;
    if (!value.trim()) this.found.textContent = "";
    else if (!found.length) this.found.textContent = `No class has “${value}” in its name.`;
    else this.found.textContent = found.length === 1 ? "1 class" : `${found.length} classes`;
    this.first = value.trim() ? found[0] : undefined;
    this.list.scrollTop = 0;
  }

  /** Enter chooses the first class that was found and submits; the down arrow moves to the list. */
  #key(event) {
    if (event.key === "Enter" && this.first) {
      this.#choose(this.first.index);
    } else if (event.key === "ArrowDown") {
      const visible = [...this.#radios.values()].filter(({ row }) => !row.hidden);
      const next = visible.find(({ radio }) => radio.checked) ?? visible[0];
      next?.radio.focus();
      event.preventDefault();
    }
  }

  #choose(index) {
    this.value = index;
    this.onChange(index);
  }
}

/** A button with the chosen class, which opens a dialog to choose another. */
export class ClassField {
  /** @param {ClassTable} table  @param {string} label  such as "From" */
  constructor(table, label, onChange = () => {}) {
    this.table = table;
    this.thumb = element("dsd-image", { class: "thumb", "data-empty": "" });
    this.name = element("span", { class: "name" });
    this.opener = button("", () => this.#open(), { class: "opener", "aria-haspopup": "dialog" });
    this.opener.append(element("span", { class: "what" }, label), this.thumb, this.name);
    this.chooser = new ClassChooser(table, (index) => {
      this.value = index;
      onChange(index);
    });
    const form = element(
      "form",
      { method: "dialog" },
      this.chooser.element,
      element("button", { class: "primary" }, "Choose"),
    );
    this.dialog = element("dialog", { class: "choose", "aria-label": `${label}: choose a class` }, form);
    this.dialog.onclick = ({ target }) => {
      if (target === this.dialog) this.dialog.close(); // a click outside it
    };
    document.body.append(this.dialog); // it has a form, and forms do not nest
    this.element = this.opener;
  }

  #open() {
    this.chooser.showImages();
    this.dialog.showModal();
    this.chooser.value = this.value;
  }

  get value() {
    return this.chosen ?? null;
  }

  set value(label) {
    this.chosen = label;
    this.name.textContent = this.table.title(label);
    this.showImage();
  }

  showImage() {
    this.thumb.show(this.table.images.get(this.chosen) ?? null);
  }
}
