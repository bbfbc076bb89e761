"""The page against a real server, through Gradio's own client."""

import base64

import pytest
from PIL import Image

from dsd_serve.client import Client
from dsd_serve.images import write_image
from tests.conftest import Running, picture


@pytest.fixture(scope="module")
def page_url(server_url):
    from ui.page import build_page

    page = build_page(Client(server_url))
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield url
    page.close()


def test_generate_and_reconstruct_by_gradio_client(page_url, tmp_path):
    from gradio_client import Client as GradioClient
    from gradio_client import handle_file

    client = GradioClient(page_url, verbose=False, download_files=str(tmp_path))
    gallery, seed = client.predict(207, 5, False, 2, 3, "euler", 1.5, api_name="/generate")
    assert seed == 5
    assert len(gallery) == 2
    assert Image.open(gallery[0]["image"]).size == (256, 256)
    photo = tmp_path / "photo.png"
    photo.write_bytes(write_image(picture(207, 0, size=50)))
    kept, quality = client.predict(handle_file(str(photo)), api_name="/reconstruct")
    assert Image.open(kept).size == (256, 256)
    assert "dB" in quality


def test_a_server_that_went_away_is_a_sentence_on_the_page(tiny_dir):
    from gradio_client import Client as GradioClient
    from gradio_client.exceptions import AppError

    from ui.page import build_page

    running = Running("--model", str(tiny_dir))
    page = build_page(Client(running.url))
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    client = GradioClient(url, verbose=False)
    assert running.stop() == 0
    with pytest.raises(AppError, match="cannot be reached"):
        client.predict(207, 5, False, 1, 2, "euler", 1.5, api_name="/generate")
    page.close()


def test_base64_pictures_open():
    from ui.page import open_base64

    text = base64.b64encode(write_image(picture(1, 0))).decode()
    assert open_base64(text).size == (24, 24)
