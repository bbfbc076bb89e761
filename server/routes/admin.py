"""Administration: /admin/model, which replaces a model while the server runs."""

import asyncio
import time
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from starlette.datastructures import Headers

from dsd_serve.errors import ClosedError, DSDError, InputError, QueueFullError, shown
from server.answers import ModelReplaced
from server.error_responses import refuse_repeated
from server.keys import is_same, sent_key
from server.openapi import OF_BODIES, problems, takes
from server.request_reader import read_settings
from server.router import Router
from server.schemas import ReplaceRequest
from server.service import Service

router = Router(prefix="/admin", dependencies=[Depends(refuse_repeated)])


def check_key(request: Request) -> Service:
    """The server. Raises 404 if it has no admin key, as for any path that does not exist, and 403 for another key."""
    service: Service = request.app.state.service
    if service.admin_key is None:
        raise HTTPException(404)
    if not is_same(sent_key(Headers(scope=request.scope)), service.admin_key):
        service.metrics.rejected("unauthorized")
        raise HTTPException(403, "this needs the admin key; send the header Authorization: Bearer KEY")
    return service


@router.post(
    "/model",
    responses=problems(
        403,
        404,
        422,
        429,
        503,
        *OF_BODIES,
        words={404: "the server has no admin key", 422: "the model cannot be loaded, and nothing has changed"},
    ),
    openapi_extra=takes(json=ReplaceRequest, examples={"a directory": {"model": "runs/new/model"}}),
)
async def replace_model(request: Request, service: Annotated[Service, Depends(check_key)]) -> ModelReplaced:
    """Replace a model by another one: it is loaded in a process of its own and tested, then new requests use it, and
    those under way finish with the old one.

    Answers when the new model is used, or with the reason why nothing has changed.
    """
    sent = await read_settings(request, ReplaceRequest)
    if not sent.model.isprintable():
        raise InputError(f"model must be a directory or hf:org/name, got {shown(sent.model)}", "model")
    slot = service.models.find(sent.name)
    began, before = time.monotonic(), slot.info
    try:
        # Shielded: a client that goes away does not undo it.
        served = await asyncio.shield(asyncio.wrap_future(slot.replace(sent.model)))
    except (ClosedError, QueueFullError):
        raise
    except DSDError as error:
        raise InputError(f"{error}; the model {slot.name} is unchanged", "model") from None
    return ModelReplaced(
        name=slot.name,
        fingerprint=served.info.fingerprint,
        replaced=before.fingerprint if before else None,
        seconds=round(time.monotonic() - began, 3),
    )
