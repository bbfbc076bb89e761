// node ai-sdk.mjs BASE_URL KEY PHOTO: images by the AI SDK, as JSON
import fs from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";

const [baseURL, apiKey, photo] = process.argv.slice(2);
const model = createOpenAICompatible({ name: "dsd", baseURL, apiKey }).imageModel("dsd-demo");
const settings = { model, maxRetries: 0, providerOptions: { dsd: { seed: 7 } } };

const drawn = await generateImage({ ...settings, prompt: "207", n: 2 });
const sized = await generateImage({ ...settings, prompt: "golden retriever", size: "64x64" });
const edited = await generateImage({ ...settings, prompt: { text: "1", images: [fs.readFileSync(photo)] } });
let refused = null;
try {
  await generateImage({ ...settings, prompt: "no such thing" });
} catch (error) {
  refused = { status: error.statusCode, message: error.message };
}
console.log(
  JSON.stringify({
    drawn: drawn.images.map((image) => image.base64),
    mediaType: drawn.image.mediaType,
    sized: sized.image.base64,
    edited: edited.image.base64,
    warnings: drawn.warnings,
    refused,
  }),
);
