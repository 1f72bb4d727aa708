"""How weights lie in memory for products on CPU, and the integers that describe them to kernels.

Output channels stand in panels of 64 (weights of 16 and 32 bits end in panels of 16 where 64 do not fit), so that a
product reads a panel from its first byte to its last. Inside, step after step along the input channels, a step of

- F32: one input channel, 64 numbers;
- BF16: two input channels, 64 pairs;
- INT8, FP8: two input channels, 64 bytes for each two blocks of 16 outputs, in the order in which `unpacklo` and
  `unpackhi` of bytes give the pairs of one block and of the other; int8 as sign and magnitude, -0 standing for -128;
- INT4: two input channels, for each of 16 lanes two 16-bit words, one per channel, with a nibble of each block.

Channels that are missing at the end are zeros. Scales are float32 [panel, group, 64]."""

from __future__ import annotations

F32, BF16, INT8, FP8, INT4 = range(5)
BLOCK_BYTES = (64, 64, 32, 32, 16)
"""Of one step of 16 output channels."""
PANEL = 64
"""Output channels of a wide panel; also the distance between rows of totals."""

PANEL_OF_BF16, PANEL_OF_F32, WEIGHTS, SCALES, OUT, X_STRIDE, STEPS, GROUP_STEPS, PANELS, WIDE_PANELS = range(10)
"""Fields of a descriptor: addresses of the panel functions for bfloat16 and float32 rows, of the weights and of the
scales (0 for none); output channels; numbers from one row of x to the next; steps along the input channels; steps of
a group of them, 0 where a scale belongs to a whole output channel; panels, and how many of them have 64 channels."""
FIELDS = 10
