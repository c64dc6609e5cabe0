"""Compile the C sources beside this file into shared libraries, once per machine and version.

What it is: `build()`: the path of a library (the kernels, or another NAME.c) in the user's cache (kernels/cache.py), keyed by the sources, the compiler's version, the CPU's flags
and the variant: all that this CPU has, or one of VARIANTS. The file appears by an atomic rename, so that processes that start
together may all build it. No OpenMP: the library brings its own helpers (team.h says why), and torch's runtime stays the only one.
What it does not know: the library's functions.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from penstock.kernels import cache

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-fopenmp-simd", "-Wall")
TUNING = (("-march=native",), ("-mcpu=native",), ())
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
VARIANTS = {"avx2": _AVX2, "avx512": _AVX512, "avx512bf16": (*_AVX512, "avx512_bf16")}
"""Instruction sets of x86-64 that can be asked for, and the CPU's flags that they need, as Linux names them."""
TIMEOUT_S = 120
KERNELS = "kernels"


class BuildError(RuntimeError):
    """No library could be built; the text says why."""


def compilers() -> list[str]:
    """Commands to try, in order: $PENSTOCK_CC, $CC, cc, gcc; those that exist."""
    named = [os.environ.get("PENSTOCK_CC"), os.environ.get("CC"), "cc", "gcc"]
    if named[0] is not None:
        named = named[:1]
    found = (shutil.which(name) for name in named if name)
    return list(dict.fromkeys(path for path in found if path is not None))


def cache_directory() -> Path:
    """A directory that only this user can write; a private temporary one where the cache cannot be used."""
    return cache.directory("kernels") or Path(tempfile.mkdtemp(prefix="penstock-kernels-"))


def cpu_flags() -> str:
    """What this CPU can do, as far as the system says: -march=native compiles for it, so that it is part of the key."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(named))])


def missing(variant: str) -> list[str]:
    """Flags that a variant needs and this CPU lacks."""
    has = cpu_flags().replace(":", " ").split()
    return [flag for flag in VARIANTS[variant] if flag not in has]


def _tunings(variant: str | None) -> tuple[tuple[str, ...], ...]:
    """Compiler options to try, in order."""
    if variant is None:
        return TUNING
    return ((*(f"-m{flag.replace('_', '')}" for flag in VARIANTS[variant]), "-mtune=native"),)


def _run(command: list[str], cwd: Path) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[:600]}")
    return done.stdout


def _compile(compiler: str, version: str, variant: str | None, name: str) -> Path:
    """The headers are the kernels'; other sources stand alone."""
    sources = sorted(path for path in SOURCES.iterdir() if path.name == f"{name}.c" or (name == KERNELS and path.suffix == ".h"))
    key = hashlib.sha256()
    tunings = _tunings(variant)
    for part in (version, cpu_flags(), " ".join(FLAGS), repr(tunings)):
        key.update(part.encode() + b"\0")
    for path in sources:
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    directory = cache_directory()
    library = directory / f"{name}-{key.hexdigest()[:24]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        work = Path(scratch)
        for tuning in tunings:
            try:
                _run([compiler, *FLAGS, *tuning, "-c", str(SOURCES / f"{name}.c"), "-o", "library.o"], work)
                break
            except BuildError:
                if tuning == tunings[-1]:
                    raise
        _run([compiler, "-shared", "-o", "library.so", "library.o", "-pthread", "-lm"], work)
        os.replace(work / "library.so", library)
    return library


def build(variant: str | None = None, name: str = KERNELS) -> Path:
    """Path of a library for this machine, or of a variant of it, compiled if need be. Raises BuildError."""
    failures: list[str] = []
    for compiler in compilers():
        try:
            return _compile(compiler, _run([compiler, "--version"], SOURCES), variant, name)
        except (BuildError, OSError) as error:
            failures.append(str(error))
    asked = os.environ.get("PENSTOCK_CC")
    raise BuildError("; ".join(failures) or "no C compiler found" + (f": PENSTOCK_CC={asked} is no program" if asked is not None else ""))
