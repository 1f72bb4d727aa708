"""Numba as the kernels use it, but without the disk cache: that would not notice a change in a function called."""

from __future__ import annotations

import numba

compiled = numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy", boundscheck=False)
