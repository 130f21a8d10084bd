"""The Hugging Face hub: a model's files and a dataset's rows. Only `make fetch` uses it.

Every use begins with one short request, because without a network the libraries retry for half a
minute, and then some of them fall back on whatever revision they find in their cache.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from runfolder.errors import UserError
from train.engine.once import CutOff
from train.engine.rows import Columns, Row, check_columns, chosen, class_name


def resolve(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
    """Return the commit that `revision` of a repository refers to (None: the newest).

    Raises:
        UserError: there is no such repository or revision, no access to it, or no network.
    """
    import httpx2
    from huggingface_hub import HfApi, constants, errors

    setting = "model.name" if kind == "model" else "data.name"
    hub = constants.ENDPOINT
    try:
        info: Any = HfApi().repo_info(
            name, repo_type=kind, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{setting}: {name} is gated; request access on its page at {hub}, then set "
            "HF_TOKEN to your token"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{setting}: {hub} has no {kind} {name} that you can access; check the spelling, or "
            "set HF_TOKEN if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        section = setting.partition(".")[0]
        raise UserError(
            f"{section}.revision: {name} has no revision {revision}; choose one from its page at "
            f"{hub}, or null for the newest"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        steps = {401: "check HF_TOKEN", 403: "check HF_TOKEN", 404: "check HF_ENDPOINT"}
        step = steps.get(status, "try again later")
        raise UserError(f"{setting}: {hub} answers {status} for {name}; {step}") from None
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{setting}: {name} is not downloaded yet and HF_HUB_OFFLINE is set; unset it to fetch"
        ) from None
    except errors.HFValidationError:
        raise UserError(f"{setting}: '{name}' is not a hub id such as owner/name") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise UserError(
            f"{setting}: {hub} cannot be reached ({_reason(error)}); fetch where there is a "
            "network, or set HF_ENDPOINT to a mirror"
        ) from None
    commit: str = info.sha
    return commit


def download_model(name: str, revision: str | None, folder: Path, patterns: list[str]) -> None:
    """Download the files of a model that match `patterns` and are not in `folder` yet.

    Raises:
        CutOff: it was interrupted.
        UserError: as `resolve`.
    """
    commit = resolve("model", name, revision)
    import httpx2
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=patterns)
    except (httpx2.HTTPError, errors.XetDownloadError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        raise CutOff(
            f"model.name: the download of {name} was interrupted ({_reason(error)}); run it again: "
            "complete files are not downloaded again"
        ) from None


def dataset_rows(
    name: str, config: str | None, revision: str | None, split: str, columns: Columns
) -> Iterator[Row]:
    """Yield the rows of a dataset as `rows.read_rows` does, a thousand in memory at a time.

    A class is given by its name, not by its number.

    Raises:
        UserError: as `resolve`, or the dataset has no such configuration, split or column.
    """
    commit = resolve("dataset", name, revision)
    import httpx2

    # Not `import`: tools that read the code take the checkout's folder `datasets` for it.
    datasets: Any = importlib.import_module("datasets")
    what = f"data.name: {name} ({config}, {split})"
    # Its warnings concern the errors below, which say more.
    datasets.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=commit)
    except (httpx2.HTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        raise UserError(f"{what} cannot be loaded: {_reason(error)}") from None
    except datasets.exceptions.DatasetsError as error:
        raise UserError(f"{what} cannot be loaded: {_reason(error)}") from None
    # The library may have lost the connection, and used another revision from its cache.
    if not all(commit in Path(file["filename"]).parts for file in rows.cache_files):
        raise UserError(
            f"{what} could not be loaded at revision {commit[:12]}, only an earlier one from the "
            "cache; run it again, or give data.revision"
        )
    columns = chosen(columns, rows.column_names)
    check_columns(what, columns, rows.column_names)
    names = list(columns.values())
    classes = [getattr(rows.features[name], "names", None) for name in names]
    for batch in rows.iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            yield what, tuple(map(class_name, classes, values))


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message, or of what caused it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
