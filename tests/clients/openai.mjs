// What a program does with OpenAI's client, in Node and in a browser: everything that came back, as JSON.

export async function exercise({ OpenAI, toFile }, { baseURL, apiKey, photo, settings = {} }) {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, ...settings });
  const asked = { prompt: "207", seed: 7 };
  const image = () => toFile(photo, "photo.png", { type: "image/png" });

  const { data: drawn, request_id } = await client.images.generate({ ...asked, n: 2 }).withResponse();
  const events = [];
  for await (const event of await client.images.generate({ ...asked, stream: true, partial_images: 2 })) {
    events.push(event);
  }
  const edited = await client.images.edit({ image: await image(), prompt: "1", seed: 7 });
  const varied = await client.images.createVariation({ image: await image(), seed: 7 });
  const models = await client.models.list();

  const wrong = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0, ...settings });
  const big = await toFile(new Uint8Array(29_000_000), "big.png", { type: "image/png" });
  return {
    drawn: drawn.data.map((one) => one.b64_json),
    request_id,
    types: events.map((event) => event.type),
    last: events.at(-1).b64_json,
    edited: edited.data[0].b64_json,
    varied: varied.data[0].b64_json,
    models: models.data.map((model) => model.id),
    refused: {
      unknown: await refusal(client.images.generate({ prompt: "no such thing" })),
      big: await refusal(client.images.edit({ image: big, prompt: "1" })),
      key: await refusal(wrong.images.generate(asked)),
      bigAndKey: await refusal(wrong.images.edit({ image: big, prompt: "1" })),
    },
  };
}

async function refusal(asked) {
  try {
    await asked;
    return null;
  } catch (error) {
    return { status: error.status ?? null, message: String(error.message) };
  }
}
