"""From the Hugging Face hub, by its own library: into its own cache, with its token, endpoint and offline mode.

Called by ``fetch.py``. What goes wrong becomes a RunError that says what to do.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.causes import Cause
from finetune_trainer.fetching.kept import Record
from finetune_trainer.fetching.wanted import Names, Select, data_files, some, split_pattern
from finetune_trainer.outcome import RunError, where_it_runs

log = logging.getLogger(__name__)

_HUB_TRIES = 4


def fetch_hub(
    uri: str, revision: str, select: Select | None, missing: Cause, cache: Path, cached: Record | None
) -> Record:
    """Download from the hub into its own cache (``HF_HOME``, else ``<cache>/hf``), which pods may share."""
    if not (os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE")):
        os.environ["HF_HOME"] = str(cache / "hf")
    # reads its environment once, when first imported
    from huggingface_hub import HfApi, constants, hf_hub_download

    repo_type, repo, inside = parse_hub(uri)
    common: dict[str, Any] = {"repo_id": repo, "repo_type": repo_type}
    if constants.HF_HUB_OFFLINE:
        if cached is not None:
            return cached
        folder, commit, names = _offline(uri, revision, missing, common)
    else:
        info = _hub(
            lambda: HfApi().repo_info(revision=revision, files_metadata=False, **common),
            uri,
            revision,
            missing,
        )
        commit, folder = info.sha, None
        names = {sibling.rfilename: -1 for sibling in info.siblings or []}

    def one(name: str) -> Path:
        if folder is not None:
            return folder / name
        return Path(
            _hub(
                lambda: hf_hub_download(filename=name, revision=commit, **common),
                f"{uri} ({name})",
                revision,
                missing,
            )
        )

    only = inside if inside in names else ""
    if only:
        wanted = [only]
    elif select is None:
        raise RunError(missing, f"{uri} (revision {revision}) names no file; there are {some(names)}")
    elif inside:
        wanted = _inside(names, inside)
        if not wanted:
            raise RunError(missing, f"{uri} (revision {revision}): no file {inside!r} there, but {some(names)}")
    else:
        wanted = select(names, lambda name: one(name).read_bytes())
    log.info("fetching %d files of %s at commit %s", len(wanted), uri, commit)
    with ThreadPoolExecutor(4) as pool:
        paths = dict(zip(wanted, pool.map(one, wanted), strict=True))
    root = paths[wanted[0]]
    for _ in PurePosixPath(wanted[0]).parts:
        root = root.parent
    files = {name: [path.stat().st_size, 0, _blob_digest(path)] for name, path in paths.items()}
    return Record(uri, str(root), f"git:{commit}", files, only)


def _inside(names: Names, inside: str) -> list[str]:
    """The data files of a folder of a repository, or those a pattern matches."""
    folder, pattern = split_pattern(inside)
    before = f"{folder}/" if folder else ""
    return [before + name for name in data_files((n[len(before) :] for n in names if n.startswith(before)), pattern)]


def parse_hub(uri: str) -> tuple[str, str, str]:
    """``hf://datasets/ORG/NAME/FILE`` → ("dataset", "ORG/NAME", "FILE"); FILE may be missing."""
    parts = uri.removeprefix("hf://").strip("/").split("/")
    kind = "model"
    if parts[0] in ("datasets", "models"):
        kind = "dataset" if parts.pop(0) == "datasets" else "model"
    if not parts or not parts[0]:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{uri!r} names no repository; accepted: hf://ORG/NAME, hf://datasets/ORG/NAME",
        )
    return kind, "/".join(parts[:2]), "/".join(parts[2:])


def _offline(uri: str, revision: str, missing: Cause, common: dict[str, Any]) -> tuple[Path, str, Names]:
    """What the hub's cache holds of a repository, without any request (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    # Not snapshot_download: it insists on every file of the repository.
    home = Path(constants.HF_HUB_CACHE, repo_folder_name(**common))
    reference = home / "refs" / revision
    folder = home / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    if not folder.is_dir():
        raise RunError(
            missing,
            f"{uri} (revision {revision}) is not in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids to fetch it. Unset HF_HUB_OFFLINE, or fill the cache.",
        )
    names = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    return folder, folder.name, names


def _token_given() -> str:
    """How a token is given, as the end of a sentence."""
    return where_it_runs(
        cluster="put a token as HF_TOKEN into the Secret of spec.credentials.secretName",
        machine="set a token as HF_TOKEN in the environment (or log in with hf auth login)",
    )


def _hub(call: Callable[[], Any], uri: str, revision: str, missing: Cause) -> Any:
    """Call the hub; network trouble is tried again, and every failure becomes a RunError that says what to do."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    at = f"{uri} (revision {revision}, endpoint {endpoint})"
    token = "its HF_TOKEN" if os.environ.get("HF_TOKEN") else "no HF_TOKEN is set"
    for attempt in range(1, _HUB_TRIES + 1):
        try:
            return call()
        except errors.GatedRepoError as error:
            raise RunError(
                Cause.ACCESS_DENIED,
                f"{at} is gated, and the hub does not let this run in ({token}). Accept its terms on the hub, "
                f"and {_token_given()}, of that account.",
            ) from error
        except errors.RevisionNotFoundError as error:
            raise RunError(missing, f"{at}: no such revision; give a branch, tag or commit that exists") from error
        except errors.RepositoryNotFoundError as error:
            raise RunError(
                missing,
                f"{at}: no such repository, or it is private and this run may not see it ({token}). Correct the "
                f"URI, or {_token_given()}.",
            ) from error
        except errors.RemoteEntryNotFoundError as error:
            raise RunError(missing, f"{at}: no such file") from error
        except errors.HFValidationError as error:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"{uri!r} is no name of a repository: {error}. Accepted: hf://ORG/NAME",
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise RunError(
                    Cause.ACCESS_DENIED, f"{at}: the hub answers {status} ({token}). Give a valid HF_TOKEN."
                ) from error
            failure: Exception = error
        except Exception as error:  # httpx's, requests', OSError: the library changes which
            failure = error
        if attempt == _HUB_TRIES:
            raise RunError(
                Cause.STORAGE_UNAVAILABLE,
                f"{at} cannot be fetched: {_cause_line(failure)}. Tried {attempt} times. Check DNS, proxy and network "
                "policies; set HF_ENDPOINT for a mirror, or name a copy in s3://, gs://, az:// or pvc://.",
            ) from failure
        time.sleep(2 ** (attempt - 1) / 2)
    raise AssertionError("unreachable")


def _blob_digest(path: Path) -> str:
    """The hub's cache names large files by their SHA-256; others (40 digits) have no digest to compare."""
    blob = path.resolve().name
    return f"sha256:{blob}" if len(blob) == 64 else ""


def _cause_line(error: BaseException) -> str:
    """The innermost explanation of a chain of exceptions, in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
