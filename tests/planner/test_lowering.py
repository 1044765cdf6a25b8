"""From a job to a problem: bytes and seconds worked out by hand from a part of three operations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from memtrain.planner.compose import machine_for
from memtrain.planner.estimate import (
    Lifetime,
    LifetimeKind,
    ModelEstimate,
    Operation,
    TensorClass,
)
from memtrain.planner.forecast import make_forecast
from memtrain.planner.lowering import problem_of
from memtrain.planner.lowering.seconds import Clock
from memtrain.planner.lowering.states import PIECES
from memtrain.planner.lowering.tensors import Division, Fate, class_bytes, shared_bytes, transient_bytes
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.parallel import Degrees
from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.model import Codec, Role
from memtrain.planner.ranges.solve import SolveOptions
from tests.planner.toy_job import (
    ALONE,
    EDGE,
    ESTIMATE,
    HIDDEN,
    INSIDE,
    PART,
    RESIDUAL,
    SHAPE,
    TOKENS,
    division,
    job,
    life,
    parameter,
    saved,
    setup,
)


def test_classes_take_every_saved_byte_and_the_input() -> None:
    assert class_bytes(PART, division()) == {
        Fate.INPUT: RESIDUAL,
        Fate.QKV: 3 * RESIDUAL,
        Fate.ATTENTION: RESIDUAL,
        Fate.PRODUCTS: INSIDE,
        Fate.NEARLY_FREE: RESIDUAL,
    }


def test_tensor_ranks_divide_what_lies_inside_layers_and_with_sequence_parallelism_all() -> None:
    whole = class_bytes(PART, division(Degrees(tensor=2, sequence_parallel=False)))
    assert whole[Fate.INPUT] == RESIDUAL
    assert whole[Fate.NEARLY_FREE] == RESIDUAL
    assert whole[Fate.QKV] == 3 * RESIDUAL // 2
    assert whole[Fate.PRODUCTS] == INSIDE // 2
    cut = class_bytes(PART, division(Degrees(tensor=2, context=2)))
    assert cut == {name: size // 4 for name, size in class_bytes(PART, division()).items()}


def test_tables_that_blocks_share_are_cut_by_tokens_alone() -> None:
    tables = (saved(TensorClass.OTHER, 4), saved(TensorClass.MASK, TOKENS))
    whole = TOKENS * 4 * 2 + TOKENS * TOKENS * 2
    assert shared_bytes(tables, division(Degrees(tensor=2, context=2))) == whole / 2


def test_transients_leave_out_saved_tensors_input_and_parameters_gradients() -> None:
    # Forward: 4 until op 3, then the output; backward: output gradient and 5.
    assert transient_bytes(PART, division()) == (4 * RESIDUAL, 6 * RESIDUAL)
    # With all of it: input, the four saved ones, the output.
    saved_bytes = 5 * RESIDUAL + INSIDE
    forward, backward = transient_bytes(PART, division(), saved_too=True, input_too=True)
    assert (forward, backward) == (
        max(RESIDUAL + 5 * RESIDUAL + 4 * RESIDUAL, RESIDUAL + saved_bytes + RESIDUAL),
        RESIDUAL + saved_bytes + 6 * RESIDUAL,
    )


def test_backward_is_charged_at_least_what_forward_needs() -> None:
    # Tensors that are recomputed die in forward and are counted in backward only.
    heavy = dataclasses.replace(PART, lifetimes=(life(1, 3, 9 * RESIDUAL, LifetimeKind.TRANSIENT),))
    assert transient_bytes(heavy, division()) == (9 * RESIDUAL, 9 * RESIDUAL)


def test_seconds_are_the_roofline_of_every_operation() -> None:
    one = problem_of(job()).blocks[1]
    device = setup().accelerator
    memory = device.memory_bytes_per_second.value * device.memory_efficiency.value
    products = device.half_flops_per_second.value * device.matmul_efficiency.value
    kernel = device.half_flops_per_second.value * device.attention_forward_efficiency.value
    forward = 3000 / memory + max(30_000 / products, 5000 / memory) + 0.5 * 80_000 / kernel
    forward += max(60_000 / products, 7000 / memory)
    assert one.forward_seconds == pytest.approx(forward)
    back = device.half_flops_per_second.value * device.attention_backward_efficiency.value
    backward = 1000 / memory + 2.5 * 0.5 * 80_000 / back + max(150_000 / products, 9000 / memory)
    assert one.backward_seconds == pytest.approx(backward)


def test_attention_without_a_kernel_is_products_of_all_pairs() -> None:
    plain = dataclasses.replace(PART.operations[2], name="aten::bmm")
    eager = dataclasses.replace(PART, operations=(*PART.operations[:2], plain, *PART.operations[3:]))
    device = setup().accelerator
    half = device.half_flops_per_second.value
    kernel = 0.5 * 80_000 / (half * device.attention_forward_efficiency.value)
    products = 80_000 / (half * device.matmul_efficiency.value)
    fused, unfused = (
        problem_of(job(estimate=dataclasses.replace(ESTIMATE, classes=(part,)))).blocks[1].forward_seconds
        for part in (PART, eager)
    )
    assert unfused - fused == pytest.approx(products - kernel)


def test_without_sequence_parallelism_norms_are_done_on_every_tensor_rank() -> None:
    def norm(degrees: Degrees) -> float:
        one = job(degrees)
        division = Division(estimate=ESTIMATE, shape=SHAPE, degrees=degrees)
        return Clock(one, division).operation(
            Operation(name="norm", module="", flops=0, read_bytes=0, written_bytes=RESIDUAL),
            PART,
            backward=False,
        )

    assert norm(Degrees(tensor=2, sequence_parallel=False)) == norm(ALONE)
    assert norm(Degrees(tensor=2)) == norm(ALONE) / 2


def test_recompute_costs_what_leads_to_a_class_and_no_more() -> None:
    one = problem_of(job(chunks=4)).blocks[1]
    device = setup().accelerator
    memory = device.memory_bytes_per_second.value * device.memory_efficiency.value
    products = device.half_flops_per_second.value * device.matmul_efficiency.value
    kernel = device.half_flops_per_second.value * device.attention_forward_efficiency.value
    seconds = {tensor.name: tensor.recompute_seconds for tensor in one.classes}
    assert seconds["input"] == ()
    assert math.fsum(seconds["qkv"]) == pytest.approx(3000 / memory + max(30_000 / products, 5000 / memory))
    # Of causal attention chunk c does 2c - 1 of 16 parts.
    whole = 0.5 * 80_000 / kernel
    assert seconds["attention"] == pytest.approx([whole * part / 16 for part in (1, 3, 5, 7)])
    assert math.fsum(seconds["products"]) == pytest.approx(max(60_000 / products, 7000 / memory))
    assert math.fsum(seconds["nearly_free"]) == pytest.approx(3000 / memory)
    assert [t.name for t in one.classes if t.attention] == ["attention"]


def test_a_window_computes_fewer_pairs_and_costs_the_same_for_every_chunk() -> None:
    windowed = dataclasses.replace(PART, attention_window=16)
    one = job(estimate=dataclasses.replace(ESTIMATE, classes=(windowed,)), chunks=4)
    # 64 x 16 pairs, less the triangle of the first 16 queries.
    assert one.attention_share(windowed) == (64 * 16 - 128) / 64**2
    costs = next(t for t in problem_of(one).blocks[1].classes if t.attention).recompute_seconds
    assert len(set(costs)) == 1


def test_context_ranks_pay_evenly_for_attention_because_their_tokens_are_no_prefix() -> None:
    cut = job(Degrees(context=2), chunks=4)
    costs = next(t for t in problem_of(cut).blocks[1].classes if t.attention).recompute_seconds
    kernel = setup(2).accelerator
    rate = kernel.half_flops_per_second.value * kernel.attention_forward_efficiency.value
    assert costs == pytest.approx([0.5 * 80_000 / 2 / rate / 4] * 4)


def test_any_allowed_codec_bounds_the_error_unless_a_budget_does() -> None:
    coarse = Codec(
        name="c", ratio=0.5, compress_bytes_per_second=1e9, decompress_bytes_per_second=1e9, error=0.02
    )
    assert problem_of(job(codecs=(coarse,))).error_budget == 0.02
    assert problem_of(job(codecs=(coarse,), error_budget=0.001)).error_budget == 0.001
    assert problem_of(job()).error_budget == 0.0


def test_state_is_divided_as_zero_says() -> None:
    def held(stage: Any) -> dict[Role, int]:
        degrees = Degrees(data=4, zero_stage=stage)
        states = problem_of(job(degrees)).blocks[1].states
        return {state.role: state.piece_bytes for state in states}

    def piece(size: int) -> int:
        return math.ceil(size / PIECES)

    # 1600 parameters: 3200 bytes of weights and of gradients, 6400 of masters, 12804 of moments.
    whole, quarter = piece(3200), piece(800)
    assert held(0) == {
        Role.PARAMETER: whole,
        Role.GRADIENT: whole,
        Role.OPTIMIZER: piece(6400 + 12804),
    }
    assert held(1) == {Role.PARAMETER: whole, Role.GRADIENT: whole, Role.OPTIMIZER: piece(1600 + 3201)}
    assert held(2)[Role.GRADIENT] == quarter
    assert held(3) == {Role.PARAMETER: quarter, Role.GRADIENT: quarter, Role.OPTIMIZER: piece(4801)}


def test_clipping_and_accumulation_exclude_updates_in_backward() -> None:
    assert all(update.ahead for update in problem_of(job()).updates)
    assert any(not update.ahead for update in problem_of(job(clipping=False)).updates)
    accumulated = job(clipping=False, micro_batches=2)
    assert all(update.ahead for update in problem_of(accumulated).updates)


def test_a_disk_is_reached_through_dram() -> None:
    machine = problem_of(job()).machine
    assert machine.staging == "host"
    assert [hop.link for hop in machine.place("nvme").hops] == ["host", "nvme"]
    with pytest.raises(ValueError, match=r"passes through slots in DRAM.*give --dram"):
        problem_of(job(setup=machine_for("a800-80g", nvme="1TB@6GB/s")))


def test_only_copies_of_the_gpu_are_limited_by_its_bus() -> None:
    many = machine_for("rtx-4090", dram="64GiB", cxl="4x256GiB@20GB/s", nvme="8x4TB@7GB/s,1GB/s")
    machine = problem_of(job(setup=many)).machine
    assert machine.place("cxl").hops[0].read_bytes_per_second == pytest.approx(26e9)
    assert machine.place("cxl").cpu_bytes_per_second == pytest.approx(80e9)
    near, far = machine.place("nvme").hops
    assert near.read_bytes_per_second == pytest.approx(26e9)
    assert far.read_bytes_per_second == pytest.approx(56e9)


def test_what_the_prologue_saves_is_held_all_step_long_by_the_stage_that_has_it() -> None:
    bare = dataclasses.replace(EDGE, saved=(), lifetimes=EDGE.lifetimes[1:])
    without = dataclasses.replace(ESTIMATE, prologue=bare)
    for degrees, stage, micro_batches, held in (
        (ALONE, 0, 1, 1),
        (Degrees(pipeline=2), 0, 4, 2),
        (Degrees(pipeline=2), 1, 4, 0),
    ):
        reserved = [
            problem_of(job(degrees, stage=stage, micro_batches=micro_batches, estimate=one)).reserved_bytes
            for one in (without, ESTIMATE)
        ]
        assert reserved[1] - reserved[0] == held * RESIDUAL


def test_what_the_model_holds_in_forward_and_tied_gradients_in_backward_have_room() -> None:
    embedded = Lifetime(start=0, end=1, size_bytes=RESIDUAL, kind=LifetimeKind.OUTPUT, epilogue_end=1)
    tables = Lifetime(start=0, end=1, size_bytes=5000, kind=LifetimeKind.SHARED, epilogue_end=1)
    prologue = dataclasses.replace(EDGE, lifetimes=(*EDGE.lifetimes, embedded, tables))
    gradient = life(1, 2, 100 * HIDDEN * 2, LifetimeKind.TIED_GRADIENT)
    epilogue = dataclasses.replace(ESTIMATE.epilogue, lifetimes=(*ESTIMATE.epilogue.lifetimes, gradient))
    holding = dataclasses.replace(ESTIMATE, prologue=prologue)
    tied = dataclasses.replace(holding, epilogue=epilogue)
    # Shared tables are counted with what is saved; the gradient waits when the embedding's output is dead.
    for degrees, stage, of_holding, of_tied in (
        (ALONE, 0, RESIDUAL, 100 * HIDDEN * 2),
        (Degrees(tensor=2), 0, RESIDUAL // 2, 100 * HIDDEN),
        (Degrees(pipeline=2), 0, RESIDUAL, RESIDUAL),
        (Degrees(pipeline=2), 1, 0, 0),
    ):
        plain, held, waiting = (
            problem_of(job(degrees, stage=stage, estimate=one)) for one in (ESTIMATE, holding, tied)
        )
        assert held.reserved_bytes - plain.reserved_bytes == of_holding
        assert waiting.reserved_bytes - plain.reserved_bytes == of_tied
        assert waiting.blocks[-1].backward_transient_bytes == plain.blocks[-1].backward_transient_bytes


def test_a_tied_head_is_a_copy_on_the_last_stage() -> None:
    def weights(degrees: Degrees, estimate: ModelEstimate) -> int:
        last = problem_of(job(degrees, stage=degrees.pipeline - 1, estimate=estimate)).blocks[-1]
        return sum(s.piece_bytes * PIECES for s in last.states if s.role is Role.PARAMETER)

    own = dataclasses.replace(ESTIMATE.units[-1], parameters=(parameter("head", 64, HIDDEN),))
    untied = dataclasses.replace(ESTIMATE, units=(*ESTIMATE.units[:-1], own))
    assert weights(ALONE, ESTIMATE) == 0
    assert weights(Degrees(pipeline=2), ESTIMATE) == pytest.approx(100 * HIDDEN * 2, abs=PIECES)
    assert weights(Degrees(pipeline=2), untied) == pytest.approx(64 * HIDDEN * 2, abs=PIECES)


def test_a_pipeline_stage_has_its_blocks_and_only_the_ends_have_embedding_and_loss() -> None:
    degrees = Degrees(pipeline=2)
    names = [[b.name for b in problem_of(job(degrees, stage=stage)).blocks] for stage in (0, 1)]
    assert names == [["prologue", "layers.0"], ["layers.1", "epilogue"]]


def test_messages_take_time_and_room() -> None:
    # A batch so small that its arithmetic hides nothing.
    alone, cut = problem_of(job()), problem_of(job(Degrees(tensor=2)))
    device = setup(2)
    residual = TOKENS * HIDDEN * 2
    rate = device.interconnect.collective_bytes_per_second.value
    halved = problem_of(job(Degrees(tensor=2), setup=machine_for("a800-80g", gpus=2, dram="64GiB")))
    assert halved.blocks[1].forward_seconds > 4 * 0.5 * residual / rate
    assert cut.reserved_bytes > alone.reserved_bytes


def test_sharded_embeddings_are_gathered_whole() -> None:
    # 100 x 8 parameters of the embedding against 1600 of a block, of which two are whole at once.
    large = dataclasses.replace(ESTIMATE.units[0], parameters=(parameter("embed", 1000, HIDDEN),))
    estimate = dataclasses.replace(ESTIMATE, units=(large, *ESTIMATE.units[1:]))
    reserved = [
        problem_of(job(Degrees(data=4, zero_stage=3), estimate=e)).reserved_bytes
        for e in (ESTIMATE, estimate)
    ]
    # In backward a block's weights twice and its gradients; the embedding's weights and gradients.
    assert reserved[1] - reserved[0] == 2 * 2 * 8000 - 3 * 2 * 1600


@pytest.mark.parametrize(("sequence_parallel", "qkv", "products"), [(True, 1, 2), (False, 0, 2)])
def test_recomputes_repeat_the_messages_before_them(sequence_parallel: bool, qkv: int, products: int) -> None:
    # Links so slow that the difference to one GPU's recompute is that of the messages.
    slow = machine_for("a800-80g", gpus=2, dram="64GiB", interconnect="1KB/s")
    degrees = Degrees(tensor=2, sequence_parallel=sequence_parallel)
    once = TOKENS * HIDDEN * 2 / 2 / 1000  # a gathering or scattering; an all-reduce takes two
    costs = {
        t.name: math.fsum(t.recompute_seconds) for t in problem_of(job(degrees, setup=slow)).blocks[1].classes
    }
    assert costs["qkv"] == pytest.approx(qkv * once, abs=1e-6)
    assert costs["products"] == pytest.approx(products * once)
    assert costs["attention"] == pytest.approx(0, abs=1e-6)


def test_model_flops_count_attention_under_its_mask_three_times_and_no_recompute() -> None:
    products = 30_000 + 60_000 + 150_000
    assert job().model_flops_per_step == 2 * (products + 3 * 0.5 * 80_000)
    assert job(Degrees(data=4), micro_batches=3).model_flops_per_step == 12 * job().model_flops_per_step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": 0}, "micro_batches must be at least 1, got 0"),
        ({"shape": dataclasses.replace(SHAPE, layers=4)}, "shape has 4 layers and the estimate 2 blocks"),
        ({"stage": 1}, "stage 1 of a pipeline of 1"),
        ({"degrees": Degrees(data=3), "setup": setup(2)}, "3 GPUs do not fill hosts of 2"),
        ({"degrees": Degrees(data=4), "setup": setup(2)}, "no network between them"),
    ],
)
def test_a_contradiction_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


@pytest.mark.parametrize("device", ["1MiB", "40KiB", "24KiB"])
def test_the_forecast_of_any_budget_passes_the_checker(device: str) -> None:
    one = job(setup=machine_for("a800-80g", dram="64GiB", budget={"device": device}), chunks=4)
    forecast = make_forecast(one, SolveOptions(isolated=False))
    assert not forecast.fits or check(forecast.plan, forecast.problem) == []
    for place in forecast.places:
        lines = [line.size_bytes for line in forecast.bill if line.place == place.name]
        assert sum(lines) == place.peak_bytes
    assert forecast.fits or forecast.places[0].margin_bytes < 0


def test_plenty_is_the_step_that_nothing_limits() -> None:
    forecast = make_forecast(job(), SolveOptions(isolated=False))
    assert forecast.fits
    assert forecast.slowdown == pytest.approx(1.0, abs=2e-3)
    assert forecast.tokens_per_second == TOKENS / forecast.step_seconds
    peak = setup().accelerator.half_flops_per_second.value
    assert forecast.mfu == pytest.approx(job().model_flops_per_step / forecast.step_seconds / peak)


def test_an_8_bit_optimizer_has_less_state() -> None:
    small = problem_of(job(optimizer=OptimizerRule.ADAM_8BIT, master_weights=False)).blocks[1].states
    # 1600 parameters are fewer than 4096: two fp32 moments.
    assert {s.role: s.piece_bytes for s in small}[Role.OPTIMIZER] == 2 * 1600 * 4 // PIECES


def test_micro_batches_repeat_the_step_and_a_pipelines_first_stage_holds_several() -> None:
    one = problem_of(job(micro_batches=3))
    assert (one.micro_batches, one.in_flight) == (3, 1)
    stages = [job(Degrees(pipeline=2), micro_batches=3, stage=stage) for stage in (0, 1)]
    assert [problem_of(stage).in_flight for stage in stages] == [2, 1]
    # All micro-batches, and the pipeline's idle time: (p - 1) / m of it.
    forecast = make_forecast(job(Degrees(pipeline=2), micro_batches=3), SolveOptions(isolated=False))
    assert forecast.step_seconds == pytest.approx(forecast.plan.step_seconds * (1 + 1 / 3))


def test_a_disk_does_one_thing_at_a_time_and_each_chunk_pays_its_share_of_a_latency() -> None:
    machine = problem_of(job(setup=machine_for("rtx-4090", dram="64GiB", nvme="4TB@6GB/s,2GB/s"))).machine
    bus, disk = machine.place("nvme").hops
    # In turns, half the bytes at 6 and half at 2 GB/s: 3 GB/s together, in the proportion of the two.
    assert machine.shares(disk) == pytest.approx((0.75e9, 2.25e9))
    assert machine.shares(bus) == (bus.write_bytes_per_second, bus.read_bytes_per_second)
    preset = machine_for("rtx-4090", dram="64GiB").host_link.latency_seconds
    assert preset is not None
    assert bus.latency_seconds == preset.value / 16
