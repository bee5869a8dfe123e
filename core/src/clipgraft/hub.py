"""A folder to the Hugging Face hub, by its own client: the name and the token are checked before any work."""

from __future__ import annotations

from pathlib import Path

from clipgraft.errors import ClipgraftError, InputError


def check(name: str) -> None:
    """Raise unless ``name`` is an ORG/NAME that the hub accepts and there is a token; the token is never shown."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {name}: {_line(error)}") from None
    if "/" not in name:
        raise InputError(f"--push-to-hub {name}: write ORG/NAME, such as my-name/{name}")
    if not get_token():
        raise InputError("--push-to-hub needs a token of the hub that may write: hf auth login, or set HF_TOKEN")


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload every file of ``folder`` as one commit to the model ``name``, made when it isn't there; returns its page.

    ``InputError`` when the hub refuses, also to put something private where all can read it; ``ClipgraftError`` when it
    can't be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="clipgraft")
    try:
        page = str(api.create_repo(name, private=private, exist_ok=True, repo_type="model"))
        if private and not api.model_info(name).private:
            raise InputError(f"{name} is there already and public; make it private on the hub, or choose another name")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name} with clipgraft")
    except ClipgraftError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = {401: "; log in again: hf auth login", 403: "; the token needs the right to write there"}.get(
            status or 0, ""
        )
        raise InputError(f"the hub refused {name}: {_line(error, get_token())}{hint}") from None
    except Exception as error:  # each transport has its own kind, and being offline is one more
        raise ClipgraftError(f"{name} could not be sent to the hub: {_line(error, get_token())}") from None
    return page


def _line(error: Exception, secret: str | None = None) -> str:
    """One line of an error, without the secret."""
    text = " ".join(str(error).split())[:240] or type(error).__name__
    return text.replace(secret, "***") if secret else text
