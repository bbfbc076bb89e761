"""Events of the page, sent as a browser sends them."""

import json


async def click_of(http, element):
    """The number of the click event of a button."""
    config = (await http.get("/config")).json()
    button = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == element)
    return next(one["id"] for one in config["dependencies"] if [button, "click"] in one["targets"])


def generate_inputs(seed, n, steps):
    """The inputs of Generate, in order."""
    return [None, seed, True, n, 0, steps, "heun", 1.5, 0, 1, None]


async def pressed(http, session, event, data):
    """The messages to a browser about its event; the last is `process_completed`."""
    query = {"session_hash": session}
    body = {"data": data, "fn_index": event, "event_data": None}
    joined = (await http.post("/gradio_api/queue/join", json={**body, **query})).raise_for_status().json()
    async with http.stream("GET", "/gradio_api/queue/data", params=query) as stream:
        async for line in stream.aiter_lines():
            message = json.loads(line[5:]) if line.startswith("data:") else {}
            if message.get("event_id") == joined["event_id"]:
                yield message
            if message.get("msg") == "process_completed":
                break
