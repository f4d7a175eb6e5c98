import gc
import itertools
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


# The whole suite runs in double precision, and once more with JAX_ENABLE_X64=0.
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each worker has one core: threads of two would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def are_known(*flags: str) -> bool:
    """Whether this XLA has all of these flags. At one that it lacks it ends the process, so
    another process tries."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    return not subprocess.run(command, env=environment, capture_output=True).returncode


# Most of the suite's time is compilation, so compile with less optimisation, unless
# XLA_FLAGS is set: `XLA_FLAGS= make test` compiles as users do. Workers inherit it.
if "XLA_FLAGS" not in os.environ:
    _fast = (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
    known = _fast if are_known(*_fast) else filter(are_known, _fast)
    os.environ["XLA_FLAGS"] = " ".join(known)

# Workers, and the processes that they start, share what they compile, for one session. jax
# 0.10.0 sometimes hangs when it loads a program.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ and version("jax") != "0.10.0":
    _cache = tempfile.TemporaryDirectory(prefix="gddim_eqx-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import equinox.internal as eqxi
import hypothesis
import jax
import jaxtyping
import pytest


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes many objects that live long, and lowering writes down where each was made.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=25, print_blob=False
)
hypothesis.settings.load_profile("default")


# What `make test` leaves to `make test-all`, beside single cases that are marked so.
_thorough = {"thorough", "programs"}


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.parent.name in _thorough:
            item.add_marker(pytest.mark.thorough)
    if jax.config.jax_enable_x64:
        marker, reason = "float32", "is only run in single precision (JAX_ENABLE_X64=0)"
    else:
        marker, reason = "x64", "needs double precision (JAX_ENABLE_X64=1)"
    for item in items:
        if marker in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


_ended = itertools.count(1)


def pytest_runtest_teardown():
    """Free what was compiled now and then: it takes memory maps, of which Linux grants a
    process 65,530, and without one more XLA ends it."""
    if next(_ended) % 20 == 0 and _number_of_memory_maps() > 25_000:
        jax.clear_caches()


def _number_of_memory_maps() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture
def getkey():
    return eqxi.GetKey()


@pytest.fixture
def without_type_checks(monkeypatch):
    """As users have it, who see the library's own errors."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def as_users_have_it():
    """Without the strictness of this suite, which other libraries do not share."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
