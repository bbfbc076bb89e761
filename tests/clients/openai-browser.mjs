// Bundled by esbuild, for a page: window.exercise({ baseURL, apiKey, photo: [bytes] })
import OpenAI, { toFile } from "openai";
import { exercise } from "./openai.mjs";

window.exercise = ({ photo, ...options }) =>
  exercise(
    { OpenAI, toFile },
    { ...options, photo: new Uint8Array(photo), settings: { dangerouslyAllowBrowser: true } },
  );
