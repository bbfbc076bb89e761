"""python generated.py PACKAGE_FOLDER URL KEY: calls a client of openapi-python-client, and prints the results as JSON.

The names of its modules are arbitrary, so routes are found by method and path.
"""

import base64
import importlib
import json
import sys
from pathlib import Path

package, url, key = sys.argv[1:]
folder = Path(package)
sys.path.insert(0, str(folder.parent))
Client = importlib.import_module(f"{folder.name}.client").AuthenticatedClient
client = Client(base_url=url, token=key, raise_on_unexpected_status=True)


def route(method, path):
    for file in (folder / "api").rglob("*.py"):
        text = file.read_text()
        if f'"method": "{method}"' in text and f'"url": "{path}"' in text:
            return importlib.import_module(".".join(file.relative_to(folder.parent).with_suffix("").parts))
    raise SystemExit(f"{method} {path} has no function")


def model(name):
    return getattr(importlib.import_module(f"{folder.name}.models"), name)


images = route("post", "/v1/images/generations")
answer = images.sync(client=client, body=model("GenerationRequest").from_dict({"prompt": "207", "seed": 7}))
image = route("get", "/generate").sync_detailed(client=client, class_="207", seed=7)
wrong = images.sync(client=client, body=model("GenerationRequest").from_dict({"prompt": "no such thing"}))
found = {
    "type": type(answer).__name__,
    "drawn": answer.data[0].b64_json,
    "bytes": base64.b64encode(image.content).decode(),
    "parsed": type(image.parsed).__name__,
    "classes": [one.name for one in route("get", "/classes").sync(client=client, q="retriever")],
    "wrong": type(wrong).__name__,
}
print(json.dumps(found))
