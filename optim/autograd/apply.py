"""Treat a model's activations as a policy says, print what was done, and undo it.

    applied = apply_to(model, EXACT)
    print(applied.table())
    ...
    revert(model)

Only ``forward`` of single modules is replaced, on the instance: modules, parameters, hooks and the keys of
``state_dict`` stay what they are, and the model can be copied and pickled. Which modules is found by
structure and measured in one small forward (``sites.py``), not by the model's name; a module whose result a
treatment would change is left alone, and the table says why.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from memtrain.optim.autograd.exact_treatments import register_exact
from memtrain.optim.autograd.sites import Site, find_sites, quietly
from memtrain.optim.autograd.treatments import (
    KEEP,
    KINDS,
    Forward,
    NotServedError,
    Offer,
    Treatment,
    find_treatment,
)

register_exact()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Sites of ``kind`` whose module's name fits ``modules`` get ``treatment``."""

    kind: str
    """norm, linear (one that reads a norm's output), gated_mlp, mlp or layer."""
    treatment: str
    """A registered name (``treatments.register_treatment``), or ``keep``."""
    modules: str = "*"
    """As in a shell: ``model.layers.[0-3].*``."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.treatment != KEEP:
            find_treatment(self.kind, self.treatment)

    def fits(self, site: Site) -> bool:
        """Whether the rule speaks of this site."""
        return site.kind == self.kind and fnmatch.fnmatchcase(site.name, self.modules)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What is done where; of the rules that fit a site the last counts, and without one it is kept."""

    rules: tuple[Rule, ...]

    def speaks_of(self, kind: str) -> bool:
        """Whether there is any rule for sites of ``kind``."""
        return any(rule.kind == kind for rule in self.rules)

    def treatment_of(self, site: Site) -> str:
        """``keep`` or a registered name."""
        fitting = [rule.treatment for rule in self.rules if rule.fits(site)]
        return fitting[-1] if fitting else KEEP

    def followed_by(self, *rules: Rule) -> Policy:
        """The same with exceptions: ``EXACT.followed_by(Rule(kind="gated_mlp", treatment="tiled"))``."""
        return Policy(rules=self.rules + rules)


EXACT = Policy(
    rules=tuple(Rule(kind=kind, treatment="recompute") for kind in ("norm", "linear", "gated_mlp", "mlp"))
)
"""Norms, their linear layers and MLPs: half of a Llama layer's bytes, results to the bit."""


@dataclass(frozen=True, slots=True)
class TreatedForward:
    """Stands as ``forward`` in a module's ``__dict__``, where ``revert`` finds it."""

    module: nn.Module
    forward: Forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(self.module, *args, **kwargs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What became of one site."""

    name: str
    kind: str
    module: str
    """Name of its class."""
    treatment: str
    exact: bool
    note: str
    """How its result compares with the plain one, or why the site was left alone."""
    plain_bytes: float | None = None
    """Saved per token by the plain module; None where nothing was measured."""
    saved_bytes: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """The answer of ``apply_to``."""

    model: nn.Module
    rows: tuple[Row, ...]

    @property
    def is_exact(self) -> bool:
        """Whether no lossy treatment is in place."""
        return all(row.exact for row in self.rows)

    @property
    def treated(self) -> tuple[Row, ...]:
        """The rows of sites that are not kept."""
        return tuple(row for row in self.rows if row.treatment != KEEP)

    @property
    def bytes_spared_per_token(self) -> float:
        """Of all treated sites together, for the length of the probe."""
        return sum((row.plain_bytes or 0.0) - (row.saved_bytes or 0.0) for row in self.treated)

    def revert(self) -> None:
        """As ``revert(model)``."""
        revert(self.model)

    def table(self) -> str:
        """Sites that were treated alike in one line, in plain text."""
        alike = Counter(
            (row.kind, row.module, row.treatment, _bytes(row.plain_bytes), _bytes(row.saved_bytes), row.note)
            for row in self.rows
        )
        header = ("sites", "kind", "module", "treatment", "B/token", "becomes", "")
        lines = [header, *((str(count), *cells) for cells, count in alike.items())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        text = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        return f"{text}\nspared: {self.bytes_spared_per_token:.0f} B/token"


def _bytes(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def apply_to(
    model: nn.Module,
    policy: Policy = EXACT,
    *,
    example: Callable[[], Any] | None = None,
    present: Callable[[nn.Module], AbstractContextManager[None]] | None = None,
) -> Applied:
    """Put the policy's treatments in place.

    Runs the model once on eight tokens, in eval mode and without gradients, and the treated modules a few
    times more; modes and random numbers are restored.

    Args:
        example: runs the model (or one layer) once; None: ``model(input_ids=...)`` of a Hugging Face model.
        present: has the weights of a module in memory that is tried alone, where they are not always there.

    Raises:
        ValueError: the model has been treated already (``revert`` first); nothing fits the policy;
            ``example`` is needed.
    """
    treated = [name for name, module in model.named_modules() if _is_treated(module)]
    if treated:
        raise ValueError(f"{treated[0]} and {len(treated) - 1} others are treated already; revert first")
    rows: list[Row] = []
    accepted: list[tuple[Site, Offer]] = []
    sites = find_sites(model, example)
    with quietly(model):
        for site in sites:
            if not policy.speaks_of(site.kind):
                continue
            name = policy.treatment_of(site)
            treatment = None if name == KEEP else find_treatment(site.kind, name)
            with nullcontext() if present is None else present(site.module):
                offer, note = _offer(site, treatment)
            if offer is not None:
                accepted.append((site, offer))
            rows.append(
                Row(
                    name=site.name,
                    kind=site.kind,
                    module=type(site.module).__name__,
                    treatment=KEEP if offer is None else name,
                    exact=offer is None or treatment is None or treatment.exact,
                    note=note,
                    plain_bytes=None if offer is None else offer.plain_bytes,
                    saved_bytes=None if offer is None else offer.saved_bytes,
                )
            )
    if not accepted:
        reasons = {row.note for row in rows if row.note} or {"no site was found"}
        raise ValueError(f"nothing of {type(model).__name__} could be treated: {'; '.join(sorted(reasons))}")
    for site, offer in accepted:
        site.module.forward = TreatedForward(site.module, offer.forward)
    return Applied(model=model, rows=tuple(rows))


def _offer(site: Site, treatment: Treatment | None) -> tuple[Offer | None, str]:
    if treatment is None:
        return None, ""
    if "forward" in site.module.__dict__:
        return None, "its forward has been replaced by something else"
    try:
        offer = treatment.offer(site)
    except NotServedError as error:
        return None, str(error)
    except Exception as error:  # whatever a module may raise that is run alone, on numbers not its own
        return None, f"it cannot be tried alone ({type(error).__name__}: {error})"
    return offer, offer.equal


def _is_treated(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), TreatedForward)


def revert(model: nn.Module) -> None:
    """Give every treated module its own forward back. Doing it twice is harmless."""
    for module in model.modules():
        if _is_treated(module):
            del module.forward
