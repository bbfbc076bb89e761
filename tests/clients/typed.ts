// Compiled against the types that openapi-typescript makes of /openapi.json, then run: typed.ts BASE_URL
import createClient from "openapi-fetch";
import type { paths } from "./schema";

const client = createClient<paths>({ baseUrl: process.argv[2] });
const answer = await client.POST("/v1/images/generations", { body: { prompt: "207", seed: 7 } });
const { data: classes } = await client.GET("/classes", { params: { query: { q: "retriever" } } });
const { data: png } = await client.GET("/generate", {
  params: { query: { class: "207", seed: 7 } },
  parseAs: "arrayBuffer",
});
const wrong = await client.POST("/generate", { body: { class: "no such thing" } });

// The types say what there is: these lines do not compile where an answer is `any` or unknown.
type IsAny<T> = 0 extends 1 & T ? true : false;
const typed: IsAny<NonNullable<typeof answer.data>> = false;
if (!answer.data || !("created" in answer.data)) throw new Error("an event stream, which was not asked for");
const drawn: string = answer.data.data[0].b64_json;
const names: string[] = (classes ?? []).map((one) => one.name);
console.log(
  JSON.stringify({ drawn, names, png: Buffer.from(png as ArrayBuffer).toString("base64"), typed, error: wrong.error }),
);
