"""Models of the Hugging Face hub: only the files that are needed, through huggingface_hub's cache."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anymamba.checkpoint.folder import BIN, CONFIG, INDEX, SAFETENSORS, shard_names
from anymamba.errors import AnymambaError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "generation_config.json", "chat_template.jinja", "chat_template.json")  # fmt: skip
SMALL = (CONFIG, "params.json", SAFETENSORS + INDEX, BIN + INDEX, *TOKENIZER_FILES)
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def hub_name(name_or_path: str, revision: str | None) -> tuple[str, str | None] | None:
    """(name, revision) if that is what was given, None for a path.

    `a/b` is a path if there is a folder a here: what is missing in it is a slip of the pen. `a/b@main` is never one.
    """
    found = _NAME.fullmatch(name_or_path)
    if found is None or Path(name_or_path).exists():
        return None
    given = found["revision"] or revision
    if given is None and Path(name_or_path).parent.is_dir():
        return None
    return found["name"], given


def fetch_small(name: str, revision: str | None) -> Path:
    """The folder of a model in the cache, with all but its weights. Raises AnymambaError if it cannot be had."""
    from huggingface_hub import snapshot_download

    with _told(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(SMALL)))


def fetch_weights(name: str, folder: Path) -> None:
    """Fetch the weights, too: safetensors if there are any, else the .bin. Raises AnymambaError as `fetch_small`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    index = next((folder / f for f in (SAFETENSORS + INDEX, BIN + INDEX) if (folder / f).exists()), None)
    choices = [[SAFETENSORS], [BIN]] if index is None else [shard_names(index)]
    with _told(name, folder.name):
        for i, files in enumerate(choices, start=1):
            try:
                for file in files:
                    if not (folder / file).exists():
                        hf_hub_download(name, file, revision=folder.name)  # of the commit that the config is of
                return
            except EntryNotFoundError:
                if i == len(choices):
                    raise


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """What can go wrong, in words."""
    from huggingface_hub import utils

    try:
        yield
    except (utils.HfHubHTTPError, utils.HFValidationError, utils.EntryNotFoundError) as error:
        raise AnymambaError(_in_words(error, name, revision)) from None


def _in_words(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, utils

    hub, login = constants.ENDPOINT, "log in with  hf auth login  or set HF_TOKEN"
    detail = str(error.__cause__ or error).strip().partition("\n")[0]
    if isinstance(error, utils.GatedRepoError):
        return f"{name} is gated: ask for access at {hub}/{name}, then {login}"
    if isinstance(error, utils.RepositoryNotFoundError):
        return (
            f"there is no folder {name} here and no such model at {hub}, or it is private: check the name, or {login}"
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: give a branch, tag or commit of it"
    if isinstance(error, utils.LocalEntryNotFoundError):
        why = f"{hub} cannot be reached ({detail})"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: unset it to fetch the rest"
        return f"no folder {name} here, not all of that model in the cache {constants.HF_HUB_CACHE}, and {why}"
    if isinstance(error, utils.EntryNotFoundError):
        return (f"{name} has neither {SAFETENSORS} nor {BIN}, whole or in shards: no weights to load; if it has others "
                "(.gguf), download one and give its path")  # fmt: skip
    return f"cannot fetch {name} from {hub}: {detail}"
