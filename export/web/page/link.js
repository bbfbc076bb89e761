/**
 * The settings of a view in the address, such as #draw?class=145&seed=3, so that a link draws the same image again.
 *
 * A link can say anything: its values are checked, and a wrong one is replaced, which a sentence says.
 */

export const VIEWS = ["draw", "photo", "walk"];
export const MOST_IMAGES = 16;
const MAX_SEED = 2n ** 63n - 1n;

/** The view and the values of an address; an unknown view is the first. */
export function parseLink(hash) {
  const [view, query = ""] = hash.replace(/^#/, "").split("?");
  return { view: VIEWS.includes(view) ? view : VIEWS[0], values: Object.fromEntries(new URLSearchParams(query)) };
}

export function formatLink(view, values = {}) {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const query = new URLSearchParams(given).toString();
  return `#${view}${query && "?"}${query}`;
}

/** The address of the page with a hash, to copy. */
export function address(hash) {
  return new URL(hash, location.href).href;
}

export function randomSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000);
}

/** Whether a text is a seed or an index: 0 to 2^63 - 1. */
export function isSeed(text) {
  return /^\d{1,19}$/.test(text) && BigInt(text) <= MAX_SEED;
}

/** A seed or an index without leading zeros; an empty text is 0. */
export function plainSeed(text) {
  return String(BigInt(text));
}

/** The index `more` images after another; both stay exact beyond 2^53. */
export function laterIndex(index, more) {
  return String(BigInt(index) + BigInt(more));
}

/** How a link names the model that it was made with. */
export function modelMark({ fingerprint }) {
  return fingerprint.slice(0, 12);
}

/** Reads the values of a link for a model; `problems` are sentences about those that were replaced. */
export class LinkReader {
  problems = [];

  constructor(values, info) {
    this.values = values;
    this.info = info;
    const { model } = values;
    if (model && model !== modelMark(info))
      this.problems.push(`The link was made with another model. This one, ${info.name}, draws other images.`);
  }

  /** The label of a class: an index, a wnid or a name. */
  label(key, fallback) {
    const text = this.values[key];
    if (text === undefined || !this.info.classes.length) return fallback;
    const is = (c) => String(c.index) === text || c.wnid === text || c.name.toLowerCase() === text.toLowerCase();
    const found = this.info.classes.find(is);
    if (!found) this.problems.push(`This model has no class ${short(text)}.`);
    return found ? found.index : fallback;
  }

  seed(key, fallback) {
    const text = this.values[key];
    if (text === undefined) return fallback;
    if (isSeed(text)) return plainSeed(text);
    this.problems.push(`${key} must be a whole number from 0 to 2^63 - 1, not ${short(text)}; ${fallback} is used.`);
    return fallback;
  }

  /** The index of the first of n images; that of the last must be an index too. */
  index(n) {
    const index = this.seed("index", "0");
    const last = laterIndex(index, n - 1);
    if (isSeed(last)) return index;
    this.problems.push(`index + n - 1 must be at most 2^63 - 1, not ${last}; 0 is used as the index.`);
    return "0";
  }

  number(key, { least, most, default: fallback, whole = false }) {
    const text = this.values[key];
    if (text === undefined) return fallback;
    const value = text.trim() === "" ? NaN : Number(text);
    if (value >= least && value <= most && (!whole || Number.isInteger(value))) return value;
    this.problems.push(
      `${key} must be ${whole ? "a whole number" : "a number"} from ${least} to ${most}, not ${short(text)}; ` +
        `${fallback} is used.`,
    );
    return fallback;
  }

  choice(key, { choices, default: fallback }) {
    const text = this.values[key];
    if (text === undefined || choices.includes(text)) return text ?? fallback;
    this.problems.push(`${key} must be one of ${choices.join(", ")}, not ${short(text)}; ${fallback} is used.`);
    return fallback;
  }

  /** Steps, sampler and guidance. */
  sampling() {
    const { steps, sampler, guidance } = this.info.settings;
    return {
      steps: this.number("steps", { ...steps, whole: true }),
      sampler: this.choice("sampler", sampler),
      guidance: this.number("guidance", guidance),
    };
  }
}

function short(text) {
  return JSON.stringify(text.length > 40 ? `${text.slice(0, 40)}…` : text);
}
