/** The files of the folder: fetched in full, counted, and checked against the sizes and sha256 that network.json gives. */

import { loadError } from "./errors.js";

const FORMAT = "dsd-web-1";
const AGAIN = "copy the whole folder again, as dsd-export --web wrote it";

/** network.json of a folder. */
export async function fetchDescription(folder) {
  const response = await answer(new URL("network.json", folder), { cache: "no-cache" });
  let description;
  try {
    description = await response.json();
  } catch {
    throw loadError(`network.json is not JSON: ${AGAIN}.`);
  }
  if (description?.format === FORMAT) return description;
  throw loadError(
    `network.json is not of format ${FORMAT}: reload the page without the browser's cache; if that does not help, ` +
      "export the model again with dsd-export --web.",
  );
}

/** The address of a file. It contains the sha256, so that no cache answers with the file of an earlier export. */
export function addressOf(folder, name, { sha256 }) {
  const url = new URL(name, folder);
  url.searchParams.set("v", sha256.slice(0, 16));
  return url;
}

/**
 * Fetch files in parallel.
 * @param {string} folder  its address
 * @param {Object<string, {bytes: number, sha256: string}>} files  by name
 * @param {function(number)} onBytes  called with the size of every chunk
 * @returns {Promise<Object<string, Uint8Array>>} by name
 */
export async function fetchFiles(folder, files, onBytes) {
  const names = Object.keys(files);
  const contents = await Promise.all(names.map((name) => fetchFile(folder, name, files[name], onBytes)));
  return Object.fromEntries(names.map((name, i) => [name, contents[i]]));
}

async function fetchFile(folder, name, file, onBytes) {
  const response = await answer(addressOf(folder, name, file));
  const data = new Uint8Array(file.bytes);
  const reader = response.body.getReader();
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw loadError(`The connection was lost while ${name} was fetched.`);
    });
    if (done) break;
    if (length + value.length > data.length) {
      await reader.cancel();
      length = Infinity;
      break;
    }
    data.set(value, length);
    length += value.length;
    onBytes(value.length);
  }
  if (length !== data.length)
    throw loadError(`${name} is not the file of ${file.bytes} bytes that network.json names: ${AGAIN}.`);
  if (!(await isIntact(data, file.sha256))) throw loadError(`${name} is damaged, or of another export: ${AGAIN}.`);
  return data;
}

/** Whether bytes have a sha256. True on plain http, where browsers offer no hashes; `integrity` of fetch would check there
 * too, but gives no byte before the last, so that no progress could be shown. */
async function isIntact(data, sha256) {
  if (!globalThis.crypto?.subtle) return true;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

async function answer(url, options = {}) {
  const name = url.pathname.split("/").at(-1);
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw loadError(`${name} cannot be fetched: there is no connection, or ${url.origin} does not answer.`);
  }
  if (response.ok) return response;
  throw loadError(`${name} cannot be fetched, the answer has status ${response.status}: ${AGAIN}.`);
}
