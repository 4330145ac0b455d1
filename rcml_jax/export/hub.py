"""An export on the Hugging Face hub."""

import pathlib
from typing import Any

import huggingface_hub

from rcml_jax.errors import UserError
from rcml_jax.models.checkpoints import hub_reason
from rcml_jax.search.exported import export_mark


def check_push(repository: str) -> None:
    """Raise UserError for a name that no repository can have, and where there is no token."""
    try:
        huggingface_hub.utils.validate_repo_id(repository)
        if repository.count("/") != 1:
            raise ValueError("it is not user/name")
    except ValueError as error:
        raise UserError(f"--push {repository!r} is no repository's name: {error}") from error
    if huggingface_hub.get_token() is None:
        raise UserError(
            "the hub wants to know who pushes; log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )


def push(directory: pathlib.Path, repository: str, *, public: bool = False) -> str:
    """Push an export as one commit to a repository, made if missing; returns its address.

    public: of a repository that is made now; an older one stays what it is. Raises UserError for a
    directory that is no export, without a token, and for whatever the hub refuses.
    """
    check_push(repository)
    mark = export_mark(directory)
    if mark is None:
        raise UserError(f"{directory} is no export of a run; write one with rcml-export")
    api: Any = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message=f"{mark['method']} after step {mark['step']}, by rcml-export",
        )
    except Exception as error:  # the hub and its client raise many kinds
        raise UserError(
            f"cannot push {directory} to {repository} ({hub_reason(error)}); it is written: push "
            f"it with rcml-export --to {directory} --push {repository}"
        ) from error
    return str(made)
