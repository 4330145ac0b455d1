"""Eight virtual CPU devices for every test; set before jax is imported anywhere."""

import gc
import importlib.metadata
import os
import pathlib
import signal

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Compilation is most of what tiny models cost; without LLVM's optimisation it takes a third less.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# Another third; asked for by version, as an unknown flag ends the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Else transformers 5 remarks on the stderr of every command that there is no PyTorch.
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
# What is compiled once is shared by all tests and the processes that they start, and kept for the
# next run of the suite. An entry that another worker is still writing is compiled anew.
_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# A shell starts what it runs in the background with interrupts ignored, and so would the processes
# be that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


#: Memory maps of a process, of the 65,530 that Linux allows by default.
_MANY_MAPS = 30_000


@pytest.fixture(scope="module", autouse=True)
def _few_maps():
    """After a module, forget compiled programs where they are many.

    Each holds some memory maps, and the compiler crashes where it is given no more.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")  # of Linux
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory) -> pathlib.Path:
    """The folder of tests/toy.py; to be copied by a test that changes it."""
    from tests.toy import write_catalogue

    return write_catalogue(tmp_path_factory.mktemp("data") / "catalogue")
