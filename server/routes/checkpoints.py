"""Routes of a training run that is followed (--watch RUN): its checkpoints, and the same seeds drawn by each."""

from typing import Annotated

from fastapi import HTTPException, Path, Request, Response

from server.answers import CheckpointAnswer, CheckpointsAnswer, ImageClassAnswer
from server.checkpoint_strip import CheckpointStrip, Drawn
from server.openapi import BINARY, CACHE_HEADERS, header, problems
from server.responses import etag_of, is_fresh
from server.router import Router

router = Router()

TAGGED = {"ETag": CACHE_HEADERS["ETag"], "Cache-Control": header("no-cache: caches ask again, which draws nothing")}


def strip_of(request: Request) -> CheckpointStrip:
    strip: CheckpointStrip = request.app.state.service.run.strip
    return strip


@router.get("/checkpoints", response_model_exclude_unset=True)
async def checkpoints(request: Request) -> CheckpointsAnswer:
    """The checkpoints of the run that have drawn their images, by step, and the classes and seeds of these images.

    A long run is thinned out: the first and the newest are always there.
    """
    strip = strip_of(request)
    return CheckpointsAnswer(
        run=request.app.state.service.run.name,
        classes=[ImageClassAnswer(**one.to_dict()) for one in strip.classes],
        seeds=strip.seeds,
        checkpoints=[
            CheckpointAnswer(step=one.step, fingerprint=one.fingerprint, created=one.created)
            for _, one in sorted(strip.drawn.items())
        ],
    )


@router.get(
    "/checkpoints/{step}",
    response_class=Response,
    responses={
        200: {
            "content": {"image/png": BINARY},
            "description": "the images, one below the other: the seeds of the first class, then those of the next",
            "headers": TAGGED,
        },
        304: {"description": "the client has it: If-None-Match names the ETag", "headers": TAGGED},
        **problems(404, 422, words={404: "no image of this step", 422: "step is not a number"}),
    },
)
async def checkpoint(request: Request, step: Annotated[int, Path(ge=0, lt=2**53)]) -> Response:
    """The images that the checkpoint of a step draws: `curl localhost:8000/checkpoints/1000 -o step.png`."""
    found: Drawn | None = strip_of(request).drawn.get(step)
    if found is None:
        raise HTTPException(404, f"there are no images of step {step}; /checkpoints lists the steps")
    etag = etag_of("checkpoint", found.step, found.fingerprint, found.created)
    headers = {"Cache-Control": "no-cache", "ETag": etag}
    if is_fresh(request, etag):
        return Response(status_code=304, headers=headers)
    return Response(found.png, media_type="image/png", headers=headers)
