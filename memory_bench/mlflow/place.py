"""Where MLflow keeps runs, servers and databases: finds them, talks to them, turns their errors into sentences."""

import importlib.util
import logging
import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from memory_bench.errors import UserError

SERVERS, DATABASES = ("http", "https"), ("sqlite", "postgresql", "mysql", "mssql")


class NotSynced(Exception):
    """MLflow could not be written, in one sentence. The records stand."""


def check(uri: str) -> None:
    """Refuse what cannot be written to, without asking; an empty `uri` is a database in the results folder.

    Raises:
        UserError: MLflow is not installed, or the URI is of another kind.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise UserError('MLflow is not installed; install the extra with `pip install "memory-bench[mlflow]"`.')
    scheme, sign, _ = uri.partition("://")
    if uri and (not sign or scheme.partition("+")[0] not in (*SERVERS, *DATABASES)):
        raise UserError(
            f"'{uri}' is no place for MLflow: give http://HOST:PORT of a server or sqlite:///FILE, or no URI for a "
            "database in the results folder."
        )


def reach(uri: str) -> None:
    """Ask a server or database whether it is there, before anything is trained.

    Raises:
        UserError: as of `check`, or it does not answer.
    """
    check(uri)
    if not uri:
        return
    try:
        with talking(uri, retries=0, seconds=10) as client:
            client.search_experiments(max_results=1)
    except NotSynced as problem:
        raise UserError(f"{problem} Start the server, or give no URI for a database in the results folder.") from None


@contextmanager
def talking(uri: str, *, retries: int = 2, seconds: int = 60) -> Iterator[Any]:
    """A client that is silent and gives up early; what it raises becomes a sentence.

    MLflow's own defaults wait for minutes for a server that is down, and send usage data to its makers. Whoever has set
    one of its environment variables gets what was set.

    Args:
        uri: of a server or database.
        retries: of a request.
        seconds: before a request is given up.

    Raises:
        NotSynced: whatever MLflow raised.
    """
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
    }
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    levels = {name: logging.getLogger(name).level for name in ("mlflow", "alembic", "urllib3")}
    os.environ.update(settings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow import MlflowClient

            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield MlflowClient(uri, registry_uri=uri)
    except (UserError, NotSynced):
        raise
    except Exception as problem:  # MLflow's, its database's and its server's errors share no type
        raise NotSynced(f"MLflow at {shown(uri)} cannot be used: {_reason(problem)}.") from problem
    finally:
        for name in settings:
            os.environ.pop(name, None)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _reason(problem: BaseException) -> str:
    """The innermost of a chain of errors, in a line."""
    text = str(problem)
    if "Connection refused" in text or "NewConnectionError" in text:
        return "nobody answers there"
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (first or type(problem).__name__).rstrip(".")[:300]


def default_place(folder: Path) -> str:
    """The database of a results folder."""
    return f"sqlite:///{folder / 'mlflow.db'}"


def artifacts(place: str, folder: Path) -> str | None:
    """Where files go: a server decides itself; for a database beside it, never in the current folder."""
    scheme, _, path = place.partition("://")
    if scheme in SERVERS:
        return None
    home = Path(path.removeprefix("/")).resolve().parent if scheme.startswith("sqlite") else folder
    return (home / "mlartifacts").as_uri()


def shown(uri: str) -> str:
    """`uri` without a password."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:…@{host}"))


def site(place: str) -> str:
    """Address of the pages; of a database, where `serve` shows them."""
    parts = urlsplit(place)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host)).rstrip("/") if parts.scheme in SERVERS else "http://127.0.0.1:5000"


def serve(place: str) -> str:
    """The command that shows a database; empty for a server."""
    if urlsplit(place).scheme in SERVERS:
        return ""
    return f"mlflow server --port 5000 --workers 1 --backend-store-uri {shlex.quote(shown(place))}"
