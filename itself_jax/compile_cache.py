"""Programs compiled once are not compiled again: JAX's persistent cache, on by default."""

import contextlib
import hashlib
import os
import pathlib
import platform
import time

import jax

from itself_jax.data import remote

# The step of ViT-B/16 is about 20 MB. JAX drops what was not used for longest.
MAX_BYTES = 4 * 2**30
# A run compiles many small programs, and looking one up costs 1 ms.
_MIN_SECONDS = 0.1
_ENTRY, _USED = "-cache", "-atime"


def keep(folder: str | None = None) -> None:
    """Switches the cache on; call it before anything is compiled.

    Processes share it: JAX locks it, and of the processes of one run the first one writes. What
    cannot be read or written is compiled as if there were no cache, with a warning.

    folder: None is `~/.cache/itself_jax/compiled` (XDG_CACHE_HOME moves it), unless JAX's own
      JAX_COMPILATION_CACHE_DIR names one, which may be a bucket's and is left as JAX sets it up;
      "" switches the cache off.
    """
    if folder is None and jax.config.jax_compilation_cache_dir is not None:
        return
    if not folder and folder is not None:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    place = remote.user_cache() / "compiled" if folder is None else pathlib.Path(folder)
    place = place.expanduser().absolute() / _machine()
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        _drop_unfinished(place)
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        return  # a home that cannot be written, in a container say, is no reason to stop
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)


def _machine() -> str:
    """A name for machines that can run each other's programs, as homes are shared in clusters.

    JAX's own key knows the kind of accelerator, but not which instructions a CPU has.
    """
    features = ""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    features = features or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def _drop_unfinished(place: pathlib.Path) -> None:
    """Removes what a process that was killed while writing has left.

    Its size may be wrong, and JAX, which dates an entry after writing it, could not drop any entry
    while one has no date.
    """
    for entry in place.glob(f"*{_ENTRY}"):
        dated = entry.with_name(entry.name.removesuffix(_ENTRY) + _USED)
        if not dated.exists() and time.time() - entry.stat().st_mtime > 60:
            entry.unlink(missing_ok=True)
