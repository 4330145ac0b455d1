"""The objects below an address on object storage, `gs://` or `s3://`, and what it says of failures.

This is fsspec and not etils.epath, which wraps it: epath has no write that an object of the same
name stops, no time limits, and no times in a listing.
"""

import contextlib
import datetime
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rcml_jax.errors import UserError

#: Scheme → the package that serves it, and the extra that brings it.
SCHEMES = {"gs": ("gcsfs", "gs"), "s3": ("s3fs", "s3")}


class Storage:
    """The objects below an address. Every failure is a UserError of one sentence."""

    def __init__(self, address: str, filesystem: Any = None):
        self._address = address
        self._root = address.partition("://")[2].rstrip("/")
        with self._told():
            self._files = _connect(address) if filesystem is None else filesystem

    def names(self, prefix: str) -> dict[str, datetime.datetime | None]:
        """Names below a prefix, relative to the address, and when each was written."""
        with self._told():
            found = self._files.find(f"{self._root}/{prefix}", detail=True)
        start = len(self._root) + 1
        return {name.lstrip("/")[start:]: _written(info) for name, info in found.items()}

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        with self._told():
            try:
                return self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write an object, also over an older one."""
        with self._told():
            self._files.pipe_file(f"{self._root}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object; False where there is one of that name."""
        with self._told():
            try:
                self._files.pipe_file(f"{self._root}/{name}", content, mode="create")
            except FileExistsError:
                return False
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, those that are there."""
        with self._told():
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What the storage says as a sentence."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each package and each of its layers has its own
            raise _explained(self._address, error) from error


def _connect(address: str) -> Any:
    scheme = address.partition("://")[0]
    package, extra = SCHEMES[scheme]
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": 5,
            "read_timeout": 30,
            "retries": {"max_attempts": 2},
        }
    else:
        options["requests_timeout"] = 30
    try:
        import fsspec

        found = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise UserError(
            f'{scheme}:// needs the package {package}: pip install "rcml_jax[{extra}]"'
        ) from error
    found.retries = 2
    return found


def _written(info: Mapping[str, Any]) -> datetime.datetime | None:
    """When an object was written; None where the listing does not say so."""
    found = info.get("LastModified") or info.get("mtime") or info.get("created")
    if isinstance(found, int | float):
        return datetime.datetime.fromtimestamp(found, datetime.UTC)
    if not isinstance(found, datetime.datetime):
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}


def _explained(address: str, error: Exception) -> UserError:
    """What a package of the storage raised, as a sentence with the remedy."""
    scheme, _, rest = address.partition("://")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    code = getattr(error, "code", None)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    remedy = _CREDENTIALS.get(scheme, "see the documentation of the storage")
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}:
        return UserError(f"there are no credentials for {address} ({reason}); {remedy}")
    if code in (401, "401"):  # gcsfs asks as nobody where it finds none
        return UserError(f"there are no valid credentials for {address} ({reason}); {remedy}")
    forbidden = isinstance(error, OSError) and reason.startswith("Forbidden: ")  # of gcsfs
    if isinstance(error, PermissionError) or code in (403, "403") or forbidden:
        return UserError(
            f"{address} is refused to these credentials ({reason}); ask for the right to list, "
            f"read and write there, or use others: {remedy}"
        )
    if isinstance(error, FileNotFoundError) or code in (404, "404"):
        bucket = rest.partition("/")[0]
        return UserError(
            f"there is no bucket {bucket} for {address} ({reason}); make it, or correct the address"
        )
    network = {"ConnectionError", "HTTPClientError", "ClientConnectionError", "TimeoutError"}
    if kinds & network or isinstance(error, ConnectionError | TimeoutError):
        server = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}.get(
            scheme, "its address"
        )
        return UserError(
            f"{address} cannot be reached ({reason}); look at the network and, for storage of "
            f"your own, at {server}, and start the same command again to go on"
        )
    return UserError(
        f"{address} cannot be used ({type(error).__name__}: {reason}); mend that and start the "
        "same command again to go on"
    )
