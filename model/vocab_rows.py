"""Row-wise searches over the vocabulary: largest logit, leading logits in order, and inverse-CDF draws by whole-number
weights. Knows nothing of sampling settings.

Ties always go by ascending id, which no single library call promises for all of these.

Shapes: R rows, V vocabulary (a multiple of BLOCK), B = V / BLOCK blocks, P leading tokens, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
_LANES = 32


def first_argmax(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest value [R, 1] and the lowest id that has it [R]. NaN counts as largest."""
    x_RBK = x_RV.reshape(len(x_RV), -1, BLOCK)
    peak_RB = x_RBK.amax(-1)
    block_R = peak_RB.argmax(-1)
    inner_RK = x_RBK[torch.arange(len(x_RV), device=x_RV.device), block_R]
    return peak_RB.gather(1, block_R[:, None]), block_R * BLOCK + inner_RK.argmax(-1)


def leading(x_RV: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` largest values of each row [R, P], largest first, their ids [R, P], and how many of these are sure
    [R]: ties go by ascending id up to there, while at the end an equal value may have been left out.

    With width = V everything is sure.
    """
    if width >= x_RV.shape[1]:
        x_RP, ids_RP = x_RV.sort(stable=True, dim=-1, descending=True)
        return x_RP, ids_RP, torch.full((len(x_RV),), width, device=x_RV.device)
    num_columns = x_RV.shape[1] // _LANES
    if num_columns > 2 * width:
        # The `width` largest values lie in the `width` columns with the largest maxima.
        maxima_RC = x_RV.reshape(len(x_RV), _LANES, num_columns).amax(1)
        column_R1P = maxima_RC.topk(width, sorted=False).indices[:, None]
        start_1L1 = torch.arange(_LANES, device=x_RV.device)[None, :, None] * num_columns
        candidate_RC = (column_R1P + start_1L1).flatten(1)
        x_RP, at_RP = x_RV.gather(1, candidate_RC).topk(width, sorted=False)
        ids_RP = candidate_RC.gather(1, at_RP)
    else:
        x_RP, ids_RP = x_RV.topk(width, sorted=False)
    ids_RP, order_RP = ids_RP.sort(-1)
    x_RP, order_RP = x_RP.gather(1, order_RP).sort(stable=True, dim=-1, descending=True)
    return x_RP, ids_RP.gather(1, order_RP), (x_RP > x_RP[:, -1:]).sum(-1)


def keep_leading(x_RV: Tensor, amounts_RV: Tensor, enough_R1: Tensor) -> Tensor:
    """Mask [R, V] of the fewest tokens, largest float32 value first and ties by ascending id, whose amounts reach
    `enough_R1`.

    Amounts are whole numbers in float32 that depend on the value alone and do not rise as it falls; `enough_R1` is
    float64 and at most their sum. Bisects the last kept value by its bits: no sort, and a fixed cost.
    """
    amounts_RV, exact_RV = amounts_RV.double(), x_RV.double()
    above_RV = torch.empty_like(amounts_RV)
    least_R1 = torch.full_like(enough_R1, _key(torch.tensor(float("-inf"))).item(), dtype=torch.long)
    beyond_R1 = _key(x_RV.amax(-1, keepdim=True)) + 1
    while bool((beyond_R1 - least_R1 > 1).any()):
        middle_R1 = (least_R1 + beyond_R1) >> 1
        torch.ge(exact_RV, _value(middle_R1), out=above_RV)
        reaches_R1 = above_RV.mul_(amounts_RV).sum(-1, keepdim=True) >= enough_R1
        least_R1 = torch.where(reaches_R1, middle_R1, least_R1)
        beyond_R1 = torch.where(reaches_R1, beyond_R1, middle_R1)
    last_R1 = _value(least_R1)
    torch.gt(exact_RV, last_R1, out=above_RV)
    last_RV = exact_RV == last_R1
    amount_R1 = (amounts_RV * last_RV).amax(-1, keepdim=True)
    before_RV = (amounts_RV * above_RV).sum(-1, keepdim=True) + (last_RV.cumsum(-1) - 1) * amount_R1
    return above_RV.bool() | (last_RV & (before_RV < enough_R1))


def _key(x_R1: Tensor) -> Tensor:
    """The float32 as an integer that sorts as it does."""
    bits_R1 = x_R1.contiguous().view(torch.int32)
    return (bits_R1 ^ ((bits_R1 >> 31) & 0x7FFFFFFF)).long()


def _value(key_R1: Tensor) -> Tensor:
    bits_R1 = key_R1.int()
    return (bits_R1 ^ ((bits_R1 >> 31) & 0x7FFFFFFF)).view(torch.float32).double()


def block_draw(weights_RV: Tensor, u_R1: Tensor) -> Tensor:
    """Inverse CDF in id order: ids [R] for float32 weights that are whole numbers and float64 u in [0, 1)."""
    weights_RBK = weights_RV.view(len(weights_RV), -1, BLOCK)
    sums_RB = weights_RBK.sum(-1, dtype=torch.float64)
    until_RB = sums_RB.cumsum(-1)
    target_R1 = _target(u_R1, until_RB[:, -1:])
    block_R1 = torch.searchsorted(until_RB, target_R1, right=True).clamp_(max=until_RB.shape[1] - 1)
    before_R1 = (until_RB - sums_RB).gather(1, block_R1)
    inner_RK = weights_RBK[torch.arange(len(weights_RV), device=weights_RV.device), block_R1[:, 0]].double()
    inner_R1 = torch.searchsorted(inner_RK.cumsum(-1), target_R1 - before_R1, right=True).clamp_(max=BLOCK - 1)
    return (block_R1 * BLOCK + inner_R1)[:, 0]


def id_order_draw(weights_RP: Tensor, ids_RP: Tensor, u_R1: Tensor) -> Tensor:
    """As `block_draw`, for float64 weights of a few tokens named by `ids_RP`, in any order."""
    ids_RP, order_RP = ids_RP.sort(-1)
    until_RP = weights_RP.gather(1, order_RP).cumsum(-1)
    at_R1 = torch.searchsorted(until_RP, _target(u_R1, until_RP[:, -1:]), right=True)
    return ids_RP.gather(1, at_R1.clamp_(max=ids_RP.shape[1] - 1))[:, 0]


def _target(u_R1: Tensor, total_R1: Tensor) -> Tensor:
    """A whole number in [0, total): u * total could round up to total, which no token covers."""
    return torch.minimum((u_R1 * total_R1).floor_(), total_R1 - 1)
