"""Models by name: hf:org/name[@revision] is a model directory in a repository of the Hugging Face hub.

config.json is read first. It names the other files and has their sha256; these are downloaded and compared with it, and
nothing else in the repository is. All of them are JSON, Markdown, safetensors or ONNX: no code and no pickles.

The files are kept in huggingface_hub's cache (HF_HOME), from which a model is also found without a network, and stopped
downloads are resumed. Where the hub is (HF_ENDPOINT), the token for private repositories (HF_TOKEN or `hf auth login`)
and whether it may be asked at all (HF_HUB_OFFLINE) are huggingface_hub's own settings.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dsd_serve.checkpoint import MAX_TEXT, ModelDir, read_model_dir
from dsd_serve.class_images import FILE as CLASS_IMAGES
from dsd_serve.errors import CheckpointError, EngineUnavailableError, shown

PREFIX = "hf:"
CONFIG, CARD = "config.json", "card.md"
PLACE = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w.][\w./-]{0,199}))?", re.A
)
FILE = re.compile(r"model(\.[a-z0-9_]+)*\.(onnx|safetensors)", re.A)
MAX_BYTES = 50_000_000_000  # of the files of a model
INSTALL = "pip install '.[hub]'"


def model_dir(place: str | Path) -> Path:
    """The path of a model directory: `place` itself, or where hf:org/name[@revision] was downloaded to.

    Raises CheckpointError for a name that the hub does not have, and for files that differ from config.json;
    EngineUnavailableError without huggingface_hub.
    """
    text = str(place)
    if not text.startswith(PREFIX):
        return Path(place)
    repo, revision = parse(text)
    hub = import_hub(text)
    with sentences(text, hub):
        return download(text, hub, repo, hub.HfApi().resolve_revision(repo, revision=revision))


def parse(place: str) -> tuple[str, str | None]:
    """Repository and revision of hf:org/name[@revision]. Raises CheckpointError."""
    match = PLACE.fullmatch(place)
    if not match or ".." in place or "--" in match["repo"]:
        raise CheckpointError(f"a model by name must be hf:org/name or hf:org/name@revision, got {shown(place)}")
    return match["repo"], match["revision"]


def import_hub(place: str) -> Any:
    """The package huggingface_hub. Raises EngineUnavailableError without it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise EngineUnavailableError(f"{place} needs huggingface_hub: {INSTALL}") from None
    return huggingface_hub


def download(place: str, hub: Any, repo: str, revision: str) -> Path:
    """The folder of a revision in the cache, with all files of its model directory, checked."""
    snapshot = Snapshot(hub, repo, revision)
    sizes = snapshot.sizes([CONFIG, CARD])
    if not snapshot.is_local and CONFIG not in sizes:
        raise CheckpointError(f"{place} is not a model directory: the repository has no {CONFIG} of dsd-export")
    for name, size in sizes.items():
        if size > MAX_TEXT:
            raise CheckpointError(f"{place}: {name} has {size:,} bytes; at most {MAX_TEXT:,} are read")
    directory = read_model_dir(snapshot.fetch([CONFIG, *(name for name in sizes if name == CARD)], is_silent=True))
    names = model_files(place, directory)
    sizes = snapshot.sizes(names)
    if not snapshot.is_local:
        check_sizes(place, names, sizes)
    snapshot.fetch(names, is_silent=not snapshot.is_missing)
    check_files(place, directory, names)
    return directory.path


class Snapshot:
    """A revision of a repository. is_local: the hub cannot be asked. is_missing: files are to be downloaded."""

    def __init__(self, hub: Any, repo: str, revision: str) -> None:
        from tqdm.auto import tqdm

        class Silent(tqdm):  # type: ignore[misc]
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": True})

        self.get, self.silent = partial(hub.snapshot_download, repo, revision=revision), Silent
        self.offline_error = hub.errors.DryRunError
        self.is_local = self.is_missing = False

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Bytes of those files that the repository has, by name; none if the hub cannot be asked."""
        try:
            found = self.get(allow_patterns=names, dry_run=True, tqdm_class=self.silent)
        except self.offline_error:
            self.is_local = True
            return {}
        self.is_missing = any(file.will_download for file in found)
        return {file.filename: file.file_size for file in found}

    def fetch(self, names: list[str], *, is_silent: bool) -> Path:
        """The folder of the cache with these files."""
        bar = {"tqdm_class": self.silent} if is_silent else {}
        return Path(self.get(allow_patterns=names, local_files_only=self.is_local, **bar))


def model_files(place: str, directory: ModelDir) -> list[str]:
    """The names of the files of a model directory that has a record of their sha256."""
    names = [name for entry in directory.artefacts.values() for name in entry["files"]]
    if not names:
        raise CheckpointError(
            f"{place}: its config.json has no sha256 of its files, so they cannot be checked; export the model again"
        )
    for name in names:
        if not FILE.fullmatch(name):
            raise CheckpointError(
                f"{place}: its config.json names the file {shown(name)}, which no model directory has"
            )
    if directory.class_images:
        names.append(CLASS_IMAGES)
    return list(dict.fromkeys(names))


def check_sizes(place: str, names: list[str], sizes: dict[str, int]) -> None:
    if missing := [name for name in names if name not in sizes]:
        raise CheckpointError(f"{place} is incomplete: its config.json names {missing[0]}, which the repository lacks")
    if (total := sum(sizes.values())) > MAX_BYTES:
        raise CheckpointError(
            f"{place} has files of {total / 1e9:.1f} GB; at most {MAX_BYTES / 1e9:.0f} are downloaded"
        )


def check_files(place: str, directory: ModelDir, names: list[str]) -> None:
    """Raises CheckpointError unless the folder holds these files, as config.json records them, and no other graphs."""
    folder = directory.path
    for name in names:
        if not (folder / name).exists():
            raise CheckpointError(f"{place}: {name} is not in the cache and the hub cannot be reached")
    try:
        directory.check([folder / name for name in names])
    except CheckpointError:
        raise CheckpointError(
            f"{place}: a file differs from the sha256 in its config.json: the repository mixes files of several "
            f"exports, or the cache is damaged; push the model again, or delete {folder} and try again"
        ) from None
    others = sorted(file.name for file in folder.iterdir() if FILE.fullmatch(file.name) and file.name not in names)
    if others:
        raise CheckpointError(f"{folder} also holds {others[0]}, which its config.json does not name; delete that file")


@contextlib.contextmanager
def sentences(place: str, hub: Any) -> Iterator[None]:
    """Turns the errors of huggingface_hub into CheckpointErrors; meanwhile its HTTP client logs no requests."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    clients = [logging.getLogger(name) for name in ("httpx", "httpx2")]
    levels = [client.level for client in clients]
    try:
        for client in clients:
            client.setLevel(logging.WARNING)
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(f"{place}: access must be requested at {endpoint} first, and HF_TOKEN set") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{place}: {endpoint} has no such repository, or it is private and HF_TOKEN is missing or wrong"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{place}: the repository has no such revision") from None
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError):
        raise CheckpointError(
            f"{place} is not in the cache, at least not as a whole, and {endpoint} cannot be reached, or is turned off "
            "(HF_HUB_OFFLINE)"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        meaning = " (HF_TOKEN is missing, wrong, or lacks the permission)" if status in (401, 403) else ""
        raise CheckpointError(f"{place}: {endpoint} answered {status}{meaning}") from None
    except Exception as error:  # of httpx, of the file system, of files that end early
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{place}: {endpoint} and the cache failed ({type(error).__name__}): {reason}") from None
    finally:
        for client, level in zip(clients, levels, strict=True):
            client.setLevel(level)
