// node openai-node.mjs BASE_URL KEY PHOTO
import fs from "node:fs";
import OpenAI, { toFile } from "openai";
import { exercise } from "./openai.mjs";

const [baseURL, apiKey, photo] = process.argv.slice(2);
console.log(JSON.stringify(await exercise({ OpenAI, toFile }, { baseURL, apiKey, photo: fs.readFileSync(photo) })));
