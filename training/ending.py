"""The end of dsd-train and dsd-distill with a sentence, on one process or several."""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch.distributed as dist

from dsd_serve.errors import DSDError
from dsd_serve.files import sentence_of


@contextlib.contextmanager
def in_a_sentence(program: str) -> Iterator[None]:
    """Errors of the user or the system end the process with exit code 1 and a sentence; others pass."""
    try:
        yield
    except (DSDError, OSError) as error:
        again = "; afterwards the same command resumes from the last checkpoint, if there is one"
        sentence = f"{program}: {f'{sentence_of(error)}{again}' if isinstance(error, OSError) else error}"
    else:
        return
    if not dist.is_initialized():
        sys.exit(sentence)
    print(sentence, file=sys.stderr, flush=True)
    os._exit(1)  # a normal exit tears the process group down while its threads run, and may abort
