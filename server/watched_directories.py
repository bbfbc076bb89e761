"""--watch: replaces a model whenever its directory does."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

from dsd_serve.backends import ModelInfo
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.errors import ConfigError, DSDError
from dsd_serve.hub import PREFIX
from server.model_slot import Slot

log = logging.getLogger(__name__)

CHECK_EVERY = 1.0  # seconds between two looks at config.json, which an export puts in place last

Version = tuple[int, int, int]  # of a file: its inode, size and time


def version_of(file: Path) -> Version | None:
    """What tells one version of a file from another; None if it is not there, as in the middle of an export."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class WatchedDirectories:
    """Looks after the directories of some models in a thread of its own.

    Raises ConfigError for a model that is not a directory.
    """

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        for slot in slots.values():
            if slot.place.startswith(PREFIX):
                raise ConfigError(f"watch needs model directories, and {slot.place} is a repository of a hub")
        self.slots = list(slots.values())
        self.seen = {slot.name: version_of(config_of(slot)) for slot in self.slots}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watch", daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.ended.wait(CHECK_EVERY):
            for slot in self.slots:
                try:
                    self.look(slot)
                except DSDError as error:
                    log.error("the model %s is not replaced: %s", slot.name, error)
                except Exception:
                    log.exception("the directory of the model %s could not be checked", slot.name)

    def look(self, slot: Slot) -> None:
        """Replace the model if its directory has changed. Raises DSDError, once for each change."""
        version = version_of(config_of(slot))
        if version is None or version == self.seen[slot.name]:
            return
        self.seen[slot.name] = version
        if slot.info is not None and is_model_of(Path(slot.place), slot.info):
            return  # another card, or a further precision
        log.info("%s: %s has changed", slot.name, slot.place)
        slot.replace(slot.place)  # logs its errors

    def close(self) -> None:
        self.ended.set()


def is_model_of(path: Path, info: ModelInfo) -> bool:
    """Whether a directory holds the model that is served, in its precision. Raises CheckpointError."""
    directory, precision = read_model_dir(path), info.described["precision"]
    return precision in directory.precisions and directory.fingerprint(precision) == info.fingerprint


def config_of(slot: Slot) -> Path:
    return Path(slot.place) / "config.json"
