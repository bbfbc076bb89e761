/**
 * The network as the page sees it: an object whose calls are carried out by a worker, so that the page never freezes.
 *
 *     import { DSD } from "./client.js";
 *     const network = await DSD.load("./", ({ fetched, total }) => { bar.value = fetched / total; });
 *     const { pixels, width, height } = await network.generate({ label: 207, seed: 7 });
 *     context.putImageData(new ImageData(pixels, width, height), 0, 0);
 *
 * Calls are carried out one after another, in order. A call that fails rejects with a `DSDError`, whose `message` is a
 * sentence for the user and whose `name` is the kind of error:
 *
 *     InputError       an invalid argument; the sentence says what is allowed
 *     CancelledError   `cancel` was called
 *     LoadError        a file of the folder is missing or damaged, or this browser cannot run it
 *     EngineError      ONNX Runtime failed while running the network
 *
 * @typedef {object} Progress
 * @property {number} fetched   bytes so far
 * @property {number} total     bytes of all files that this browser fetches
 * @property {"fetching"|"starting"} stage   starting: all files are here; the graph is loaded and tested
 *
 * @typedef {object} ImageClass
 * @property {number} index   its label
 * @property {string} name    such as Golden Retriever
 * @property {string} [wnid]  WordNet id, where there is one
 *
 * @typedef {object} Setting  a setting of a call: its limits, both included, or its choices
 * @property {string} about   its meaning, in a phrase
 * @property {number|string} default  the model's recommendation
 * @property {number} [least]
 * @property {number} [most]
 * @property {string[]} [choices]
 *
 * @typedef {object} Info
 * @property {string} name          of the model
 * @property {string} fingerprint   of the model, as in the HTTP API: equal ones draw the same images
 * @property {string} version       of DSD
 * @property {number} imageSize     side of an image in pixels; all images are square
 * @property {[number, number]} latentShape   L tokens of C channels
 * @property {ImageClass[]} classes the classes that can be drawn, in the order of their labels; [] for a model without
 * @property {number} nullLabel     the label that means "no class"
 * @property {Object<string, Setting>} settings   steps, sampler, guidance, guidance_start, guidance_stop, seed, index
 * @property {"wasm"|"webgpu"} provider   what runs the network here
 * @property {string} runtime       version of ONNX Runtime Web
 * @property {number} modelBytes    size of graph and weights
 * @property {number} fetchedBytes  size of the files that were fetched; a host that compresses sends fewer bytes
 * @property {number} milliseconds  that `load` took
 * @property {?{url: string, columns: number, perClass: number, size: number}} classImages   one image with `perClass`
 *     squares of `size` pixels for each class: number k of class number i of `classes` is square n = i * perClass + k, in
 *     column n % columns, row floor(n / columns); null if there is none
 *
 * @typedef {object} Image
 * @property {Uint8ClampedArray} pixels   RGBA, rows from the top, as `ImageData` takes them
 * @property {number} width
 * @property {number} height
 * @property {number} milliseconds  of drawing, without the wait for earlier calls
 * @property {number} rows          rows that the network ran for it
 *
 * @typedef {object} Step  an unfinished image: the decoded clean estimate of a step
 * @property {number} step    from 1
 * @property {number} steps   of this call; an edit runs only some of the steps that were asked for
 * @property {Uint8ClampedArray} pixels   RGBA
 * @property {number} width
 * @property {number} height
 *
 * @typedef {object} Settings  settings of a sampler; those left out are as the model recommends (`info.settings`)
 * @property {number|bigint|string} [seed]   0 to 2^63 - 1, a string of digits or a BigInt beyond 2^53; 0 if left out
 * @property {number|bigint|string} [index]  number of the image of this seed, in the same range; 0 if left out
 * @property {number} [steps]
 * @property {string} [sampler]
 * @property {number} [guidance]         1 is off
 * @property {number} [guidance_start]   time from which guidance is on; 0 is noise, 1 is data
 * @property {number} [guidance_stop]
 * @property {number} [previewEvery]     with onStep: steps from one preview to the next; 1 if left out
 * @property {function(Step): void} [onStep]  called with the previews; the last step has none
 *
 * @typedef {object} WalkEnd
 * @property {?number} label
 * @property {number|bigint|string} [seed]
 * @property {number|bigint|string} [index]
 */

import { DSDError } from "./errors.js";

export { DSDError };

class Network {
  #worker;
  #calls = new Map(); // number of the call -> {resolve, reject, listeners}
  #count = 0;

  /** Use `DSD.load`. */
  constructor(worker) {
    this.#worker = worker;
    /** @type {Info} */
    this.info = null;
    worker.onmessage = ({ data }) => this.#receive(data);
    worker.onerror = (event) => {
      event.preventDefault();
      this.#failAll(new DSDError("LoadError", `The worker failed: ${event.message || "worker.js cannot be loaded"}.`));
    };
  }

  /**
   * Draw an image of a class.
   * @param {Settings & {label: ?number}} options  label: null for no class
   * @returns {Promise<Image>}
   */
  generate({ onStep, ...options }) {
    return this.#call("generate", { ...options, previews: Boolean(onStep) }, { step: onStep });
  }

  /**
   * Add noise to an image and sample from there towards a class.
   * @param {Settings & {pixels: Uint8ClampedArray, label: ?number, strength: number, mask: ?Uint8Array}} options
   *     pixels: RGBA of imageSize x imageSize; alpha is ignored. strength: the amount of noise, above 0 and at
   *     most 1; 1 keeps nothing. mask: imageSize x imageSize, not 0 where to redraw; other pixels do not change
   * @returns {Promise<Image>}
   */
  edit({ onStep, ...options }) {
    return this.#call("edit", { ...options, previews: Boolean(onStep) }, { step: onStep });
  }

  /**
   * Draw a walk: images from one end to another, both included.
   * @param {Settings & {start: WalkEnd, end: WalkEnd, n: number, onImage: function({number: number, image: Image})}}
   *     options  n: 2 to 100 images. onImage: called with each image when it is drawn, number from 0
   * @returns {Promise<Image[]>}
   */
  walk({ onImage, ...options }) {
    return this.#call("walk", options, { image: onImage });
  }

  /**
   * The latents of an image.
   * @param {{pixels: Uint8ClampedArray}} options  as in `edit`
   * @returns {Promise<{latents: Float32Array, milliseconds: number}>}  L x C numbers
   */
  encode(options) {
    return this.#call("encode", options);
  }

  /**
   * The image of latents.
   * @param {{latents: Float32Array}} options  L x C finite numbers
   * @returns {Promise<Image>}
   */
  decode(options) {
    return this.#call("decode", options);
  }

  /**
   * Encode an image and decode its latents: what the network keeps of it.
   * @param {{pixels: Uint8ClampedArray}} options  as in `edit`
   * @returns {Promise<Image & {latents: Float32Array}>}
   */
  reconstruct(options) {
    return this.#call("reconstruct", options);
  }

  /** Reject all calls so far with CancelledError; later calls are carried out. */
  cancel() {
    this.#worker.postMessage({ call: "cancel" });
    this.#failAll(new DSDError("CancelledError", "Stopped."));
  }

  /** End the worker and free its memory; unfinished calls reject with CancelledError. */
  close() {
    this.#worker.terminate();
    this.#failAll(new DSDError("CancelledError", "The network was closed."));
  }

  /** Load the network; for `DSD.load`. */
  async load(options, onProgress) {
    this.info = await this.#call("load", options, { progress: onProgress });
    return this;
  }

  #call(call, options, listeners = {}) {
    return new Promise((resolve, reject) => {
      const number = this.#count++;
      this.#calls.set(number, { resolve, reject, listeners });
      try {
        this.#worker.postMessage({ number, call, options });
      } catch (error) {
        this.#calls.delete(number);
        reject(new DSDError("InputError", `The arguments of ${call} cannot be sent to the worker: ${error.message}.`));
      }
    });
  }

  #receive({ number, event, value, error, result }) {
    const call = this.#calls.get(number);
    if (!call) return; // it was cancelled
    if (event) {
      call.listeners[event]?.(value);
      return;
    }
    this.#calls.delete(number);
    if (error) call.reject(new DSDError(error.name, error.message));
    else call.resolve(result);
  }

  #failAll(error) {
    const calls = [...this.#calls.values()];
    this.#calls.clear();
    for (const { reject } of calls) reject(error);
  }
}

export const DSD = {
  /**
   * Start a worker, which loads the network of a folder that dsd-export --web wrote.
   * @param {string|URL} [url]  the folder, relative to this module
   * @param {function(Progress): void} [onProgress]
   * @param {{provider: "auto"|"wasm"|"webgpu"}} [options]  auto: WebGPU where it is available, correct and faster
   * @returns {Promise<Network>}
   */
  async load(url = "./", onProgress = undefined, { provider = "auto" } = {}) {
    const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module", name: "dsd" });
    const network = new Network(worker);
    try {
      return await network.load({ url: new URL(url, import.meta.url).href, provider }, onProgress);
    } catch (error) {
      network.close();
      throw error;
    }
  },
};
