"""python litellm-images.py BASE_URL KEY PHOTO: images by LiteLLM, as JSON."""

import json
import sys

import litellm

url, key, photo = sys.argv[1:]
asked = {"model": "openai/dsd-demo", "api_base": url, "api_key": key, "max_retries": 0}
drawn = litellm.image_generation(prompt="207", n=2, extra_body={"seed": 7}, **asked)
sized = litellm.image_generation(prompt="golden retriever", size="64x64", extra_body={"seed": 7}, **asked)
with open(photo, "rb") as file:
    edited = litellm.image_edit(image=file, prompt="1", extra_body={"seed": 7}, **asked)
try:
    litellm.image_generation(prompt="no such thing", **asked)
    refused = None
except litellm.BadRequestError as error:
    refused = str(error)
found = {
    "drawn": [one.b64_json for one in drawn.data],
    "sized": sized.data[0].b64_json,
    "edited": edited.data[0].b64_json,
    "refused": refused,
}
print(json.dumps(found))
