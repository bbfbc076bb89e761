/**
 * The network: one graph on ONNX Runtime Web, which runs rows and programs.
 *
 * WebAssembly runs it everywhere, on one thread, because threads need headers that static hosts do not send. WebGPU does
 * where the browser has an adapter and JavaScript Promise Integration, if in a test it draws the same images faster.
 */

import { loadError } from "./errors.js";
import { addressOf, fetchFiles } from "./files.js";
import { generate, reconstruct } from "./programs.js";

const KINDS = ["encode", "denoise", "decode"];
const OUTPUTS = { encode: "encoded_latents", denoise: "denoised_latents", decode: "decoded_pixels" };
const MOST_DIFFERENCE = 1; // grey levels between WebGPU and WebAssembly
const TEST = { seed: 0n, index: 0n, steps: 3, sampler: "euler", guidance: 2, guidance_start: 0, guidance_stop: 1 };

export class Network {
  /** Use `Network.open`. */
  constructor(ort, session, provider, config) {
    Object.assign(this, { ort, session, provider, config });
  }

  /**
   * Fetch the files and start the network.
   * @param {string} folder  its address
   * @param {object} description  network.json
   * @param {"auto"|"wasm"|"webgpu"} wanted  webgpu: even where it is slower
   * @param {function({fetched: number, total: number, stage: string})} onProgress
   */
  static async open(folder, description, wanted, onProgress) {
    const { config, files, graph, weights, runtime } = description;
    const kind = await runtimeFor(wanted, runtime);
    const { script, loader, binary } = runtime[kind];
    const fetching = Object.fromEntries([binary, graph, weights].map((name) => [name, files[name]]));
    const total = [...Object.values(fetching), files[script], files[loader]].reduce((sum, { bytes }) => sum + bytes, 0);
    let fetched = files[script].bytes + files[loader].bytes;
    const importing = import(addressOf(folder, script, files[script]));
    importing.catch(() => {}); // reported below, after the files
    const contents = await fetchFiles(folder, fetching, (bytes) => {
      fetched += bytes;
      onProgress({ fetched, total, stage: "fetching" });
    });
    onProgress({ fetched, total, stage: "starting" });
    const ort = await importing.catch((error) => {
      throw loadError(`${script} cannot be run: ${error.message}`);
    });
    Object.assign(ort.env, { logLevel: "error" });
    Object.assign(ort.env.wasm, {
      numThreads: 1,
      wasmBinary: contents[binary],
      wasmPaths: { mjs: addressOf(folder, loader, files[loader]).href },
    });
    const open = async (provider) => {
      const session = await ort.InferenceSession.create(contents[graph], {
        executionProviders: [provider],
        externalData: [{ path: weights.split("/").at(-1), data: contents[weights] }],
        logSeverityLevel: 3,
      });
      return new Network(ort, session, provider, config);
    };
    const network = await open("wasm").catch((error) => {
      throw loadError(`This browser cannot run the network: ${error.message}`);
    });
    ort.env.wasm.wasmBinary = undefined; // it is compiled, and its 14 MB can be freed
    network.fetchedBytes = fetched;
    return kind === "webgpu" ? network.orOnGPU(open, wanted === "webgpu") : network;
  }

  /** The network on the GPU if it draws the same images and is faster, otherwise this one. */
  async orOnGPU(open, evenIfSlower) {
    let onGPU;
    try {
      onGPU = await open("webgpu");
      await onGPU.test(); // compiles its kernels
      const [ours, theirs] = [await this.test(), await onGPU.test()];
      const difference = ours.pixels.reduce((most, value, i) => Math.max(most, Math.abs(value - theirs.pixels[i])), 0);
      if (difference > MOST_DIFFERENCE) throw new Error(`its image differs by ${difference} grey levels`);
      if (theirs.milliseconds < ours.milliseconds || evenIfSlower) {
        await this.session.release();
        return Object.assign(onGPU, { fetchedBytes: this.fetchedBytes });
      }
    } catch (error) {
      console.warn(`WebGPU is not used: ${error.message}`);
    }
    await onGPU?.session.release();
    return this;
  }

  /** Draw a small image, encode it and decode that: all kinds of rows. */
  async test() {
    const began = performance.now();
    const drawn = await this.runProgram(generate(this.config, [[0, 1]], TEST));
    const { pixels } = await this.runProgram(reconstruct(drawn));
    return { pixels: Float64Array.of(...drawn, ...pixels), milliseconds: performance.now() - began };
  }

  /**
   * Run a program to its end.
   * @param {Generator} program
   * @param {function(number): Promise} beforeRows  called before each call with its number of rows; may throw
   */
  async runProgram(program, beforeRows = async () => {}) {
    let step = program.next();
    while (!step.done) {
      await beforeRows(step.value.length);
      step = program.next(await this.run(step.value));
    }
    return step.value;
  }

  /** One forward pass over rows of any kinds; one output per row, in their order. */
  async run(rows) {
    const outputs = await this.session.run(this.collate(rows));
    const next = { encode: 0, denoise: 0, decode: 0 };
    const results = rows.map(({ kind }) => {
      const { data, dims } = outputs[OUTPUTS[kind]];
      const size = data.length / dims[0];
      const number = next[kind]++;
      return data.slice(number * size, (number + 1) * size);
    });
    for (const output of Object.values(outputs)) output.dispose();
    return results;
  }

  /** The inputs of the graph; the rows of each kind in their order. */
  collate(rows) {
    const { Tensor } = this.ort;
    const { imageSize, latentShape, flowMap } = this.config;
    const [images, noised, latents] = KINDS.map((kind) => rows.filter((row) => row.kind === kind));
    const joined = (Type, parts, size) => {
      const all = new Type(parts.length * size);
      parts.forEach((part, i) => all.set(part, i * size));
      return all;
    };
    const [tokens, channels] = latentShape;
    const pixelsOf = (some) => joined(Uint8Array, some.map((row) => row.pixels), 3 * imageSize ** 2);
    const latentsOf = (some) => joined(Float32Array, some.map((row) => row.z), tokens * channels);
    const count = noised.length;
    const times = (name) => new Tensor("float32", Float32Array.from(noised, (row) => row[name]), [count]);
    return {
      encode_pixels: new Tensor("uint8", pixelsOf(images), [images.length, 3, imageSize, imageSize]),
      denoise_latents: new Tensor("float32", latentsOf(noised), [count, tokens, channels]),
      denoise_t: times("t"),
      ...(flowMap ? { denoise_r: times("r") } : {}),
      denoise_labels: new Tensor("int64", BigInt64Array.from(noised, (row) => BigInt(row.label)), [count]),
      decode_latents: new Tensor("float32", latentsOf(latents), [latents.length, tokens, channels]),
    };
  }
}

/** Which build of the runtime to fetch: "webgpu", which can run WebAssembly too, or "wasm". */
async function runtimeFor(wanted, runtime) {
  if (wanted === "wasm" || !runtime.webgpu) return "wasm";
  const canWait = "Suspending" in WebAssembly; // JavaScript Promise Integration, which the build needs
  const adapter = canWait ? await globalThis.navigator?.gpu?.requestAdapter().catch(() => null) : null;
  const isSoftware = adapter?.info?.isFallbackAdapter ?? false;
  return adapter && (!isSoftware || wanted === "webgpu") ? "webgpu" : "wasm";
}
