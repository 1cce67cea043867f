"""A fast BLAS under MLX on Linux, whose wheel links the reference one (31 times slower)."""

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
"""Other releases hold AVX-512 code outside their dispatch."""
_GFORTRAN = "libgfortran.so.5"
_PROBE = Path(__file__).with_name("blas_probe.py")


def preload_blas() -> str | None:
    """Load OpenBLAS with global symbols, so that MLX's calls resolve to it.

    The wheel cmeel-openblas comes first, then the system's library; one that crashes on this
    machine is passed over. It must run before the first import of mlx.core.

    Returns:
        What was loaded, or None (always so on macOS, where MLX uses Accelerate).
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

    A fast library, preloaded by us or by the user, answers for the symbol in the process's global
    scope; the wheel's own is known to MLX alone. Told so and not by a timing, which a busy machine
    distorts.
    """
    bundled = any(
        next((Path(folder) / "mlx_cpu.libs").glob("libblas-*"), None)
        for folder in {sysconfig.get_path("platlib"), *sys.path}
    )
    return bundled and not hasattr(ctypes.CDLL(None), "cblas_sgemm")


def _load(libraries: Sequence[Path]) -> bool:
    """Load libraries in order, if a process of its own survives a product with the last one."""
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
    """Load OpenBLAS on a machine without libgfortran, with the copy that MLX's wheel brings.

    OpenBLAS asks for the name libgfortran.so.5, while wheels carry that library under a name with
    a hash. The loader matches by the name inside the file (its SONAME), so a temporary copy with
    the plain name, loaded first, is taken.
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
