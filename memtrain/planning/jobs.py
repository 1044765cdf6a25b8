"""From a request to the planner's ``Job``: configuration, estimate on fake tensors, machine, degrees.

The one module of ``memtrain plan`` that loads torch and transformers, and it does so when it is called.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from memtrain.planner.actions import MicroBatchOrder, UpdateSchedule
from memtrain.planner.codecs import QUANTISERS, codecs
from memtrain.planner.compose import Setup, machine_for
from memtrain.planner.flags import parse_rate
from memtrain.planner.gpus import accelerator
from memtrain.planner.hardware import GIVEN, Interconnect
from memtrain.planner.links import INTERCONNECTS, interconnect
from memtrain.planner.machine import Machine
from memtrain.planner.model_presets import PRESETS
from memtrain.planner.parallel import Group, group_span
from memtrain.planner.ranges.model import Codec
from memtrain.planner.units import parse_size
from memtrain.planning.parsing import DEGREE_OPTIONS
from memtrain.planning.request import ELEMENT_BYTES, Hardware, OwnOptimizer, PlanError, PlanRequest

if TYPE_CHECKING:
    from memtrain.planner.grid_rule import GridRule
    from memtrain.planner.job import Job
    from memtrain.planner.optimizer_bytes import OptimizerRule
    from memtrain.planner.parallel import ModelShape


_Choice = TypeVar("_Choice", UpdateSchedule, MicroBatchOrder)


def setup_of(hardware: Hardware) -> Setup:
    """One GPU of the machine that was described. Raises PlanError naming what cannot be."""
    measured = None if hardware.machine is None else _measured(Path(hardware.machine))
    try:
        setup = machine_for(
            accelerator(hardware.gpu).given(dict(hardware.overrides)),
            gpus=hardware.gpus,
            dram=hardware.dram,
            cxl=hardware.cxl,
            nvme=hardware.nvme,
            host_link=hardware.host_link,
            interconnect=hardware.interconnect,
            budget=dict(hardware.budget),
            measured=measured,
        )
    except ValueError as error:
        raise PlanError(str(error)) from error
    own = hardware.interconnect is not None or setup.accelerator.interconnect is not None
    if hardware.host_link is not None and not setup.tiers and (hardware.gpus == 1 or own):
        raise PlanError(
            f"--host-link {hardware.host_link} leads to memory beside the GPU, and there is none: give "
            "--dram, or drop it"
        )
    return setup


def network_of(hardware: Hardware) -> Interconnect | None:
    """Between hosts. Raises PlanError: it is missing where it is needed, or unknown."""
    if hardware.nodes == 1:
        if hardware.network is not None:
            raise PlanError(
                f"--network {hardware.network} ties hosts together, and there is one: give --nodes"
            )
        return None
    if hardware.network is None:
        known = ", ".join(item.name for item in INTERCONNECTS if item.name.startswith("infiniband"))
        raise PlanError(
            f"--nodes {hardware.nodes} need --network: one of {known}, or a rate a GPU such as 20GB/s"
        )
    try:
        if "/" not in hardware.network:
            return interconnect(hardware.network)
        rate = parse_rate("--network", hardware.network)
    except ValueError as error:
        raise PlanError(f"{error} (--network)" if "/" not in hardware.network else str(error)) from error
    return Interconnect(name=GIVEN, peer_bytes_per_second=rate, collective_bytes_per_second=rate)


def _write_limit(hardware: Hardware) -> int | None:
    """One GPU's share of what a step may write to the host's disks."""
    if hardware.nvme_writes is None:
        return None
    try:
        return parse_size(hardware.nvme_writes) // hardware.gpus
    except ValueError as error:
        raise PlanError(f"--nvme-writes: {error}") from error


def _check_interconnect(request: PlanRequest) -> None:
    """Raises PlanError where no message would go over the interconnect that was given."""
    hardware, degrees = request.hardware, request.degrees
    ranks = {
        Group.TENSOR: degrees.tensor,
        Group.CONTEXT: degrees.context,
        Group.EXPERT: degrees.expert,
        Group.DATA: degrees.replicas,
        Group.PIPELINE: degrees.pipeline,
    }
    talking = [group for group, count in ranks.items() if count > 1]
    if hardware.interconnect is not None and all(
        group_span(degrees, group) > hardware.gpus for group in talking
    ):
        raise PlanError(
            f"--interconnect {hardware.interconnect} ties the {hardware.gpus} GPUs of a host together, and "
            "with these degrees all ranks that talk to each other reach over several hosts: give --tp or "
            "--cp inside a host, or drop it"
        )


def _measured(path: Path) -> Machine:
    try:
        return Machine.from_json(path.read_text())
    except OSError as error:
        raise PlanError(
            f"--machine {path}: {error.strerror}; `memtrain profile -o {path}` makes it"
        ) from error
    except ValueError as error:
        raise PlanError(f"--machine {path}: {error}; `memtrain profile -o {path}` makes a new one") from error


def configuration(model: str) -> str | Path:
    """What ``estimate_config`` can read of ``model``: a preset, a path, or a hub model that was downloaded.

    Raises:
        PlanError: it is none of these.
    """
    if model in PRESETS or Path(model).exists():
        return model
    if model.count("/") == 1 and not model.startswith(("/", ".")):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
        if isinstance(found, str):
            return Path(found)
        raise PlanError(
            f"{model} is no path, and the hub's local cache has no configuration of that name (nothing is "
            f"downloaded here): run `hf download {model} config.json`, or name a folder, a config.json or "
            f"one of {_presets()}"
        )
    raise PlanError(f"{model} is neither a preset ({_presets()}) nor a config.json or a folder with one")


def _presets() -> str:
    return ", ".join(PRESETS)


def fields_of(model: str) -> dict[str, Any]:
    """The configuration's own fields, as written. Raises PlanError: they cannot be read."""
    source = configuration(model)
    if str(source) in PRESETS:
        return dict(PRESETS[str(source)])
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; name a folder with a config.json") from error
    except ValueError as error:
        raise PlanError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise PlanError(f"{path} names no model_type: it is no model's config.json")
    return fields


class Jobs:
    """Jobs of one request at any sequence and micro-batch; what does not depend on them is made once.

    Attributes:
        fields: the model's configuration.
        setup: the machine.
        network: between hosts, where there are several.
    """

    def __init__(self, request: PlanRequest) -> None:
        """Raises PlanError: model, machine or degrees cannot be what they were said to be."""
        self.request = request
        self.fields = fields_of(request.work.model)
        self.setup = setup_of(request.hardware)
        self.network = network_of(request.hardware)
        self._write_limit_bytes = _write_limit(request.hardware)
        _check_interconnect(request)
        self._shape: ModelShape | None = None
        self._rule: OptimizerRule | GridRule | None = None

    @property
    def shape(self) -> ModelShape:
        """Sizes that degrees have to divide. Raises PlanError: not a decoder that can be planned."""
        if self._shape is None:
            from memtrain.planner.tracing.model_shape import model_shape

            try:
                self._shape = model_shape(self.fields)
            except ValueError as error:
                raise PlanError(f"{self.request.work.model}: {error}") from error
        return self._shape

    def at(self, sequence: int, micro_batch: int) -> PlanRequest:
        """The request at another size."""
        work = dataclasses.replace(self.request.work, sequence=sequence, micro_batch=micro_batch)
        return dataclasses.replace(self.request, work=work)

    def check(self, sequence: int) -> None:
        """Raises PlanError where the degrees divide neither model nor ``sequence``."""
        try:
            self.request.degrees.check(
                self.shape, gpus=self.request.gpus, sequence=sequence, names=DEGREE_OPTIONS
            )
        except ValueError as error:
            raise PlanError(str(error)) from error

    def offered(self) -> tuple[Codec, ...]:
        """Codecs that were not allowed: remedies, where nothing fits."""
        allowed = self.request.search.allow_lossy
        return self._codecs(q.name for q in QUANTISERS if q.name not in allowed)

    def _codecs(self, names: Iterable[str]) -> tuple[Codec, ...]:
        return codecs(
            names,
            self.setup.accelerator,
            element_bytes=ELEMENT_BYTES[self.request.work.dtype],
            places=tuple(tier.value for tier in self.setup.tiers),
        )

    def _optimizer(self) -> OptimizerRule | GridRule:
        """With the parameters that are projected, by their roles. Raises ValueError as the classifier."""
        if self._rule is None:
            chosen = self.request.work.optimizer
            self._rule = self._own(chosen) if isinstance(chosen, OwnOptimizer) else chosen
        return self._rule

    def _own(self, chosen: OwnOptimizer) -> GridRule:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        from memtrain.optimizers import grid_rule, roles_of
        from memtrain.planner.tracing import fake_model

        section = chosen.section(lr=1.0)
        dtype = getattr(torch, self.request.work.dtype)
        with FakeTensorMode():
            model = fake_model.build(fake_model.read_config(self.fields), dtype, "default")
            roles = roles_of(chosen.name, model, rank=section.grid_settings().rank)
        return grid_rule(section, roles, chosen.value)

    def _chunks(self, sequence: int) -> int:
        """Of the tokens that one GPU has of ``sequence``. Raises PlanError: fewer than were asked for."""
        from memtrain.planner.job import CHUNKS

        asked, tokens = self.request.search.chunks, sequence // self.request.degrees.context
        if asked is not None and asked > tokens:
            raise PlanError(
                f"--chunks {asked} are more than the {tokens} tokens that a GPU has of each sequence: lower "
                f"it to {tokens}, or leave it out"
            )
        return min(CHUNKS, tokens) if asked is None else asked

    def job(self, sequence: int, micro_batch: int) -> Job:
        """One rank of the job. Raises PlanError: the model cannot be estimated at this size."""
        from memtrain.optim.autograd.chunked_loss import DEFAULT_CHUNK_TOKENS
        from memtrain.planner.job import Job
        from memtrain.planner.tracing.chunked_loss import chunked
        from memtrain.planner.tracing.estimator import estimate_config

        self.check(sequence)
        chunks = self._chunks(sequence)
        work, search = self.request.work, self.request.search
        # Every context rank has a chunk of its own, and all bytes of a part are divided by their number.
        chunk_tokens = DEFAULT_CHUNK_TOKENS * self.request.degrees.context
        import torch

        try:
            estimate = estimate_config(
                self.fields,
                sequence=sequence,
                batch=micro_batch,
                dtype=getattr(torch, work.dtype),
                attention=work.attention,
                forward=chunked(chunk_tokens) if work.chunked_loss else None,
            )
            return Job(
                estimate=estimate,
                shape=self.shape,
                setup=self.setup,
                degrees=self.request.degrees,
                optimizer=self._optimizer(),
                master_weights=work.master_weights,
                micro_batches=work.accumulate,
                clipping=work.clipping,
                nvme_write_limit_bytes=self._write_limit_bytes,
                codecs=self._codecs(search.allow_lossy),
                error_budget=search.error_budget,
                chunks=chunks,
                network=self.network,
                update_schedule=_chosen(UpdateSchedule, work.update_schedule),
                micro_batch_order=_chosen(MicroBatchOrder, work.micro_batch_order),
            )
        except ValueError as error:
            raise PlanError(f"{work.model}: {error}") from error


def _chosen(kind: type[_Choice], name: str) -> _Choice | None:
    """None for ``auto``."""
    return None if name == "auto" else kind(name)
