/** The errors of the network; client.js says what each kind means. */

export class DSDError extends Error {
  /** @param {string} name the kind of error  @param {string} message a sentence for the user */
  constructor(name, message) {
    super(message);
    this.name = name;
  }
}

export const inputError = (message) => new DSDError("InputError", message);
export const loadError = (message) => new DSDError("LoadError", message);

/** An error as plain values, for a message from the worker to the page. */
export function toMessage(error) {
  return error instanceof DSDError
    ? { name: error.name, message: error.message }
    : { name: "EngineError", message: `The network failed: ${error?.message ?? error}` };
}
