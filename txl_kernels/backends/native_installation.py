"""The native library in this installation: where it is, why it must not be loaded, how to build it.

The folder `_native` of the package has a library for each minor version of torch that it was built
for. Beside it is its build record (JSON), which is checked before anything is loaded:

    _native/torch-2.13/libtxl_kernels.so, _native/torch-2.13/build.json
    _native/build.json        where nothing was built: the reason
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

PACKAGE_DIR = Path(__file__).resolve().parents[1]
FOLDER = "_native"
LIBRARY_NAME = "libtxl_kernels.so"
RECORD_NAME = "build.json"
# The record of earlier versions of this package, in which `_C` contained the kernels.
EARLIER_RECORD_NAME = "_native_build.json"
PROCESSORS = ("x86_64", "aarch64")
_COMMAND_FOLLOWS = "; this command builds the kernels: "
# Without these options pip and uv install a wheel again that they built and cached earlier.
_OPTIONS = "--force-reinstall --no-deps --no-cache-dir"


def library_path(torch_version: str) -> Path:
    """The library for a version of torch, whether or not it exists."""
    return PACKAGE_DIR / FOLDER / f"torch-{_minor(torch_version)}" / LIBRARY_NAME


def read_record(path: Path) -> dict[str, Any]:
    """A build record.

    Raises:
        OSError, ValueError, TypeError: the file cannot be read, or holds no JSON object.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise TypeError(f"expected a JSON object, got {type(record).__name__}")
    return record


def refusal(torch_version: str) -> str | None:
    """Why no library may be loaded under a version of torch, or None.

    The sentence ends with the command that builds one, where a build helps.
    """
    folder = library_path(torch_version).parent
    path = folder / RECORD_NAME
    if not path.exists() and not (folder / LIBRARY_NAME).exists():
        return _not_built(torch_version)
    try:
        record = read_record(path)
        built_for, interface = str(record["torch"]), dict(record["interface"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _unreadable(path, error)
    if _minor(built_for) != _minor(torch_version):
        return _built_for_another(f"{built_for} in {folder}", record, torch_version)
    changed = [name for name, sha in interface.items() if _differs(PACKAGE_DIR / name, sha)]
    if changed:
        return with_command(
            f"the native library in {folder} was built from other sources than those of "
            f"txl_kernels here (changed: {', '.join(changed)})"
        )
    return None


def _differs(path: Path, sha256: str) -> bool:
    """Whether a file of this package is not the one of the build; False if it is not installed."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != sha256


def _not_built(torch_version: str) -> str:
    """Why there is no library for this torch."""
    if platform.system() != "Linux" or platform.machine() not in PROCESSORS:
        here = f"{platform.system()} on {platform.machine()}"
        return f"the native kernels are made for Linux on {_listed(PROCESSORS)}, this is {here}"
    path = PACKAGE_DIR / FOLDER / RECORD_NAME
    if path.exists():
        try:
            reason = str(read_record(path)["reason"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return _unreadable(path, error)
        return with_command(f"txl_kernels was installed without its native part: {reason}")
    libraries = sorted(
        (PACKAGE_DIR / FOLDER).glob(f"torch-*/{LIBRARY_NAME}"), key=lambda x: _number(x.parent.name)
    )
    if len(libraries) == 1:
        return _built_for_one(libraries[0].parent, torch_version)
    if libraries:
        versions = _listed([path.parent.name.removeprefix("torch-") for path in libraries])
        return with_command(
            f"txl_kernels in {PACKAGE_DIR} has native libraries for torch {versions}, but torch "
            f"{torch_version} is installed here"
        )
    return _no_record()


def _built_for_one(folder: Path, torch_version: str) -> str:
    try:
        record = read_record(folder / RECORD_NAME)
        return _built_for_another(str(record["torch"]), record, torch_version)
    except (OSError, ValueError, KeyError, TypeError):
        return _built_for_another(folder.name.removeprefix("torch-"), {}, torch_version)


def _built_for_another(built_for: str, record: dict[str, Any], torch_version: str) -> str:
    interpreter = record.get("interpreter")
    origin = f" of {interpreter}" if interpreter else ""
    return with_command(
        f"the native library of txl_kernels was built for torch {built_for}{origin}, "
        f"but torch {torch_version} is installed here"
    )


def _unreadable(path: Path, error: Exception) -> str:
    return with_command(f"the build record {path} is unreadable ({error!r})")


def _no_record() -> str:
    """Why there is no record: a checkout hides the installed package, or nothing was built."""
    if (PACKAGE_DIR / EARLIER_RECORD_NAME).exists():
        return with_command(
            f"the native part in {PACKAGE_DIR} was built by an earlier version of txl_kernels"
        )
    for distribution in importlib.metadata.distributions(name="transformer-xl"):
        installed = _folder_of(distribution)
        if (installed / FOLDER).exists() and installed != PACKAGE_DIR:
            return with_command(
                f"txl_kernels was imported from {PACKAGE_DIR}, where no native library is built, "
                f"instead of {installed}, where it is installed: run from another folder, or build "
                "in the checkout"
            )
    return with_command(f"txl_kernels in {PACKAGE_DIR} has no native library: it was never built")


def build_command() -> str:
    """The shell command that builds the kernels for this Python and its torch."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is not None:
        return f"{python} -m pip install {_OPTIONS} {_source()}"
    # An environment of uv: its builds cannot see which environment they are for.
    setting = "--global-option=" + shlex.quote(f"--torch-python={sys.executable}")
    installer = f"uv pip install --python {python} --config-settings={shlex.quote(setting)}"
    return f"{installer} {_OPTIONS} {_source()}"


def without_command(reason: str) -> str:
    """A reason without the command at its end, for places that show the command once."""
    return reason.split(_COMMAND_FOLLOWS)[0]


def with_command(problem: str) -> str:
    """One sentence: a problem that a build solves, and the command."""
    return f"{problem}{_COMMAND_FOLLOWS}{build_command()}"


def _source() -> str:
    """The command's last words: the checkout, or the place that this package was installed from.

    Where that is a wheel or no longer exists, the sources of the same version from the index.
    """
    checkout = PACKAGE_DIR.parent
    if (checkout / "setup.py").exists():
        return f"-e {shlex.quote(str(checkout))}"
    for distribution in importlib.metadata.distributions(name="transformer-xl"):
        if _folder_of(distribution) == PACKAGE_DIR:
            source = _requirement(distribution.read_text("direct_url.json"))
            if source is not None:
                return shlex.quote(source)
            return f"--no-binary transformer-xl transformer-xl=={distribution.version}"
    return ".  # in a checkout of transformer-xl"


def _requirement(text: str | None) -> str | None:
    """A source that pip can build from, or None for wheels and for files that no longer exist.

    Args:
        text: content of a `direct_url.json` (PyPA's "recording the direct URL origin"), or None.
    """
    try:
        origin = json.loads(text or "")
        url = urlsplit(str(origin["url"]))
        if "vcs_info" in origin:
            return f"{origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    except (ValueError, KeyError, TypeError):  # no such file, or it is damaged
        return None
    if url.path.endswith(".whl"):
        return None
    if url.scheme != "file":
        return str(origin["url"])
    path = url2pathname(url.path)
    return path if Path(path).exists() else None


def _folder_of(distribution: importlib.metadata.Distribution) -> Path:
    """The folder of txl_kernels in an installed distribution."""
    return Path(str(distribution.locate_file("txl_kernels"))).resolve()


def _minor(version: str) -> str:
    """The major and minor version, such as "2.13"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _number(folder: str) -> tuple[int, ...]:
    """The version in the name of a folder, for sorting."""
    parts = folder.removeprefix("torch-").split(".")
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
