/** The arguments of calls, checked: a wrong one raises an InputError that says what is allowed. */

import { inputError } from "./errors.js";

/** @returns all settings of a sampler: those in `given`, and the defaults in `settings` for the others. */
export function samplingParams(settings, given) {
  const params = {};
  for (const [name, setting] of Object.entries(settings)) {
    params[name] = checked(name, given[name] ?? setting.default, setting);
  }
  if (params.guidance_start > params.guidance_stop) {
    throw inputError(
      "guidance_start and guidance_stop must be times from 0 to 1 in this order, got " +
        `${params.guidance_start} and ${params.guidance_stop}`,
    );
  }
  return params;
}

function checked(name, value, setting) {
  if (setting.choices) {
    if (setting.choices.includes(value)) return value;
    throw inputError(`${name} must be one of ${setting.choices.join(", ")}, got ${shown(value)}`);
  }
  if (typeof setting.most === "string") return bigWhole(name, value, setting);
  if (setting.whole) return whole(name, value, setting.least, setting.most);
  return number(name, value, setting.least, setting.most);
}

/** A seed or an index as a BigInt: beyond 2^53 a number loses digits, so a BigInt or a string is needed there. */
function bigWhole(name, value, { most }) {
  const isDigits = typeof value === "string" && /^[0-9]{1,20}$/.test(value);
  const isExact = isDigits || typeof value === "bigint" || Number.isSafeInteger(value);
  if (isExact && BigInt(value) >= 0n && BigInt(value) <= BigInt(most)) return BigInt(value);
  throw inputError(
    `${name} must be a whole number from 0 to ${most}, beyond 2^53 a BigInt or a string of digits, got ${shown(value)}`,
  );
}

export function whole(name, value, least, most) {
  if (Number.isSafeInteger(value) && least <= value && value <= most) return value;
  throw inputError(`${name} must be a whole number from ${least} to ${most}, got ${shown(value)}`);
}

function number(name, value, least, most) {
  if (typeof value === "number" && least <= value && value <= most) return value;
  throw inputError(`${name} must be a number from ${least} to ${most}, got ${shown(value)}`);
}

/** The share of an edit's steps that are run. */
export function strengthOf(value) {
  if (typeof value === "number" && value > 0 && value <= 1) return value;
  throw inputError(`strength must be above 0 and at most 1, got ${shown(value)}`);
}

/** The label of a class; null and undefined are the null label, and the only one of a model without classes. */
export function labelOf(value, { classes, nullLabel }) {
  if (value === null || value === undefined) return nullLabel;
  if (classes.some(({ index }) => index === value)) return value;
  throw inputError(
    classes.length
      ? `label must be the index of one of the ${classes.length} classes that the model can draw, or null for none, ` +
          `got ${shown(value)}`
      : `label must be null, because the model has no classes, got ${shown(value)}`,
  );
}

/** An array of an expected type and length. what: its name and shape, for the error message. */
export function arrayOf(value, Types, length, what) {
  if (Types.some((Type) => value instanceof Type) && value.length === length) return value;
  const names = Types.map((Type) => Type.name).join(" or ");
  const got = ArrayBuffer.isView(value) ? `${value.constructor.name} of ${value.length}` : shown(value);
  throw inputError(`${what} must be ${names} of ${length} numbers, got ${got}`);
}

export function shown(value) {
  const text = typeof value === "string" ? JSON.stringify(value) : String(value);
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
}
