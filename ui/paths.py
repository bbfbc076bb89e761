"""Paths of the page: what Gradio needs, and our own."""

import re

STATE = "/studio/state"
THUMBNAIL = "/studio/class/{index}.png"
CHECKPOINT = "/studio/checkpoint/{step}.png"
IMAGE = "/studio/image/{image_id}.{kind}"
ZIP = "/studio/images.zip"
ICON = "/studio/icon.svg"
CLASS_IMAGES = "/studio/classes.webp"
UPLOAD = "/gradio_api/upload"
UPLOAD_PROGRESS = "/gradio_api/upload_progress"
FILE = "/gradio_api/file="

# First segments of the paths that a server hands to the page when it mounts it.
FIRST_SEGMENTS = frozenset(
    ("", "assets", "config", "favicon.ico", "gradio_api", "login", "logout", "manifest.json", "pwa_icon", "robots.txt",
     "static", "studio", "svelte", "theme.css")
)  # fmt: skip
# Prefixes of streams that stay open as long as a page does. A draining server does not wait for them.
STREAMS = ("/gradio_api/", "/studio/")

NAME = "[A-Za-z0-9_-]{1,64}"
READABLE = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json"
    rf"|/(assets|static|svelte)/.*"
    rf"|/studio/(state|class/[0-9]{{1,9}}\.png|checkpoint/[0-9]{{1,16}}\.png|images\.zip|icon\.svg|classes\.webp)"
    rf"|/studio/image/([0-9a-f]{{32}}|link)\.(png|webp)"
    rf"|/gradio_api/(app_id|info|startup-events|queue/data|theme\.css|heartbeat/{NAME}|call/(v2/)?{NAME}/{NAME})"
)
WRITABLE = re.compile(rf"/gradio_api/(queue/join|cancel|run/predict|call/(v2/)?{NAME})")
