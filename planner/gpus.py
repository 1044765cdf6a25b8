"""GPUs by name, each number with its source.

Read before changing one: peaks are *dense* (makers print the sparse ones larger), GB are 1e9 bytes, memory is
what programs were seen to get where somebody reported it. Where no figure was found the source begins with
``assumption:`` or ``derived:``.
"""

from __future__ import annotations

from memtrain.planner.hardware import Accelerator, Quoted, find
from memtrain.planner.units import GiB, MiB

_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_A800 = (
    "https://tweakers.net/nieuws/203182/nvidia-introduceert-a800-gpu-voor-china-die-niet-onder-exportrestricties-"
    f"vs-valt.html (the numbers of the A100 but for NVLink), {_A100}"
)
_H100 = "https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html (printed with sparsity: halved)"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/ (printed with sparsity: halved)"
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_ADA = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf (appendix A, "
    "fp32 accumulation)"
)
_MI300X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
_LAPTOPS = "https://hmc-tech.com/gpu/nvidia-geforce-rtx-{} (its highest power; tensor, fp32 accumulation)"
_TIMED = "https://github.com/zzc0721/torch-performance-test-data/issues/{} (bf16, 10240^3: {} TFLOP/s)"
_MAMF = (
    "https://github.com/stas00/ml-engineering/blob/master/compute/accelerator/README.md (largest bf16 matrix "
    "product found, 2026-08)"
)
_FLASH_2 = (
    "https://arxiv.org/abs/2307.08691, section 1 (FlashAttention-2 on A100 80GB SXM4, the most reached)"
)
_FLASH_3 = (
    "https://arxiv.org/abs/2407.08608, abstract (FlashAttention-3 on H100, the most reached: 740 TFLOP/s)"
)


def _q(value: float, source: str) -> Quoted:
    return Quoted(value=value, source=source)


def _said_of(device: str, name: str, value: float, source: str) -> Quoted:
    """A number that was found for ``device`` alone; for its kin an assumption."""
    return _q(value, source if name == device else f"assumption: as {device}, {source}")


def _box(gigabytes: int, url: str) -> Quoted:
    """Memory by the data sheet alone, read as 1e9 bytes: the driver and a display keep the rest."""
    return _q(gigabytes * 1e9, f"{url}: {gigabytes} GB, read as 1e9 bytes")


# What programs see of what nvidia-smi shows: an H100 has 79.11 GiB of 81559 MiB
# (https://github.com/vllm-project/vllm/issues/27508, https://github.com/modal-labs/modal-client/pull/2797).
_H100_SEEN = (79.11 * GiB) / (81559 * MiB)
_SEEN = "derived: 0.993 (an H100's programs see 79.11 GiB of 81559 MiB) of nvidia-smi's total, {} MiB"

_OWN_UPLINK = _q(1, "assumption: every GPU has a slot of its own")
# A host of eight has four PCIe switches, and `nvidia-smi topo -m` shows pairs of GPUs behind one (PXB).
_PAIRED_UPLINK = _q(
    2,
    "https://github.com/NVIDIA/nvbandwidth/issues/53 (8 A100-SXM4-80GB); of an A800 as well: https://www.besthub."
    "dev/articles/inside-the-high-performance-gpu-server-a-deep-dive-into-a100-a800-h100-topologies-512d39aeaa2c",
)
_H800_UPLINK = _q(
    1,
    "https://github.com/liguodongiot/llm-action/blob/main/ai-infra/%E7%BD%91%E7%BB%9C/nvbandwidth.md (8 H800 "
    "that all copy: 55.1 GB/s to each, 44.8 from each)",
)

# Attention kernels per matrix product on an A100: 0.73 and 0.63 of the peak against 0.869.
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = 0.73 / 0.869, 0.63 / 0.869

_AS_FLASH_2 = "assumption: as much below the matrix products as FlashAttention-2 on A100 (arXiv 2307.08691)"
_MATMUL = _q(0.8, "assumption: as an H100's, 0.803, rounded")
_COPY = _q(0.75, "assumption: as an A100's and an H100's device-to-device copies (0.74, 0.77)")
_A100_COPY = (
    "https://github.com/router-gao/cuda-demo, cuda-samples/02-cuda-bandwidth.md (1157.5 of 1555 GB/s)"
)
_H100_COPY = "https://github.com/NVIDIA/nccl/issues/1264 (2573 of 3350 GB/s)"


def _a100(
    name: str, memory: Quoted, rate: float, matmul: float, interconnect: str | None = None
) -> Accelerator:
    url = _A800 if "a800" in name else _A100
    form = "a100-80gb-pcie" if "pcie" in name else "a100-80gb-sxm"
    return Accelerator(
        name=name,
        memory_bytes=memory,
        memory_bytes_per_second=_q(rate, url),
        half_flops_per_second=_q(312e12, url),
        single_flops_per_second=_q(156e12, f"{url} (TF32)"),
        matmul_efficiency=_said_of(form, name, matmul, _MAMF),
        attention_forward_efficiency=_said_of("a100-80gb-sxm", name, 0.73, _FLASH_2),
        attention_backward_efficiency=_said_of("a100-80gb-sxm", name, 0.63, _FLASH_2),
        memory_efficiency=_said_of("a100-40gb-sxm", name, 1157.5 / 1555, _A100_COPY),
        host_link="pcie-gen4-x16",
        gpus_per_uplink=_OWN_UPLINK if "pcie" in name else _PAIRED_UPLINK,
        interconnect=interconnect,
    )


def _hopper(
    name: str, memory: Quoted, rate: float, half: float, single: float, url: str, interconnect: str | None
) -> Accelerator:
    sxm = "h100-80gb-sxm"
    return Accelerator(
        name=name,
        memory_bytes=memory,
        memory_bytes_per_second=_q(rate, url),
        half_flops_per_second=_q(half, url),
        single_flops_per_second=_q(single, f"{url} (TF32)"),
        matmul_efficiency=_said_of(sxm, name, 0.803, _MAMF),
        attention_forward_efficiency=_said_of(sxm, name, 0.75, _FLASH_3),
        attention_backward_efficiency=_q(
            0.647, "assumption: as far below forward's 0.75 as FlashAttention-2's 0.63 is below 0.73"
        ),
        memory_efficiency=_said_of(sxm, name, 2573 / 3350, _H100_COPY),
        host_link="pcie-gen5-x16",
        gpus_per_uplink=_OWN_UPLINK if "pcie" in name else _H800_UPLINK,
        interconnect=interconnect,
    )


def _other(
    name: str,
    memory: Quoted,
    rate: Quoted,
    half: Quoted,
    single: Quoted,
    *,
    host_link: str = "pcie-gen4-x16",
    interconnect: str | None = None,
    matmul: Quoted = _MATMUL,
) -> Accelerator:
    """A GPU whose attention kernels nobody was found to have published figures of."""
    return Accelerator(
        name=name,
        memory_bytes=memory,
        memory_bytes_per_second=rate,
        half_flops_per_second=half,
        single_flops_per_second=single,
        matmul_efficiency=matmul,
        attention_forward_efficiency=_q(matmul.value * _ATTENTION_FORWARD, _AS_FLASH_2),
        attention_backward_efficiency=_q(matmul.value * _ATTENTION_BACKWARD, _AS_FLASH_2),
        memory_efficiency=_COPY,
        host_link=host_link,
        gpus_per_uplink=_OWN_UPLINK,
        interconnect=interconnect,
        consumer=name.startswith("rtx-"),
    )


_A100_40 = _q(39.50 * GiB, "https://github.com/TianheWu/CoSeR/issues/10 (PyTorch's total)")
_A100_80 = _q(79.25 * GiB, "https://github.com/levihsu/OOTDiffusion/issues/235 (PyTorch's total)")
_A800_80 = _q(79.33 * GiB, "https://github.com/hahnyuan/PB-LLM/issues/3 (PyTorch's total)")
_H100_80 = _q(79.11 * GiB, "https://github.com/vllm-project/vllm/issues/27508 (PyTorch's total)")
_4090_LAPTOP = _LAPTOPS.format("4090-laptop-150w")
_5090_LAPTOP = _LAPTOPS.format("5090-laptop-150w-vs-nvidia-rtx-5000-max-q")
_4060_LAPTOP = "https://fpsbench.com/compare/gpu/nvidia-geforce-rtx-4060-mobile-vs-nvidia-t400"

ACCELERATORS: tuple[Accelerator, ...] = (
    _a100("a100-40gb-sxm", _A100_40, 1555e9, 0.869, "nvlink-3"),
    _a100("a100-40gb-pcie", _A100_40, 1555e9, 0.811),
    _a100("a100-80gb-sxm", _A100_80, 2039e9, 0.869, "nvlink-3"),
    _a100("a100-80gb-pcie", _A100_80, 1935e9, 0.811),
    _a100("a800-80gb-sxm", _A800_80, 2039e9, 0.869, "nvlink-3-a800"),
    _hopper("h100-80gb-sxm", _H100_80, 3350e9, 989.5e12, 494.5e12, _H100, "nvlink-4"),
    _hopper("h100-80gb-pcie", _H100_80, 2000e9, 756.5e12, 378e12, _H100, None),
    _hopper(
        "h200-141gb-sxm",
        _q(143771 * MiB * _H100_SEEN, _SEEN.format(143771)),
        4800e9,
        989.5e12,
        494.5e12,
        _H200,
        "nvlink-4",
    ),
    _other(
        "rtx-4090",
        _q(23.64 * GiB, "https://github.com/ali-vilab/VGen/issues/104 (PyTorch's total)"),
        _q(1008e9, _ADA),
        _q(165.2e12, _ADA),
        _q(82.6e12, f"{_ADA} (TF32)"),
        matmul=_q(158.54 / 165.2, _TIMED.format(78, 158.54)),
    ),
    _other(
        "l40s",
        _q(
            46068 * MiB * _H100_SEEN,
            f"{_SEEN.format(46068)}, https://github.com/akash-network/provider-configs/pull/99",
        ),
        _q(864e9, _L40S),
        _q(362.05e12, _L40S),
        _q(183e12, f"{_L40S} (TF32)"),
    ),
    _other(
        "mi300x",
        _q(8 * 25767706624, "https://github.com/ROCm/legacy-rocm-build/issues/4750 (eight partitions)"),
        _q(5300e9, _MI300X),
        _q(1307.4e12, _MI300X),
        _q(653.7e12, f"{_MI300X} (TF32)"),
        host_link="pcie-gen5-x16",
        interconnect="infinity-fabric-mi300x",
        matmul=_q(668.4 / 1307.4, f"{_MAMF}, 668.4 TFLOP/s"),
    ),
    _other(
        "rtx-5090-laptop",
        _box(24, _5090_LAPTOP),
        _q(896e9, _5090_LAPTOP),
        _q(113.99e12, _5090_LAPTOP),
        _q(56.99e12, f"{_5090_LAPTOP} (TF32)"),
        host_link="pcie-gen5-x8",  # the lesser of what laptops wire
        matmul=_q(78.00 / 113.99, _TIMED.format(116, 78.00)),
    ),
    _other(
        "rtx-4090-laptop",
        _box(16, _4090_LAPTOP),
        _q(576e9, _4090_LAPTOP),
        _q(2 * 39.69e12, f"derived: twice the 39.69 TFLOP/s of fp32, {_4090_LAPTOP}"),
        _q(39.69e12, f"{_4090_LAPTOP} (TF32 is as fast as fp32 there)"),
    ),
    _other(
        "rtx-4060-laptop",
        _box(8, _4060_LAPTOP),
        _q(256e9, _4060_LAPTOP),
        _q(2 * 11.61e12, f"derived: twice the 11.61 TFLOP/s of fp32, {_4060_LAPTOP}"),
        _q(11.61e12, f"{_4060_LAPTOP} (TF32 is as fast as fp32 there)"),
        host_link="pcie-gen4-x8",
    ),
)


def accelerator(name: str) -> Accelerator:
    """The GPU called ``name`` (``a100-80g``, ``NVIDIA H200``). Raises ValueError with the known names."""
    return find("GPU", name, ACCELERATORS)
