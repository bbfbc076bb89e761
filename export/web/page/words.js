/** Words of the page: numbers with their units, names, sentences about errors, and where they are shown. */

const SPACE = "\u00a0"; // between a number and its unit

export function megabytes(bytes) {
  const value = bytes / 1e6;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)}${SPACE}MB`;
}

export function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)}${SPACE}ms` : `${(milliseconds / 1000).toFixed(1)}${SPACE}s`;
}

/** A name with a capital letter. */
export function titled(name) {
  return name.charAt(0).toUpperCase() + name.slice(1);
}

/** A name as part of a file's name. */
export function fileWord(text) {
  return text
    .toLowerCase()
    .normalize("NFD")
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 60);
}

/** An element with attributes, properties (those of functions and booleans) and children. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function" || typeof value === "boolean") made[name] = value;
    else if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A button with a text. */
export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, text);
}

/** Say to users of screen readers what was done. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** Show a sentence above the view, with buttons; results stay where they are. It replaces the sentence before it. */
export function notify(text, { kind = "error", actions = [] } = {}) {
  const close = button("Close", () => clearNotice(), { class: "close" });
  const notice = element("div", { class: `notice ${kind}` }, element("p", {}, text), ...actions, close);
  const notices = document.getElementById("notices");
  notices.replaceChildren(notice);
  notice.scrollIntoView({ block: "nearest" });
}

export function clearNotice() {
  document.getElementById("notices").replaceChildren();
}

/** Whether an error means that the visitor stopped the work. */
export function isStop(error) {
  return error?.name === "CancelledError";
}

/** A sentence for an error; those of the network are sentences already. */
export function sentence(error) {
  const known = ["InputError", "LoadError", "EngineError", "PhotoError"].includes(error?.name);
  return known ? error.message : `An unexpected error: ${error?.message ?? error}.`;
}
