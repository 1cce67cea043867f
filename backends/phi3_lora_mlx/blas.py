"""A fast BLAS for MLX on Linux: MLX's wheel links the reference BLAS, which is 31 times slower."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

_OPENBLAS = "libopenblas.so.0"
OPENBLAS_WHEEL = "cmeel-openblas==0.3.29"
"""Other releases run AVX-512 code without a check of the CPU."""
_GFORTRAN = "libgfortran.so.5"
_PROBE = Path(__file__).with_name("blas_probe.py")


def preload_blas() -> str | None:
    """Load OpenBLAS with global symbols; MLX then calls it instead of its own BLAS.

    The wheel cmeel-openblas is tried first, then the system's library. A library that crashes on
    this machine is skipped. Call this before the first import of mlx.core.

    Returns:
        The loaded library, or None. On macOS always None: MLX uses Accelerate there.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    for folder in dict.fromkeys([sysconfig.get_path("platlib"), *sys.path]):
        wheel = Path(folder) / "cmeel.prefix" / "lib" / _OPENBLAS
        if wheel.exists() and (_load([wheel]) or _load_with_gfortran(wheel, Path(folder))):
            return str(wheel)
    return _OPENBLAS if _load([Path(_OPENBLAS)]) else None


def uses_reference_blas() -> bool:
    """Return whether MLX uses the slow BLAS of its Linux wheel.

    A fast library that was preloaded has its symbols in the global scope of the process. The
    wheel's library is visible only to MLX. A timing is not used: a busy machine distorts it.
    """
    bundled = any(
        next((Path(folder) / "mlx_cpu.libs").glob("libblas-*"), None)
        for folder in {sysconfig.get_path("platlib"), *sys.path}
    )
    return bundled and not hasattr(ctypes.CDLL(None), "cblas_sgemm")


def _load(libraries: Sequence[Path]) -> bool:
    """Load libraries in order, if a matrix product with the last one works in a test process."""
    paths = [str(path) for path in libraries]
    probe = subprocess.run(
        [sys.executable, "-I", "-S", str(_PROBE), *paths], capture_output=True, check=False
    )
    if probe.returncode != 0:
        return False
    for path in paths:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return True


def _load_with_gfortran(openblas: Path, site_packages: Path) -> bool:
    """Load OpenBLAS on a machine without libgfortran, with the copy in MLX's wheel.

    OpenBLAS needs libgfortran.so.5. The wheel has this library under a name with a hash. The loader
    compares the name inside the file (its SONAME). So a temporary copy with the plain name is
    loaded first.
    """
    bundled = site_packages / "mlx_cpu.libs"
    fortran = next(bundled.glob("libgfortran-*"), None)
    if fortran is None:
        return False
    hashed = fortran.name.encode()
    data = fortran.read_bytes().replace(hashed, _GFORTRAN.encode().ljust(len(hashed), b"\0"))
    with tempfile.TemporaryDirectory(prefix="phi3-lora-") as folder:
        renamed = Path(folder) / _GFORTRAN
        renamed.write_bytes(data)
        return _load([*bundled.glob("libquadmath-*"), renamed, openblas])
