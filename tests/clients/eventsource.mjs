// node eventsource.mjs URL: what an EventSource gets until it is closed, but for 9 seconds after the first `done`, as
// JSON. It would connect again after 3.
import { EventSource } from "eventsource";

const source = new EventSource(process.argv[2]);
const events = [];
for (const name of ["preview", "image", "done", "error"]) {
  source.addEventListener(name, (event) => events.push({ name, data: event.data ?? null }));
}
const until = async (holds, seconds) => {
  for (const end = Date.now() + 1000 * seconds; !holds() && Date.now() < end; ) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
};
await until(() => events.some((event) => event.name === "done"), 30);
await until(() => source.readyState === EventSource.CLOSED, 9);
console.log(JSON.stringify({ events, closed: source.readyState === EventSource.CLOSED }));
process.exit(0);
