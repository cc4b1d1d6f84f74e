"""Tokenizers of models on the Hugging Face Hub, from its cache on this machine where they are in it."""

import re
from pathlib import Path

from anymamba.data.special import CONFIG, GENERATION, MAP, TEMPLATE
from anymamba.errors import AnymambaError

FILES = ("tokenizer.json", CONFIG, MAP, GENERATION, TEMPLATE)
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_name(spec: str) -> bool:
    """Whether `spec` can be "owner/name" or "owner/name@revision": it is no path into a folder that exists here."""
    return _NAME.fullmatch(spec) is not None and not Path(spec).parent.is_dir()


def tokenizer_folder(name: str) -> Path:
    """The folder in the cache with the tokenizer files of the model `name`, downloaded if they are not there yet.

    Raises AnymambaError, by name, if there is no such model or revision, it is gated, or cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.partition("@")
    account = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES)))
    except errors.GatedRepoError as error:
        raise _no(name, "is gated, and this account has no access", f"ask for it on its page, and {account}") from error
    except errors.RepositoryNotFoundError as error:
        what = "is neither a folder here nor a public model on the Hub"
        raise _no(name, what, f"check the name; if it is private, {account}") from error
    except errors.RevisionNotFoundError as error:
        raise _no(name, f"has no revision {revision!r}", "give a branch, a tag or a commit of it") from error
    except errors.LocalEntryNotFoundError as error:
        what = "is not a folder here, its tokenizer is not in the Hub's cache, and the Hub cannot be reached"
        raise _no(name, what, "go online, without HF_HUB_OFFLINE, or give the path of a tokenizer.json") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise _no(name, f"cannot be had from the Hub ({error})", "try again, or give a tokenizer.json") from error
    if not (folder / FILES[0]).is_file():
        what = f"has no {FILES[0]} on the Hub (or none in its cache, if offline)"
        raise _no(
            name, what, "give --tokenizer another model's that has it, as state-spaces' have EleutherAI/gpt-neox-20b"
        )
    return folder


def _no(name: str, what: str, cure: str) -> AnymambaError:
    return AnymambaError(f"{name} {what}: {cure}")
