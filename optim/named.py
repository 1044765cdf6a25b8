"""The optimizers people know, as points of the grid and under the argument names of their authors.

    GaLore(params, lr=1e-2, rank=128, update_proj_gap=200, scale=0.25, proj_type="std")

Groups may carry the same names, and a group without ``rank`` (or ``density``) is not projected:

    GaLore([{"params": others}, {"params": matrices, "rank": 128}], lr=1e-2)

Every other setting of the grid may be given too (:class:`memtrain.optim.settings.Settings`). What differs
from the published code is what the grid does everywhere: weight decay before the update, eps on the corrected
root, moments rotated at a refresh, and for GaLore and its kin a power iteration in place of the SVD.
``GaLore(compat="galore-1.0")`` is the package galore-torch 1.0 step for step, for fp32 parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from memtrain.optim.grid import GridOptimizer, Plan

GALORE_1_0 = "galore-1.0"
_GALORE_1_0_SETTINGS = {
    "projection": "svd",
    "refresh": "keep",
    "eps_on": "uncorrected",
    "decay_order": "after",
}


class AdamW(GridOptimizer):
    """AdamW with a choice of ``state_dtype`` and ``master``; in fp32 the same as torch.optim.AdamW."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)


class AdamW8bit(AdamW):
    """AdamW with 8-bit block-wise states; those of fewer than 4,096 elements stay fp32."""

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"state_dtype": "int8", **settings})


class _Projected(GridOptimizer):
    """A named point with a projection: names translated, groups without a size not projected."""

    names: ClassVar[dict[str, str]] = {"update_proj_gap": "update_gap", "proj_type": "side"}
    """The authors' names of settings."""
    of_constructor: ClassVar[dict[str, str]] = {}
    """Arguments that stand for several settings, or none, and what to say instead in a group."""

    def __init__(self, params: Iterable[Any], lr: float | Tensor, **settings: Any) -> None:
        super().__init__(params, lr, **self._translated(settings))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See :class:`GridOptimizer`; also with the authors' names."""
        for name, instead in self.of_constructor.items():
            if name in param_group:
                raise TypeError(f"{name!r} is an argument of {type(self).__name__}: in a group {instead}")
        group = self._translated(param_group)
        sizes = [{**self.defaults, **group}.get(name) for name in ("rank", "density")]
        if sizes == [None, None]:
            group["projection"] = None
        super().add_param_group(group)

    def _translated(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError where a setting is given under both names."""
        for theirs, ours in self.names.items():
            if theirs in settings and ours in settings:
                raise ValueError(f"{theirs} and {ours} are two names of one setting: give one of them")
        return {self.names.get(name, name): value for name, value in settings.items()}


class GaLore(_Projected):
    """GaLore (arXiv 2403.03507): Adam in a low-dimensional subspace; what is outside of it is left out.

    Args:
        rank: of the projection, for groups that do not say otherwise; None: those are not projected.
        update_proj_gap: steps from one basis to the next.
        scale: of the projected update.
        proj_type: ``std`` shortens the shorter dimension, ``reverse_std`` the longer; ``left``, ``right``,
            ``full``.
        compat: ``"galore-1.0"`` for the order of operations of galore-torch 1.0: SVD by the same call of
            torch (so that signs of singular vectors agree), moments kept, eps added before the bias
            correction (and 1e-6), weight decay after the update. fp32 parameters only.
        settings: of the grid.

    Raises:
        ValueError: also a setting that compat contradicts.
    """

    of_constructor: ClassVar[dict[str, str]] = {"compat": "leave it out, it holds for all of them"}
    _fp32_only = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        compat: str | None = None,
        **settings: Any,
    ) -> None:
        if compat not in (None, GALORE_1_0):
            raise ValueError(f"compat must be {GALORE_1_0!r} or None, got {compat!r}")
        self._fp32_only = compat == GALORE_1_0
        if compat == GALORE_1_0:
            if fixed := _GALORE_1_0_SETTINGS.keys() & settings.keys():
                raise ValueError(f"compat={GALORE_1_0!r} fixes {sorted(fixed)}: leave them out")
            settings = {**settings, **_GALORE_1_0_SETTINGS}
        super().__init__(
            params,
            lr,
            betas=betas,
            eps=eps if eps is not None else (1e-6 if compat else 1e-8),
            weight_decay=weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            **{"projection": "power", **settings},
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fp32_only": self._fp32_only}

    def _plan(self, group: dict[str, Any]) -> Plan:
        others = {parameter.dtype for parameter in group["params"]} - {torch.float32}
        if self._fp32_only and others:
            raise ValueError(
                f"compat={GALORE_1_0!r} is for fp32 parameters, got {others.pop()}: galore-torch does its "
                "arithmetic in the parameter's dtype, which is not reproduced"
            )
        return super()._plan(group)


class NaturalGaLore(GaLore):
    """Natural GaLore (arXiv 2410.16029): GaLore on natural gradients (:mod:`memtrain.optim.rules.natural`).

    Args:
        history: low-dimensional gradients that make up the Fisher matrix.
        damping: of the Fisher matrix, relative to their mean squared norm.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        history: int = 20,
        damping: float = 1e-3,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, history=history, damping=damping, **settings)


class FRUGAL(_Projected):
    """FRUGAL (arXiv 2411.07837): Adam in a subspace, a rule without state outside of it.

    Args:
        density: of the subspace.
        update_gap: steps from one subspace to the next.
        inactive_update_rule: ``sign_sgd``, ``sgd`` or ``no``.
        proj_params_lr_scale: of the update inside the subspace.
        inactive_lr_scale: of the update outside.
        reset_statistics: True for the paper's reset of moments at a refresh, False to keep them; None for the
            grid's default (rotate where the subspace follows the gradient, else reset).
        settings: of the grid; ``projection`` chooses the subspace, and ``columns`` is the fastest.
    """

    names: ClassVar[dict[str, str]] = {
        "proj_params_lr_scale": "scale",
        "inactive_lr_scale": "residual_scale",
        "proj_side": "side",
    }
    of_constructor: ClassVar[dict[str, str]] = {
        "inactive_update_rule": "say residual='sign', 'sgd' or 'none'",
        "reset_statistics": "say refresh='reset', 'keep' or 'rotate'",
        "is_proj_params": "say density=None where nothing is to be projected",
    }
    _RULES: ClassVar[dict[str, str]] = {"sign_sgd": "sign", "sgd": "sgd", "no": "none"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        density: float | None = 0.25,
        update_gap: int = 200,
        inactive_update_rule: str = "sign_sgd",
        proj_params_lr_scale: float = 1.0,
        inactive_lr_scale: float = 1.0,
        reset_statistics: bool | None = None,
        **settings: Any,
    ) -> None:
        if inactive_update_rule not in self._RULES:
            raise ValueError(
                f"inactive_update_rule must be one of {', '.join(self._RULES)}, got {inactive_update_rule!r}"
            )
        if reset_statistics is not None:
            settings = {"refresh": "reset" if reset_statistics else "keep", **settings}
        if settings.get("rank") is not None:
            density = None
        if inactive_update_rule != "no":
            settings = {"inactive_lr_scale": inactive_lr_scale, **settings}
        elif inactive_lr_scale != 1:
            raise ValueError(
                f"inactive_lr_scale={inactive_lr_scale}: with inactive_update_rule='no' there is no update "
                "to scale"
            )
        super().__init__(
            params,
            lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            density=density,
            update_gap=update_gap,
            residual=self._RULES[inactive_update_rule],
            proj_params_lr_scale=proj_params_lr_scale,
            **{"projection": "power", **settings},
        )


class Fira(_Projected):
    """Fira (arXiv 2410.01623): GaLore, and outside of its subspace the gradient scaled as inside.

    Args:
        rank, update_proj_gap, scale, proj_type: as for :class:`GaLore`; the paper's alpha is ``scale``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        **settings: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            **{"projection": "power", "residual": "scaled", **settings},
        )


class Apollo(_Projected):
    """APOLLO (arXiv 2412.05270): the gradient, scaled by what Adam does to a random sketch of it.

    Written from the paper's mathematics. Moments are kept at a refresh: only their norms are used, and the
    norms of one random sketch are those of another.

    Args:
        rank: of the sketch.
        scale: the step is multiplied by its square root.
        scale_type: ``channel`` or ``tensor``; see :class:`ApolloMini`.
        proj: ``random`` (Gaussian) or ``svd``, or a projection of the grid.
        update_proj_gap, proj_type: as for :class:`GaLore`.
    """

    names: ClassVar[dict[str, str]] = {**_Projected.names, "scale_type": "granularity", "proj": "projection"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        proj: str = "random",
        proj_type: str = "std",
        **settings: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            scale_type=scale_type,
            proj=proj,
            proj_type=proj_type,
            **{"residual": "scale_only", "refresh": "keep", **settings},
        )

    def _translated(self, settings: dict[str, Any]) -> dict[str, Any]:
        translated = super()._translated(settings)
        if translated.get("projection") == "random":
            translated["projection"] = "gaussian"
        return translated


class ApolloMini(Apollo):
    """APOLLO-Mini: rank one and one scaling for the whole matrix."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        rank: int | None = 1,
        scale: float = 128.0,
        scale_type: str = "tensor",
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, rank=rank, scale=scale, scale_type=scale_type, **settings)
