"""Where a leaderboard lies: a file, a folder in the layout of the hub dataset, a web address, or that dataset itself.

What is found are local files, identified by their content, and where they came from. The hub's branches move: one is resolved
to the commit that it stands for, sizes are looked up before anything is fetched, and the files of that commit are taken.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError, RatingsError, ServiceError
from charm_core.leaderboards import style_by_name
from tasks.addresses import shown_address
from tasks.publishing import run_logger
from tasks.ratings.fetching import FetchConfig, check_not_pickle, check_url, fetch
from tasks.store import SourceFile, source_file

OFFICIAL_DATASET = "lmarena-ai/leaderboard-dataset"
HUB = "https://huggingface.co"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
_SPLIT_FILE = re.compile(r"(?:latest|full)-\d+-of-\d+\.parquet")
_HUB_CACHE = re.compile(r"datasets--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
_ATTRIBUTION = {OFFICIAL_DATASET: "Arena (LMArena), leaderboard dataset on Hugging Face"}
_LICENCES = {OFFICIAL_DATASET: "CC BY 4.0"}


class Origin(BaseModel):
    """Where ratings come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shown: str = Field(description="For people: file name or address.")
    url: str = Field(description="Path or address.")
    publisher: str = Field(description="Whose file it is, where the file does not say.")
    revision: str | None = Field(default=None, description="Commit, where it has one.")
    licence: str = ""
    attribution: str = ""
    notes: tuple[str, ...] = ()


class Located(BaseModel):
    """The files of one source; several are parts of one table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[SourceFile, ...]
    origin: Origin


class SourceQuery(BaseModel):
    """What of a source is wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    arena: str
    style_control: bool
    whole_history: bool = Field(description="The dataset's history instead of its latest board.")
    revision: str | None
    hub_endpoint: str
    fetching: FetchConfig

    @property
    def folder(self) -> str:
        """The configuration of the hub dataset, which has a folder of its own."""
        return f"{self.arena}_style_control" if self.style_control else self.arena

    @property
    def table(self) -> str:
        """That configuration's history, or its latest board."""
        return f"{self.folder}/{'full' if self.whole_history else 'latest'}"


def locate(query: SourceQuery, folder: Path) -> Located:
    """Find a source, and fetch it where it is not on this machine.

    Args:
        query: What is wanted.
        folder: Where copies of fetched files are kept.

    Raises:
        ConfigError: There is no such source, it is refused (a pickle, no encryption), or its name contradicts the settings.
        RatingsError: A folder or dataset without the wanted board.
        ServiceError: A server does not answer, or not as it should.
    """
    source = query.source
    path = Path(source).expanduser()
    if "://" in source:
        found = _from_web(query, folder)
    elif path.is_file():
        found = _from_file(path)
    elif path.is_dir():
        found = _from_folder(path, query)
    elif _HUB_ID.fullmatch(source):
        found = _from_hub(query, folder)
    else:
        raise ConfigError(
            f"there is no file or folder {source!r} (working folder {Path.cwd()}), and it is neither an https address nor a "
            f"dataset id such as {OFFICIAL_DATASET}; correct arena.source"
        )
    _check_style(found.origin.url, query)
    return found


def local_file(source: str, fetching: FetchConfig, folder: Path) -> SourceFile:
    """A single file that accompanies a source, from this machine or from the web.

    Raises:
        ConfigError: There is none, or it is refused.
        ServiceError: A server does not answer, or not as it should.
    """
    if "://" not in source:
        check_not_pickle(source)
        return source_file(source)
    fetched = fetch(source, fetching, folder)
    return SourceFile(path=str(fetched.path), digest=fetched.digest)


def _from_file(path: Path) -> Located:
    check_not_pickle(path.name)
    file = source_file(str(path))
    return Located(files=(file,), origin=Origin(shown=path.name, url=str(path.resolve()), publisher=path.name))


def _from_web(query: SourceQuery, folder: Path) -> Located:
    fetched = fetch(query.source, query.fetching, folder)
    run_logger().info("%s: %s, %s bytes", shown_address(query.source), fetched.outcome, f"{fetched.size:,}")
    url = shown_address(query.source)
    commit = _COMMIT.search(url)
    stale = f"the server did not answer: a copy of {fetched.fetched_at} was used"
    origin = Origin(
        shown=url,
        url=url,
        publisher=_publisher(url),
        revision=commit[0] if commit else None,
        notes=(stale,) if fetched.outcome == "stale" else (),
    )
    return Located(files=(SourceFile(path=str(fetched.path), digest=fetched.digest),), origin=origin)


def _from_folder(path: Path, query: SourceQuery) -> Located:
    folder = path.resolve()
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = tuple(source_file(str(folder / name)) for name in _wanted(names, query))
    cached = _HUB_CACHE.search(folder.as_posix())
    publisher = f"{cached[1]}/{cached[2]}" if cached else folder.name
    origin = Origin(
        shown=f"{publisher} {query.table}",
        url=str(folder),
        publisher=publisher,
        revision=cached[3] if cached else None,
        licence=_LICENCES.get(publisher, ""),
        attribution=_ATTRIBUTION.get(publisher, ""),
    )
    return Located(files=files, origin=origin)


def _from_hub(query: SourceQuery, folder: Path) -> Located:
    check_url(query.hub_endpoint, query.fetching)
    info = _dataset_info(query)
    listed = {file.rfilename: file for file in info.siblings or []}
    names = _wanted(list(listed), query)
    total = sum(listed[name].size or 0 for name in names) / 1_000_000
    if total > query.fetching.max_megabytes:
        raise ServiceError(
            f"{query.source} {query.table} has {total:.0f} MB, more than the {query.fetching.max_megabytes:g} MB of "
            f"fetching.max_megabytes; raise it if that is right"
        )
    endpoint = query.hub_endpoint.rstrip("/")
    urls = {name: f"{endpoint}/datasets/{query.source}/resolve/{info.sha}/{name}" for name in names}
    fetched = []
    for name, url in urls.items():
        one = fetch(url, query.fetching, folder, key=f"{endpoint}/datasets/{query.source}/{name}")
        expected = listed[name].lfs.sha256 if listed[name].lfs else one.digest
        if one.digest != expected:
            raise ServiceError(f"{url} has the SHA-256 {one.digest}, but the hub lists {expected}; try again later")
        fetched.append(one)
    run_logger().info("%s at %s: %s", query.source, info.sha, ", ".join(f"{one.size:,} bytes" for one in fetched))
    licence = getattr(info.card_data, "license", None) or _LICENCES.get(query.source, "")
    origin = Origin(
        shown=f"{query.source} {query.table}",
        url=urls[names[0]] if len(names) == 1 else f"{endpoint}/datasets/{query.source}/tree/{info.sha}/{query.folder}",
        publisher=query.source,
        revision=info.sha,
        licence=str(licence),
        attribution=_ATTRIBUTION.get(query.source, f"{query.source} on Hugging Face"),
    )
    return Located(files=tuple(SourceFile(path=str(one.path), digest=one.digest) for one in fetched), origin=origin)


def _dataset_info(query: SourceQuery) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(endpoint=query.hub_endpoint.rstrip("/"), token=False)  # public data: nobody's token goes anywhere
    try:
        info = api.dataset_info(
            query.source, revision=query.revision or "main", files_metadata=True, timeout=query.fetching.read_seconds
        )
    except RevisionNotFoundError:
        raise ConfigError(
            f"the dataset {query.source} has no revision {query.revision!r}; correct arena.revision"
        ) from None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"there is no file, folder or hub dataset {query.source!r} ({str(error).splitlines()[0]}); correct arena.source"
        ) from None
    except Exception as error:  # whatever its HTTP library, another one in each version, calls a server that is down
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ServiceError(
            f"the hub {query.hub_endpoint} does not answer for {query.source}: {reason}; try again later"
        ) from error
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ServiceError(
            f"the hub {query.hub_endpoint} names no commit for {query.source}; it is no hub that CHARM knows"
        )
    return info


def _wanted(names: list[str], query: SourceQuery) -> list[str]:
    found = sorted(name for name in names if fnmatchcase(name, f"{query.table}-*.parquet"))
    if not found:
        tables = sorted({name.rsplit("-", 3)[0] for name in names if name.endswith(".parquet")})
        raise RatingsError(
            f"{query.source} has no files {query.table}; it has {', '.join(tables) or 'no Parquet files'}; correct "
            f"arena.arena or arena.style_control"
        )
    return found


def _check_style(url: str, query: SourceQuery) -> None:
    """Numbers with and without style control differ by dozens of points, and files of both kinds look alike."""
    folder, _, name = urlsplit(url).path.rpartition("/")
    if _SPLIT_FILE.fullmatch(name):  # in the hub dataset the folder says which board it is
        name = f"{folder.rpartition('/')[2]}/{name}"
    said = style_by_name(name)
    if said is not None and said != query.style_control:
        raise ConfigError(
            f"{name} is a board {'with' if said else 'without'} style control by its name, but "
            f"arena.style_control is {str(query.style_control).lower()}; correct one of them"
        )


def _publisher(url: str) -> str:
    """Whose file it is; the same for all versions of it."""
    parts = urlsplit(url)
    steps = [step for step in parts.path.split("/") if step]
    if parts.hostname in ("raw.githubusercontent.com", "github.com") and len(steps) > 2:
        return "/".join(steps[:2])
    if parts.hostname == "huggingface.co" and steps[:1] == ["datasets"] and len(steps) > 3:
        return "/".join(steps[1:3])
    return f"{parts.netloc}{_COMMIT.sub('…', parts.path)}"
