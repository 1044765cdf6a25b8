"""What the executor must know of a block before it can recompute parts of it.

A block is looked at in its first forward: which products' results are worth storing (``result_survey.py``),
and how its tokens lie (``token_probe.py``). The answers hold for batches of other sizes, whose shapes are
checked where they are used; longer rows, arguments of another kind, another precision or another mode are
looked at anew. Where a prefix must be bit-equal, because the plan promises it or the block chooses by value,
so is every new size: kernels round otherwise for another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from memtrain.offload.errors import TokenRangeError
from memtrain.offload.refusals import not_bit_equal
from memtrain.offload.result_survey import wanted_results
from memtrain.offload.results import ATTENTION, PRODUCTS_AND_ATTENTION, ResultRows, ResultTape
from memtrain.offload.saved_group import SavedGroup, pack_alone_into, pack_into, unpack
from memtrain.offload.token_cut import TokenCut
from memtrain.offload.token_kinds import TokenProbe
from memtrain.offload.token_probe import probe_tokens
from memtrain.offload.token_rows import token_count
from memtrain.offload.unmoved import Unmoved, unchanged
from memtrain.planner.actions import Action, BlockDecision

IsFixed = Callable[[torch.Tensor], bool]


class BlockSurvey:
    """One block, and what has been found out about it.

    Args:
        name: of the block, for errors.
        module: the block.
        decision: what is to be done with it.
        is_fixed: whether a tensor is a parameter or buffer.
        exact_only: of the plan: refuse a prefix that is not bit-equal, in whatever batch.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        decision: BlockDecision,
        is_fixed: IsFixed,
        *,
        exact_only: bool = False,
    ) -> None:
        self.name = name
        self.decision = decision
        self._module = module
        self._is_fixed = is_fixed
        self._exact_only = exact_only
        self._probes: dict[Any, TokenProbe] = {}
        """By kind and shapes of the arguments that were looked at."""
        self._newest: dict[Any, TokenProbe] = {}
        """By kind alone."""
        self._wanted: dict[Any, frozenset[int]] = {}

    @property
    def probe(self) -> TokenProbe | None:
        """The least exact answer about tokens, of equals the last; None where none was needed so far."""
        return max(reversed(self._probes.values()), key=lambda probe: probe.difference, default=None)

    def buffers(self) -> list[torch.Tensor]:
        """Of the block."""
        return list(self._module.buffers())

    def parts(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
        """What one forward stores and what is computed again.

        Raises:
            TokenRangeError: the block's tokens cannot be treated apart as the decision asks for, or not as
                exactly as the plan promises.
        """
        tokens = token_count(args, kwargs)
        first = self.decision.recomputed_tokens
        first = tokens if first is None else min(first, tokens)
        attention = min(self.decision.attention_tokens, first)
        if not tokens and (self.decision.recomputed_tokens or self.decision.attention_tokens):
            raise TokenRangeError(
                f"{self.name}: its first tensor argument has no tokens (dimension -2); plan without "
                "recomputed_tokens and attention_tokens for it"
            )
        probe, wanted = None, None
        if first < tokens or 0 < attention < first:
            probe = self._probed(forward, args, kwargs, first, attention)
        elif self.decision.action is Action.RECOMPUTE_NEARLY_FREE:
            wanted = self._wanted_results(forward, args, kwargs)
        return Parts(self, tokens, first, attention, probe, wanted)

    def _probed(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        first: int,
        attention: int,
    ) -> TokenProbe:
        tokens = token_count(args, kwargs)
        shapes = tuple(tensor.shape for tensor in _tensors(args, kwargs))
        kind = (first < tokens, attention < first, self._kind(args, kwargs))
        probe = self._known(kind, shapes, tokens)
        if probe is None:
            probe = self._look(forward, args, kwargs, first, attention)
            self._probes[kind, shapes] = self._newest[kind] = probe
        return probe

    def _known(self, kind: Any, shapes: tuple[torch.Size, ...], tokens: int) -> TokenProbe | None:
        """An answer that may be used for arguments of these shapes.

        One about other shapes is not for longer rows, which a block may treat otherwise (positions that are
        scaled beyond some length). And where a prefix must be bit-equal, because the block chooses or the
        plan promises it, there is none: that depends on all sizes.
        """
        same = self._probes.get((kind, shapes))
        if same is not None or self._exact_only:
            return same
        newest = self._newest.get(kind)
        return None if newest is None or newest.chooses or tokens > newest.tokens else newest

    def _look(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        first: int,
        attention: int,
    ) -> TokenProbe:
        tokens = token_count(args, kwargs)
        with_attention = self.decision.action is Action.RECOMPUTE_EXCEPT_ATTENTION
        with unchanged(self.name, [*_tensors(args, kwargs), *self.buffers()]):
            probe = probe_tokens(
                self.name,
                forward,
                args,
                kwargs,
                is_fixed=self._is_fixed,
                prefix=first if first < tokens else None,
                attention_prefixes=[n for n in (attention, first) if with_attention and 0 < n < tokens],
            )
        if not self._exact_only:
            return probe
        if not probe.bit_equal:
            raise not_bit_equal(self.name, first if first < tokens else attention, tokens, probe.difference)
        return dataclasses.replace(probe, tolerance=0.0)

    def _wanted_results(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> frozenset[int]:
        kind = self._kind(args, kwargs)
        if kind not in self._wanted:
            with unchanged(self.name, [*_tensors(args, kwargs), *self.buffers()]):
                self._wanted[kind] = wanted_results(
                    PRODUCTS_AND_ATTENTION, forward, args, kwargs, is_fixed=self._is_fixed
                )
        return self._wanted[kind]

    def _kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the answers depend on: not on sizes, but with one row one cannot see how rows are folded."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        kinds: list[Any] = []
        device = "cpu"
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                device = leaf.device.type
                single = leaf.shape[:-2].numel() == 1
                kinds.append((leaf.dim(), leaf.dtype, leaf.requires_grad, leaf.is_contiguous(), single))
            else:
                kinds.append(leaf if isinstance(leaf, (bool, str)) else type(leaf))
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        modes = tuple(module.training for module in self._module.modules())
        frozen = tuple(parameter.requires_grad for parameter in self._module.parameters())
        return str(spec), tuple(kinds), autocast, modes, frozen


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


class Parts:
    """Of one forward: the tokens that are computed again, and what is stored of the others.

    Args:
        survey: of the block.
        tokens: of each row of the batch.
        first: how many of them are computed again.
        attention: for how many of these the attention kernels are, too.
        probe: how the tokens lie; None where they are not told apart.
        wanted: the results to store under nearly free recompute.
    """

    def __init__(
        self,
        survey: BlockSurvey,
        tokens: int,
        first: int,
        attention: int,
        probe: TokenProbe | None,
        wanted: frozenset[int] | None,
    ) -> None:
        self._name = survey.name
        self._action = survey.decision.action
        self._tokens = tokens
        self._first = first
        self._attention = attention
        self._probe = probe
        self._wanted = wanted

    @property
    def is_cut(self) -> bool:
        """Whether there are tokens that are not computed again."""
        return self._first < self._tokens

    def tape(self, group: SavedGroup | None) -> ResultTape | None:
        """What stores results of costly operators in ``group``; None where they are computed again."""
        whole = pack_into(group) or Unmoved.of
        if self._action is Action.RECOMPUTE_NEARLY_FREE:
            return ResultTape(self._name, PRODUCTS_AND_ATTENTION, whole, unpack, wanted=self._wanted)
        if self._action is not Action.RECOMPUTE_EXCEPT_ATTENTION or self._attention == self._first:
            return None
        if self._probe is None:
            return ResultTape(self._name, ATTENTION, whole, unpack)
        rows = ResultRows(
            tokens=self._tokens,
            first=self._attention,
            stop=self._first,
            tolerance=self._probe.tolerance,
            axes=self._probe.attention,
        )
        return ResultTape(self._name, ATTENTION, pack_alone_into(group), unpack, rows=rows)

    def cut(self, group: SavedGroup | None, shared: frozenset[int]) -> TokenCut | None:
        """What stores the rows that are not computed again in ``group``; None where there are none."""
        if self._probe is None or not self.is_cut:
            return None
        return TokenCut(
            self._name,
            self._probe,
            tokens=self._tokens,
            first=self._first,
            shared=shared,
            pack=pack_alone_into(group),
        )
