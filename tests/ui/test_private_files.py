"""Attacks on the page to read files, fetch URLs or fill the disk, as raw requests to every event.

The page runs in a separate process that records every file that it opens, so that the tests do not rely on statuses.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from dsd_serve import locked_folders
from dsd_serve.errors import InputError
from dsd_serve.imaging.codec import write_image
from tests.support.data import ROOT, sample_image
from tests.support.servers import Server

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[ui]'")

SECRET = "a secret of this machine 4711"
HOOK = """
import os, sys

def note(event, arguments):
    watched = event in ("open", "os.listdir", "shutil.copyfile", "os.rename", "socket.getaddrinfo")
    if watched and "forbidden" in str(arguments[:2]):
        descriptor = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{event} {arguments[:2]}\\n".encode())
        os.close(descriptor)

sys.addaudithook(note)
"""


class Page:
    """A page with its folder of uploads, and a record of the forbidden files that it opened."""

    def __init__(self, url: str, temporary: Path, secrets: Path, opened: Path) -> None:
        self.url, self.temporary, self.secrets, self.opened = url, temporary, secrets, opened
        self.http = httpx.Client(base_url=url, timeout=60)
        self.config = self.http.get("/config").json()

    def upload(self, data: bytes, name: str = "a.png") -> str:
        (path,) = self.http.post("/gradio_api/upload", files={"files": (name, data)}).json()
        return path

    def event(self, number: int, data: list, session: str, **more) -> str:
        """All that the page answers to an event, as text."""
        body = {"data": data, "fn_index": number, "session_hash": session, **more}
        joined = self.http.post("/gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return joined.text
        lines = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                if "process_completed" in line:
                    break
        return "\n".join(lines)

    def hostile_paths(self) -> list[str]:
        secret = self.secrets / "forbidden.png"
        (folder,) = [one for one in self.temporary.iterdir() if one.name.startswith("dsd-page-")]
        link = folder / "link-to-forbidden.png"
        if not link.is_symlink():
            link.symlink_to(secret)
        others = self.upload(write_image(sample_image(1, 1)))
        assert "process_completed" in self.event(self.named("inspect"), [file(others)], "somebody-else")
        return [
            str(secret),
            os.path.relpath(secret, ROOT),
            f"{folder}/../{os.path.relpath(secret, folder.parent)}",
            str(link),
            str(self.secrets / "forbidden-pipe"),
            "/dev/zero?forbidden",
            "/dev/stdin",
            "/proc/self/environ",
            str(self.secrets),
            str(folder),
            f"file://{secret}",
            "http://forbidden.invalid/a.png",
            f"{self.url}/studio/class/207.png?forbidden",
            f"/gradio_api/file={secret}",
            f"{secret}\0.png",
            "",
            others,
        ]

    def named(self, name: str) -> int:
        return next(one["id"] for one in self.config["dependencies"] if one["api_name"] == name)


@pytest.fixture(scope="module", params=["dsd-serve --ui", "dsd-ui"])
def page(request, tiny_dir, tmp_path_factory, server_url):
    folder = tmp_path_factory.mktemp("page")
    for name in ("hook", "tmp", "secrets"):
        (folder / name).mkdir()
    (folder / "hook/sitecustomize.py").write_text(HOOK)
    secret = write_image(sample_image(207, 3), settings=json.dumps({"note": SECRET}))
    (folder / "secrets/forbidden.png").write_bytes(secret)
    os.mkfifo(folder / "secrets/forbidden-pipe")
    env = {
        "PYTHONPATH": f"{folder}/hook:{ROOT}",
        "TMPDIR": f"{folder}/tmp",
        "GRADIO_TEMP_DIR": f"{folder}/tmp",  # a page in the tests' process sets its own
        "OPENED": f"{folder}/opened",
    }
    if request.param == "dsd-ui":
        running = Server("--server", server_url, module="ui.main", env=env)
    else:
        running = Server("--ui", "--model", str(tiny_dir), env=env)
    process, url = running.process, running.url
    yield Page(url, folder / "tmp", folder / "secrets", folder / "opened")
    process.terminate()
    assert process.wait(30) == 0
    assert not list((folder / "tmp").glob("dsd-page-*"))  # no files of visitors are left


def file(path: str, **more) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def shapes(path: str) -> list:
    """A path in all forms of Gradio's components, with and without the marker of a file."""
    return [
        path,
        {"path": path},
        file(path, url=path),
        {"url": path, "meta": {"_type": "gradio.FileData"}},
        {"background": file(path), "layers": [{"path": path}], "composite": file(path), "id": None},
        {"value": {"image": [{"path": path, "is_stream": True}]}, "files": [path]},
    ]


def test_no_event_opens_a_file_that_its_session_did_not_upload(page):
    """Covers all events and components in the page's configuration, so that new ones are covered at once."""
    usual = {one["id"]: one["props"].get("value") for one in page.config["components"]}
    paths = page.hostile_paths()
    page.opened.unlink(missing_ok=True)
    tried = 0
    for event in page.config["dependencies"]:
        for position in range(len(event["inputs"])):
            for shape in range(len(shapes(""))):
                path = paths[tried % len(paths)]
                data = [usual[number] for number in event["inputs"]]
                data[position] = shapes(path)[shape]
                answer = page.event(event["id"], data, f"session{tried}")
                assert SECRET not in answer
                if shape:
                    assert '"success": false' in answer or '"success":false' in answer, (event["api_name"], data)
                tried += 1
    assert tried > 300
    assert not page.opened.exists() or not page.opened.read_text(), page.opened.read_text()
    stored = [one for one in page.temporary.rglob("*") if one.is_file() and not one.is_symlink()]
    assert all(SECRET.encode() not in one.read_bytes() for one in stored)
    assert page.http.get("/studio/state").status_code == 200


@pytest.mark.parametrize("route", ["run/predict", "call/inspect", "call/reconstruct"])
def test_other_routes_to_an_event_are_closed_too(page, route):
    for number, path in enumerate(page.hostile_paths()):
        body = {"data": [file(path)], "fn_index": page.named("inspect"), "session_hash": f"way{number}"}
        answer = page.http.post(f"/gradio_api/{route}", json=body)
        text = answer.text
        if route.startswith("call") and answer.status_code == 200:
            text = page.http.get(f"/gradio_api/{route}/{answer.json()['event_id']}").text
        assert "latents" not in text and SECRET not in text
        assert "error" in text
    assert not page.opened.exists() or not page.opened.read_text(), page.opened.read_text()


def test_an_upload_belongs_to_its_session(page):
    path = page.upload(write_image(sample_image(207, 0)))
    number = page.named("inspect")
    assert "effective_rank" in page.event(number, [file(path)], "mine")
    assert "effective_rank" in page.event(number, [file(path)], "mine")
    refused = page.event(number, [file(path)], "theirs")
    assert "effective_rank" not in refused
    assert "upload it again" in refused
    assert page.http.get(f"/gradio_api/file={path}").status_code == 200  # nobody else can guess the path


def test_only_the_same_session_may_send_back_a_file_of_the_page(page):
    (answer,) = [
        json.loads(line[6:])
        for line in page.event(page.named("generate"), ["207", 5, 1, 2, None, None, None], "maker").splitlines()
        if "process_completed" in line
    ]
    path = answer["output"]["data"][0][0]["image"]["path"]
    assert "effective_rank" in page.event(page.named("inspect"), [file(path)], "maker")
    assert "upload it again" in page.event(page.named("inspect"), [file(path)], "taker")


@pytest.mark.parametrize(
    "path",
    [
        "deep_link?session_hash=a",
        "proxy=http://127.0.0.1/",
        "file=http://127.0.0.1/",
        "file=/etc/passwd",
        "file=/proc/self/environ",
        "file/etc/passwd",
        "vibe-code/",
        "monitoring/summary",
        "runs",
        "run-history/buckets",
        "profiling/summary",
        "stream/a/b/1/playlist.m3u8",
        "custom_component/1/client/component/index.js",
        "dev/reload",
        "openapi.json",
        "token",
        "queue/status",
    ],
)
def test_routes_of_gradio_that_the_page_does_not_need_are_closed(page, path):
    assert page.http.get(f"/gradio_api/{path}").status_code == 404


def test_writing_routes_of_gradio_that_the_page_does_not_need_are_closed(page):
    for path in ("component_server", "process_recording", "vibe-edit", "run/generate", "api/generate", "stream/a"):
        assert page.http.post(f"/gradio_api/{path}", json={}).status_code == 404, path
    assert page.http.post("/login", data={"username": "a", "password": "b"}).status_code == 404
    assert page.http.put("/gradio_api/upload").status_code in (404, 405)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "{own}"}, 200),
        ({"origin": "{own}", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://public.example", "x-forwarded-host": "public.example"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "{own}", "sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_pages_of_other_sites_may_not_send_events(page, headers, status):
    headers = {name: value.format(own=page.url) for name, value in headers.items()}
    body = {"data": ["retriever"], "fn_index": page.named("classes"), "session_hash": "site"}
    answer = page.http.post("/gradio_api/queue/join", json=body, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert "its own pages only" in answer.json()["detail"]
        assert page.http.post("/gradio_api/upload", files={"files": b"x"}, headers=headers).status_code == 403
    answer = page.http.get("/config", headers={"origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_the_editor_takes_one_small_layer_of_an_image(page):
    event = page.config["dependencies"][page.named("mask_of")]
    big = page.upload(write_image(sample_image(1, 1, size=1500)))
    small = page.upload(write_image(sample_image(1, 1)))
    text = page.upload(b"no image")

    def painted(*layers: str) -> str:
        value = {"background": None, "layers": [file(one) for one in layers], "composite": None, "id": None}
        return page.event(event["id"], [value], "painter")

    assert '"success":true' in painted(small).replace(" ", "")
    assert "one layer" in painted(small, small)
    assert "at most 1,048,576" in painted(big)
    assert "PNG, JPEG or WebP" in painted(text)


@pytest.mark.parametrize(
    "body", [b"", b"--X\r\n", b'--X\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--X--\r\n']
)
def test_malformed_uploads_get_an_error(page, body):
    answer = page.http.post(
        "/gradio_api/upload", content=body, headers={"content-type": "multipart/form-data; boundary=X"}
    )
    assert answer.status_code in (200, 400)
    assert answer.text == "[]" or "form" in answer.text


@pytest.mark.parametrize("charset", ["undefined", "punycode", "x" * 50_000])
def test_the_charset_of_an_upload_has_no_effect(page, charset):
    body = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc\r\n--X--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=X; charset={charset}"}
    (path,) = page.http.post("/gradio_api/upload", content=body, headers=headers).raise_for_status().json()
    assert Path(path).name == "a.png"
    assert (
        page.http.post("/gradio_api/upload", content=body, headers={"content-type": "multipart/form-data"}).status_code
        == 422
    )


def test_file_names_stay_in_the_folder(page):
    for name in ("../../evil.png", "/etc/passwd", "a\\..\\b", "x" * 3000, ".bashrc", "名前.png", "a b.png"):
        path = Path(page.upload(b"x", name))
        assert path.parent.parent.parent == page.temporary
        assert len(path.name) <= 80


def test_the_folder_is_bounded_and_swept(tmp_path, monkeypatch):
    import asyncio
    import io

    from ui import private_files

    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr(private_files, "private_folder", lambda: folder)
    files = private_files.Uploads(max_total=100_000)

    async def keep(size: int, address: str) -> str:
        with files.receiving(address) as receiving:
            receiving.take(size)
            return await files.keep(io.BytesIO(b"x" * size), "a.png", size, address)

    first = asyncio.run(keep(40_000, "a"))
    with pytest.raises(private_files.FolderFullError, match="your uploads take 0 of 0 MB"):
        asyncio.run(keep(20_000, "a"))
    asyncio.run(keep(40_000, "b"))
    with pytest.raises(private_files.FolderFullError, match="all visitors"):
        asyncio.run(keep(30_000, "c"))
    assert files.claim(first, "s") == first
    files.sweep(seconds=1000)
    assert files.may_fetch(first)
    files.sweep(seconds=0)
    assert not files.may_fetch(first)
    with pytest.raises(InputError):
        files.claim(first, "s")
    assert not list(folder.iterdir())
    assert files.total == 0 and not files.incoming


def test_new_files_of_the_page_replace_its_oldest(tmp_path, monkeypatch):
    from ui import private_files

    monkeypatch.setattr(private_files, "private_folder", lambda: tmp_path)
    files = private_files.Uploads(max_total=100_000)
    made = []
    for number in range(5):
        path = tmp_path / str(number) / "a.png"
        path.parent.mkdir()
        path.write_bytes(b"x" * 20_000)
        files.record([{"image": file(str(path))}, None, "text"], "s")
        made.append(str(path))
        time.sleep(0.002)
    assert [files.may_fetch(path) for path in made] == [False, False, False, True, True]
    assert [os.path.exists(path) for path in made] == [False, False, False, True, True]
    with pytest.raises(InputError):
        files.claim(made[-1], "t")


def test_folders_of_killed_processes_are_deleted_and_those_of_live_ones_kept(tmp_path):
    code = (
        "import sys; from ui.private_files import private_folder; print(private_folder(), flush=True); sys.stdin.read()"
    )
    started = []

    def start() -> tuple[subprocess.Popen, Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "GRADIO_TEMP_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        folder = Path(process.stdout.readline().strip())
        (folder / "upload").mkdir()
        (folder / "upload/a.png").write_bytes(b"x")
        return process, folder

    try:
        killed, left_behind = start()
        live, kept = start()
        killed.kill()
        killed.wait(20)
        assert left_behind.is_dir()  # nobody could delete it
        # Names that are not ours, a link, and a folder of an earlier version, which held no lock.
        others = [tmp_path / name for name in ("dsd-page-abc12345", "dsd-page-1", "dsd-pages-1-abc12345")]
        for folder in others:
            folder.mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "dsd-page-1-link").symlink_to(tmp_path / "elsewhere")
        third, new = start()
        assert not left_behind.exists()
        assert (kept / "upload/a.png").exists()
        assert (new / "upload/a.png").exists()
        assert all(folder.is_dir() for folder in [*others, tmp_path / "elsewhere"])
        for process, folder in ((live, kept), (third, new)):
            process.stdin.close()
            assert process.wait(20) == 0
            assert not folder.exists()
    finally:
        for process in started:
            process.kill()
            process.wait(20)


def test_a_folder_without_a_lock_has_a_name_that_is_never_deleted(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr(locked_folders.fcntl, "flock", no_locks)
    folder = locked_folders.new_locked_folder("page", str(tmp_path))
    monkeypatch.undo()
    locked_folders.delete_abandoned("page", str(tmp_path))
    assert [folder] == list(tmp_path.iterdir())
