"""classes.webp over HTTP: the file, its grid in /model, its ETag, and a model that has none."""

import hashlib
from dataclasses import asdict, replace

import httpx
import pytest

from dsd_serve.class_images import ClassImages, Grid
from dsd_serve.errors import CheckpointError
from tests.support.servers import Server


def test_the_images_of_the_classes_are_served_with_an_etag(http, tiny_dir):
    grid = http.get("/model").json()["class_images"]
    answer = http.get("/classes.webp")
    assert answer.headers["content-type"] == "image/webp"
    assert answer.content == (tiny_dir / "classes.webp").read_bytes()
    assert hashlib.sha256(answer.content).hexdigest() == grid["sha256"]
    assert (grid["columns"], grid["per_class"]) == (4, 4)
    again = http.get("/classes.webp", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert http.get("/model").json()["parameters"] > 10_000


def test_a_model_without_them_says_how_to_draw_them(plain_dir):
    running = Server("--model", str(plain_dir))
    assert httpx.get(f"{running.url}/model").json()["class_images"] is None
    answer = httpx.get(f"{running.url}/classes.webp")
    assert answer.status_code == 404
    assert "dsd-export --class-images on draws them" in answer.json()["detail"]
    assert running.stop() == 0


def test_they_come_from_an_engine_process_too(tiny_dir):
    running = Server("--model", str(tiny_dir), "--engine-process", "on")
    assert httpx.get(f"{running.url}/classes.webp").content == (tiny_dir / "classes.webp").read_bytes()
    assert running.stop() == 0


def test_wrong_ones_from_another_process_are_refused(tiny_dir):
    honest = ClassImages.of(Grid(4, 4, "0" * 64), (tiny_dir / "classes.webp").read_bytes())
    assert ClassImages.from_dict(asdict(honest)) == honest
    png = ClassImages.of(honest.grid, b"\x89PNG")
    for wrong in (png, replace(honest, webp="?"), replace(honest, grid=Grid(0, 4, "0" * 64))):
        with pytest.raises(CheckpointError):
            ClassImages.from_dict(asdict(wrong))
