"""Settings that every test shares: four CPU devices, a compile cache, a place for data sets."""

import os
import pathlib

import jax
import pytest

CACHE = pathlib.Path(__file__).parent.parent / ".cache"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
os.environ.setdefault("TFDS_DATA_DIR", str(CACHE / "tensorflow_datasets"))
# Programmes that tests start as processes use the same cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))


@pytest.fixture(scope="module")
def quick_compilation():
    """Without LLVM's optimisations, here and in processes: a third to a half of the time.

    XLA's own stay. For modules that ask what a program does, and not how its sums are rounded:
    `pytestmark = pytest.mark.usefixtures("quick_compilation")`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def root() -> pathlib.Path:
    """The repository's root."""
    return pathlib.Path(__file__).parent.parent
