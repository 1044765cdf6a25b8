"""torch's fused AdamW and what surrounds it on a CPU, bit for bit, in one pass over the memory.

    g = clip * float(gradient)
    m = m + (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps);  rounded = bf16(w)

With bf16 weights that have fp32 masters, ``torch.optim.AdamW(fused=True)`` takes three passes: the gradient
is widened into memory of its own, the master stepped, the weight rounded. Of a master no more than its lower
half need be there (``storage/lower_half.py``): the upper one is the weight's. The order of roundings is that
of torch's kernel (``FusedAdamKernel.cpp``), of which three products are not rounded, because torch's compiler
fused them into sums: that is no promise of torch's. ``agrees`` therefore tries this very build, once a
process; where a bit differs (and for every setting that ``refusal`` names) torch's own step is the one that
runs. NaN counts as equal to NaN, whatever its sign and payload: torch's own differ between vectors and tails.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.storage import lower_half

STATE = frozenset({"exp_avg", "exp_avg_sq"})
VECTOR = 16
"""Elements. What is left over of a tensor torch computes in double; so only whole vectors are taken."""
_TRIAL_ELEMENTS = 1 << 13
_TRIAL_RATES = (
    # lr, beta1, beta2, eps, weight_decay, step
    (1e-4, 0.9, 0.999, 1e-8, 0.01, 1.0),
    (1e-2, 0.9, 0.95, 1e-6, 0.0, 7.0),
    (3e-3, 0.75, 0.99, 0.0, 0.1, 20000.0),
    # 1 - lr weight_decay lies by a point where fp32 rounds the other way if the product is rounded first
    (3.342509683765003e-06, 0.9, 0.999, 1e-8, 0.08024536259312941, 5.0),
    (1.7322384705941915e-05, 0.9, 0.999, 1e-8, 0.03268857809839929, 5.0),
)
_EXTREMES = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1e-39, 3e38, -3e38, 2.0**-126, 1e20)


class _Rates(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in "lr beta1 beta2 eps weight_decay step".split())


class _Factors(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("count", ctypes.c_int32))


def refusal(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str | None:
    """Why parameters of this group take torch's own step; None where one pass gives the same bits."""
    if type(optimizer) is not torch.optim.AdamW:
        return f"{type(optimizer).__name__} is not torch.optim.AdamW"
    if not group.get("fused"):
        return "fused=True was not asked for"
    for name in ("amsgrad", "maximize", "capturable", "differentiable", "foreach"):
        if group.get(name):
            return f"{name}={group[name]}"
    if not group.get("decoupled_weight_decay", True):
        return "decoupled_weight_decay=False"  # a group may say so: the class then does Adam's
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    if not all(type(number) in (int, float) for number in numbers):
        return "lr, betas, eps and weight_decay are not all plain numbers"
    if not 0.5 < group["betas"][0] < 1.0:
        return f"beta1={group['betas'][0]} is not above 0.5"  # lerp then starts from the other end
    if not 0.0 <= group["betas"][1] <= 1.0:
        return f"beta2={group['betas'][1]} lets second moments fall below zero"
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return "a gradient scaler hands its scale to the step"
    return None if agrees() else "this build of torch rounds in another order, or there is no C++ compiler"


def serves(weight: Tensor, gradient: Tensor, master: Tensor | None, clips: Sequence[Tensor]) -> bool:
    """Whether these operands of one parameter (or a piece of it) can be taken in one pass; ``master`` may be
    what is stored of it."""
    operands = (weight, gradient) if master is None else (weight, gradient, master)
    return (
        native.is_plain(*operands, *clips)
        and all(operand.is_contiguous() for operand in operands)
        and weight.numel() % VECTOR == 0
        and gradient.dtype == weight.dtype == (torch.float32 if master is None else torch.bfloat16)
        and all(clip.dtype == torch.float32 and clip.dim() == 0 for clip in clips)
    )


def first_scalars() -> dict[str, Tensor]:
    """Beside moments of zeros what torch's step makes for a parameter that has no state, on a CPU."""
    return {"step": torch.zeros((), dtype=torch.float32, device="cpu")}


def step(
    weight: Tensor,
    gradient: Tensor,
    master: Tensor | None,
    first: Tensor,
    second: Tensor,
    *,
    group: dict[str, Any],
    number: float,
    clips: Sequence[Tensor] = (),
) -> None:
    """One step, in place.

    Args:
        weight: bf16 with a ``master``, which it is rounded from; or fp32 without. It need not hold the old
            weight where there is an fp32 master. Its version counter is the caller's affair.
        gradient: as the weight. It is only read.
        master: fp32; or the lower halves, ``lower_half.DTYPE``.
        first, second: moments, fp32. Beside lower halves the signs of ``second`` are ``lower_half``'s.
        group: what ``refusal`` has taken.
        number: of this step, from 1.
        clips: factors, 0-dim fp32, that the fp32 gradient is multiplied by in turn.
    """
    kernel = native.function("fused_adamw", "fused_adamw")
    assert kernel is not None  # refusal() says so
    factors = torch.stack(tuple(clips)) if clips else None
    beta1, beta2 = group["betas"]
    lower = master if master is not None and master.dtype == lower_half.DTYPE else None
    whole = weight if master is None else master
    kernel(
        native.gradient(gradient),
        None if lower is not None else native.pointer(whole),
        native.pointer(first),
        native.pointer(second),
        None if master is None else native.pointer(weight, torch.bfloat16),
        None if lower is None else native.pointer(lower, lower_half.DTYPE),
        native.count(weight),
        _Rates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], number),
        _Factors(None if factors is None else factors.data_ptr(), len(clips)),
    )


@functools.cache
def agrees() -> bool:
    """Whether this processor, compiler and build of torch give the same bits: tried on some numbers."""
    if not native.available("fused_adamw"):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    return all(_agree_at(rates, generator) for rates in _TRIAL_RATES)


def _agree_at(rates: tuple[float, ...], generator: torch.Generator) -> bool:
    here: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are

    def draw(spread: float, shift: int) -> Tensor:
        values = torch.randn(_TRIAL_ELEMENTS, generator=generator, **here)
        values *= torch.exp(spread * torch.randn(_TRIAL_ELEMENTS, generator=generator, **here))
        values[: len(_EXTREMES)] = torch.tensor(_EXTREMES, **here)
        return values.roll(shift)  # extremes of one operand meet ordinary values of the others

    lr, beta1, beta2, eps, weight_decay, number = rates
    group = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    master, first, second = draw(0.5, 0), draw(4.0, 3), draw(8.0, 40).abs()
    master[-64:], first[-64:] = 1.0, 0.0
    master_before = master.clone()
    gradient = draw(5.0, 80).bfloat16()
    gradient[-64:] = 0.0  # where only the decay shows
    expected = [master.clone(), first.clone(), second.clone()]
    torch._fused_adamw_(
        [expected[0]], [gradient.float()], [expected[1]], [expected[2]], [], [torch.tensor(number, **here)],
        amsgrad=False, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, maximize=False,
        grad_scale=None, found_inf=None,
    )  # fmt: skip
    weight, halves = torch.empty_like(gradient), [master.bfloat16(), first.clone(), second.clone()]
    step(weight, gradient, master, first, second, group=group, number=number)
    found = [master, first, second, weight]
    lower = torch.empty(_TRIAL_ELEMENTS, dtype=lower_half.DTYPE, device="cpu")
    lower_half.pack(master_before, lower, halves[2])
    step(halves[0], gradient, lower, *halves[1:], group=group, number=number)
    found += [lower_half.unpack(halves[0], lower, halves[2]), halves[1], halves[2].abs(), halves[0]]
    return all(same_bits(*pair) for pair in zip(found, 2 * [*expected, expected[0].bfloat16()], strict=True))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality to the bit, signs of zero too; NaN equals NaN."""
    as_integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    differ = one.view(as_integers) != other.view(as_integers)
    return not bool((differ & ~(one.isnan() & other.isnan())).any())
