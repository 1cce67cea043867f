"""Array types that the whole project uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]
Tensors = dict[str, Float32]
"""Tensors by name."""
