"""JavaScript's clients in Node: OpenAI's, the AI SDK, Gradio's, EventSource, and types generated from /openapi.json."""

import base64
import json

import httpx
import pytest

from tests.clients.checks import check_events, check_openai, native
from tests.clients.conftest import HERE, KEY, bundled, installed, output

pytestmark = pytest.mark.clients

NAMED = {f"/{name}" for name in ("generate", "reconstruct", "edit", "walk", "inspect", "classes", "model")}


def test_openai(node, guarded, plain, photo):
    check_openai(node("openai-node.mjs", f"{guarded}/v1", KEY, str(photo)), plain, photo)


@pytest.mark.parametrize("how", ["default", "kept"])
def test_openai_behind_nginx(node, nginx, plain, photo, how):
    check_openai(node("openai-node.mjs", f"{nginx.guarded[how]}/v1", KEY, str(photo)), plain, photo)


def test_the_ai_sdk(node, guarded, plain, photo):
    found = node("ai-sdk.mjs", f"{guarded}/v1", KEY, str(photo))
    assert found["drawn"] == [native(plain, **{"class": 207, "index": index}) for index in (0, 1)]
    assert found["mediaType"] == "image/png"
    assert found["sized"] == native(plain, **{"class": 207, "size": 64})
    assert found["edited"] == native(plain, photo, **{"class": 1})
    assert found["warnings"] == []
    assert found["refused"]["status"] == 400
    assert "class must be" in found["refused"]["message"]


@pytest.mark.parametrize("below", [False, True], ids=["at the root", "below a path"])
def test_gradio(node, paged, plain, photo, request, below):
    page = f"{request.getfixturevalue('nginx').below}/ui" if below else paged
    found = node("gradio.mjs", page, str(photo))
    assert set(found["names"]) == NAMED
    assert found["url"].startswith(f"{page}/")
    expected = httpx.get(f"{plain}/generate?class=207&seed=7&size=256").content
    assert base64.b64decode(found["first"]) == expected
    answers = found["answers"]
    assert len(answers["/generate"][0]) == 2
    assert answers["/reconstruct"][1] > 3
    assert answers["/edit"][1]["strength"] == 0.5
    assert len(answers["/walk"][0]) == 3
    assert answers["/inspect"][0]["effective_rank"] >= 1
    assert answers["/classes"][0][0]["index"] == 207
    assert answers["/model"][0]["name"] == "dsd-demo"


def test_an_event_source_draws_once(node, plain):
    found = node("eventsource.mjs", f"{plain}/generate?class=207&n=2&format=events")
    check_events(plain, found)


def test_generated_typescript_types(plain, node, drawn, tmp_path):
    """The types of openapi-typescript compile, are not `any`, and fit the answers that openapi-fetch gets."""
    program, modules = installed("node"), HERE / "node_modules"
    document = tmp_path / "openapi.json"
    document.write_text(httpx.get(f"{plain}/openapi.json").text)
    (tmp_path / "typed.ts").write_text((HERE / "typed.ts").read_text())
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    options = ["--default-non-nullable=false", "-o", "schema.d.ts"]  # else what has a default must be sent
    output(program, str(modules / "openapi-typescript/bin/cli.js"), str(document), *options, cwd=tmp_path)
    strict = ["--strict", "--noEmit", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    (tmp_path / "node.d.ts").write_text(
        "declare const process: { argv: string[] };\n"
        "declare const Buffer: { from(data: ArrayBuffer): { toString(encoding: string): string } };\n"
    )
    output(
        program,
        str(modules / "typescript/bin/tsc"),
        *strict,
        "--target",
        "es2022",
        "typed.ts",
        "node.d.ts",
        cwd=tmp_path,
    )
    bundled("typed.ts", "--format=esm", "--platform=node", "--outfile=typed.mjs", cwd=tmp_path)
    found = json.loads(output(program, str(tmp_path / "typed.mjs"), plain))
    assert base64.b64decode(found["png"]) == drawn
    assert found["drawn"] == native(plain, **{"class": 207})
    assert "Golden Retriever" in found["names"]
    assert found["error"]["status"] == 422
