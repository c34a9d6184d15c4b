"""Sending a model to a hub."""

from __future__ import annotations

from pathlib import Path

from effir_ray.errors import InputError


def check_hub(repo: str) -> None:
    """Raises InputError where ``repo`` is not OWNER/NAME, no token is known, or the hub does not accept it or
    cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if "/" not in repo:
        raise InputError(f"--push {repo}: expected OWNER/NAME")
    api = HfApi()
    try:
        api.whoami()
        api.repo_exists(repo)  # which refuses a name that none can have
    except HFValidationError as error:
        raise InputError(f"--push {repo}: {_line(error)}") from None
    except LocalTokenNotFoundError:
        raise InputError(f"--push {repo}: no token of {api.endpoint}; hf auth login, or HF_TOKEN") from None
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        what = "does not accept the token" if refused else "answers"
        raise InputError(f"--push {repo}: {api.endpoint} {what}: {_line(error)}") from None
    except Exception as error:  # of whichever client the hub's library uses
        raise InputError(f"--push {repo}: {api.endpoint} cannot be reached: {_line(error)}") from None


def push(folder: Path, repo: str) -> str:
    """Send everything in ``folder`` to the model repository ``repo``, which is made, private, if there is
    none; returns its address. Raises InputError where the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if not api.repo_exists(repo):
            api.create_repo(repo, private=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model written by effir-ray")
    except Exception as error:  # of whichever client the hub's library uses
        raise InputError(
            f"--push {repo}: {_line(error)}; the model is in {folder}, send it by hf upload {repo} {folder}"
        ) from None
    return f"{api.endpoint}/{repo}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
