"""Script that multiplies matrices with the given libraries, in a separate process.

Some builds of OpenBLAS use instructions that this machine lacks; then only this process crashes.
The arguments are the libraries' paths. Only the standard library is imported.
"""

import ctypes
import sys

_ROW_MAJOR, _PLAIN = 101, 111


def multiply(blas: ctypes.CDLL, size: int) -> float:
    """Return one element of the product of two matrices of ones."""
    matrix = ctypes.c_float * (size * size)
    a, b, c = matrix(*([1.0] * size * size)), matrix(*([1.0] * size * size)), matrix()
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    blas.cblas_sgemm(
        *(_ROW_MAJOR, _PLAIN, _PLAIN, size, size, size),
        *(one, a, size, b, size, zero, c, size),
    )
    return float(c[size])


if __name__ == "__main__":
    libraries = [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in sys.argv[1:]]
    # Small and large products use different kernels.
    sys.exit(0 if all(multiply(libraries[-1], n) == n for n in (8, 33, 200)) else 1)
