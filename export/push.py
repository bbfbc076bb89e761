"""Pushing a model directory to a repository of the Hugging Face hub, from where hf:org/name loads it."""

import io
from pathlib import Path

from dsd_serve.checkpoint import read_model_dir, read_text
from dsd_serve.errors import CheckpointError, InputError, shown
from dsd_serve.hub import CARD, CONFIG, import_hub, model_files, parse, sentences
from export.card import hub_card


def check_place(place: str) -> str:
    """The repository of hf:org/name. Raises InputError for anything else, a revision included."""
    try:
        repo, revision = parse(place)
    except CheckpointError:
        repo, revision = "", None
    if not repo or revision:
        raise InputError(f"--push must be hf:org/name, without a revision, got {shown(place)}")
    return repo


def push(path: Path, place: str, license_id: str) -> str:
    """Push a model directory in one commit; the repository is made if it is missing. Returns the URL of the commit.

    README.md there is the model card in the hub's form. license_id: as the hub spells licences, for that card.
    Raises CheckpointError if files differ from config.json, or the hub refuses.
    """
    repo, hub = check_place(place), import_hub(place)
    directory = read_model_dir(path)
    names = model_files(str(path), directory)
    if missing := [name for name in names if not (path / name).exists()]:
        raise CheckpointError(f"{path} is incomplete: config.json names {missing[0]}, which is missing")
    directory.check([path / name for name in names])
    card = read_text(path / CARD) if (path / CARD).exists() else f"# {directory.name}\n"
    texts = [CONFIG, CARD] if (path / CARD).exists() else [CONFIG]
    added = [hub.CommitOperationAdd(name, path / name) for name in [*names, *texts]]
    readme = hub_card(card, place, license_id).encode()
    added.append(hub.CommitOperationAdd("README.md", io.BytesIO(readme)))
    api = hub.HfApi()
    with sentences(place, hub):
        api.create_repo(repo, exist_ok=True)
        commit = api.create_commit(repo, operations=added, commit_message=f"dsd-export: {directory.name}")
    return str(commit.commit_url)
