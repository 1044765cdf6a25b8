from __future__ import annotations

import pytest

from memtrain.planner.gpus import ACCELERATORS, accelerator
from memtrain.planner.hardware import Duplex, Quoted, find, in_series, slower, time_shared
from memtrain.planner.links import (
    CXL_DEVICES,
    DISKS,
    DRAM_CHANNELS,
    HOST_LINKS,
    INTERCONNECTS,
    host_link,
    interconnect,
)
from memtrain.planner.units import GiB


def quoted(value: float, source: str = "given") -> Quoted:
    return Quoted(value=value, source=source)


def duplex(read: float, write: float, mixed: float, name: str = "toy") -> Duplex:
    return Duplex(name=name, read=quoted(read), write=quoted(write), mixed=quoted(mixed))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_quoted_number_is_finite_and_above_zero(value: float) -> None:
    with pytest.raises(ValueError, match="must be finite and above 0"):
        quoted(value)


def test_a_number_without_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"5\.0 has no source"):
        quoted(5.0, "")


def test_scaling_says_so_unless_it_changes_nothing() -> None:
    assert quoted(8).scaled(0.5, "half the lanes") == quoted(4, "derived: half the lanes of [given]")
    assert quoted(8).scaled(1, "one of one") == quoted(8)


def test_a_direction_at_a_time_is_the_harmonic_mean() -> None:
    # 1 GB read at 6 GB/s and 1 GB written at 3 GB/s take 1/6 + 1/3 = 1/2 s: 4 GB/s in all.
    assert time_shared(quoted(6e9), quoted(3e9)).value == pytest.approx(4e9)


def test_both_directions_cannot_beat_the_sum_of_each() -> None:
    with pytest.raises(
        ValueError, match=r"toy: both directions at once cannot move 12 bytes/s, more than 11"
    ):
        duplex(6, 5, 12)


def test_in_series_the_slower_counts_and_keeps_its_source() -> None:
    near = Duplex(name="bus", read=quoted(26, "bus"), write=quoted(25, "bus"), mixed=quoted(37, "bus"))
    far = Duplex(name="disk", read=quoted(100, "disk"), write=quoted(1, "disk"), mixed=quoted(90, "disk"))
    behind = in_series(near, far)
    assert behind.name == "disk"
    assert (behind.read, behind.write) == (quoted(26, "bus"), quoted(1, "disk"))
    assert behind.mixed == quoted(27, "derived: the sum of both directions alone")
    assert behind.latency_seconds is None
    assert slower(quoted(3, "a"), quoted(2, "b")) == quoted(2, "b")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a800-80g", "a800-80gb-sxm"),
        ("A100 80GB", "a100-80gb-sxm"),
        ("a100-80gb-PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb-sxm"),
        ("h100", "h100-80gb-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-sxm"),
        ("NVIDIA H100 PCIe", "h100-80gb-pcie"),
        ("NVIDIA H200", "h200-141gb-sxm"),
        ("4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090-laptop"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("L40S", "l40s"),
    ],
)
def test_gpus_are_found_as_drivers_and_people_call_them(text: str, name: str) -> None:
    assert accelerator(text).name == name


def test_every_name_finds_itself() -> None:
    for items in (ACCELERATORS, HOST_LINKS, INTERCONNECTS, CXL_DEVICES, DISKS):
        assert [find("thing", item.name, items) for item in items] == list(items)  # type: ignore[arg-type]
    assert [host_link(name).name for name in ("gen4", "PCIe 5.0", "pcie3", "gen4 x8")] == [
        "pcie-gen4-x16",
        "pcie-gen5-x16",
        "pcie-gen3-x16",
        "pcie-gen4-x8",
    ]
    assert interconnect("NVLink 4").name == "nvlink-4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100", "could be a100-40gb-sxm, a100-40gb-pcie, a100-80gb-sxm, a100-80gb-pcie: say which"),
        ("rtx-4900", "no GPU is called 'rtx-4900'; did you mean rtx-4090"),
        ("5090", "no GPU is called '5090'"),  # the laptop's is another chip than the desktop's
        ("L40", "no GPU is called 'L40'; did you mean l40s"),
        ("H100 NVL", "no GPU is called 'H100 NVL'"),
        ("", "no GPU is called ''; known are a100-40gb-sxm"),
    ],
)
def test_a_name_that_fits_none_or_several_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerator(text)


def test_every_preset_number_says_where_it_is_from() -> None:
    numbers = [number for gpu in ACCELERATORS for number in gpu.numbers().values()]
    assert len(numbers) == 9 * len(ACCELERATORS) == 9 * 14
    for link in (*HOST_LINKS, *CXL_DEVICES, *DISKS):
        assert link.latency_seconds is not None
        numbers += [link.read, link.write, link.mixed, link.latency_seconds]
    for tie in INTERCONNECTS:
        numbers += [tie.peer_bytes_per_second, tie.collective_bytes_per_second]
    for number in [*numbers, *DRAM_CHANNELS.values()]:
        assert number.source.startswith(("https://", "assumption: ", "derived: ")), number


def test_every_gpu_names_links_that_exist_and_plausible_fractions() -> None:
    for gpu in ACCELERATORS:
        assert host_link(gpu.host_link).name == gpu.host_link
        assert gpu.interconnect is None or interconnect(gpu.interconnect).name == gpu.interconnect
        fractions = [q.value for name, q in gpu.numbers().items() if name.endswith("efficiency")]
        assert len(fractions) == 4
        assert all(0.3 < fraction < 1 for fraction in fractions)
        assert gpu.attention_backward_efficiency.value < gpu.attention_forward_efficiency.value


@pytest.mark.parametrize(
    ("name", "gib", "gigabytes_per_second", "half_tera", "single_tera"),
    [
        ("a100-40gb-pcie", 39.50, 1555, 312, 156),
        ("a100-80gb-sxm", 79.25, 2039, 312, 156),
        ("a100-80gb-pcie", 79.25, 1935, 312, 156),
        ("a800-80gb-sxm", 79.33, 2039, 312, 156),
        ("h100-80gb-sxm", 79.11, 3350, 989.5, 494.5),
        ("h100-80gb-pcie", 79.11, 2000, 756.5, 378),
        ("rtx-4090", 23.64, 1008, 165.2, 82.6),
        ("mi300x", 191.984375, 5300, 1307.4, 653.7),
        ("rtx-5090-laptop", 24e9 / GiB, 896, 113.99, 56.99),
    ],
)
def test_dense_peaks_and_what_programs_see(
    name: str, gib: float, gigabytes_per_second: float, half_tera: float, single_tera: float
) -> None:
    gpu = accelerator(name)
    assert gpu.memory_bytes.value == pytest.approx(gib * GiB)
    assert gpu.memory_bytes_per_second.value == gigabytes_per_second * 1e9
    assert gpu.half_flops_per_second.value == half_tera * 1e12
    assert gpu.single_flops_per_second.value == single_tera * 1e12


def test_links_by_hand() -> None:
    # Both at once as on PCIe 4.0, which moved 2 x 18.56 of 26 + 25 GB/s.
    assert host_link("gen3").mixed.value == pytest.approx((12.15e9 + 12.89e9) * 37.12 / 51)
    assert host_link("pcie-gen5-x8").read.value == pytest.approx(55.43e9 / 2)
    assert interconnect("nvlink-3-a800").collective_bytes_per_second.value == pytest.approx(234.89e9 * 2 / 3)
    assert DRAM_CHANNELS["ddr4-3200"].value == pytest.approx(0.8 * 25.6e9)
    assert DRAM_CHANNELS["ddr5-4800"].value == pytest.approx(0.8 * 38.4e9)
    assert CXL_DEVICES[0].mixed.value == 36e9


def test_what_was_found_for_one_form_is_an_assumption_for_the_others() -> None:
    said = {gpu.name: gpu.attention_forward_efficiency.source for gpu in ACCELERATORS}
    assert said["a100-80gb-sxm"].startswith("https://arxiv.org/abs/2307.08691")
    assert said["a800-80gb-sxm"].startswith("assumption: as a100-80gb-sxm, https://arxiv.org/abs/2307.08691")
    assert said["h200-141gb-sxm"].startswith("assumption: as h100-80gb-sxm, https://arxiv.org/abs/2407.08608")


def test_latencies_add_up_and_are_not_scaled() -> None:
    bus, disk = host_link("gen4"), DISKS[0]
    behind = in_series(bus, disk).latency_seconds
    assert behind is not None
    assert behind.value == pytest.approx(157e-6)
    assert (
        bus.scaled(0.5, "half").latency_seconds
        == bus.latency_seconds
        == in_series(duplex(1, 1, 1), bus).latency_seconds
    )


def test_numbers_of_a_gpu_can_be_given() -> None:
    gpu = accelerator("rtx-4090").given({"half_flops_per_second": 150e12, "matmul_efficiency": 0.7})
    assert gpu.half_flops_per_second == quoted(150e12)
    assert gpu.matmul_efficiency == quoted(0.7)
    assert gpu.single_flops_per_second == accelerator("rtx-4090").single_flops_per_second
    with pytest.raises(ValueError, match=r"no number 'half_flops'; did you mean half_flops_per_second"):
        gpu.given({"half_flops": 1})
    with pytest.raises(ValueError, match="must be finite and above 0"):
        gpu.given({"memory_bytes": 0})
    with pytest.raises(ValueError, match="matmul_efficiency is a fraction of the peak, at most 1, got 60"):
        gpu.given({"matmul_efficiency": 60})
