"""dsd-ui: the page in the browser, a client of the HTTP API."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import of gradio: nothing leaves the machine
os.environ.setdefault("PATH", os.defpath)  # gradio imports pydub, which fails without PATH
