"""Every Triton kernel, compiled ahead of time for sm_80, sm_90 and sm_100: registers, spills, traffic.

    .venv-optim/bin/python benchmarks/kernels.py            # all dtypes and sizes
    .venv-optim/bin/python benchmarks/kernels.py --first    # one variant of each kernel, printed only

No GPU is needed and no speed is claimed. "bytes" are moved per element by the code as the tests count it in
Triton's interpreter (operands that all blocks share count once), "least" what the task must move.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from _harness import publish, table

from memtrain.optim.kernels.aot import (
    SHARED_LIMIT_BYTES,
    TARGETS,
    Compiled,
    KernelSpec,
    all_specs,
    compile_variant,
)


def compile_all(specs: Sequence[KernelSpec], *, first_only: bool) -> list[Compiled]:
    """Each kernel's variants (or only the first) for every target."""
    return [
        compile_variant(spec.kernel, variant, capability)
        for spec in specs
        for variant in (spec.variants[:1] if first_only else spec.variants)
        for capability in TARGETS
    ]


def faults(compiled: Sequence[Compiled]) -> list[str]:
    """What no kernel may do: take more shared memory than a block has."""
    return [
        f"{one.kernel} {one.variant} sm_{one.capability}: {one.shared_bytes} bytes of shared memory, of "
        f"{SHARED_LIMIT_BYTES[one.capability]}"
        for one in compiled
        if one.shared_bytes > SHARED_LIMIT_BYTES[one.capability]
    ]


def rows(compiled: Sequence[Compiled]) -> list[tuple[object, ...]]:
    """One line a variant, the targets side by side."""
    lines = []
    for group in (compiled[i : i + len(TARGETS)] for i in range(0, len(compiled), len(TARGETS))):
        one = group[0]
        lines.append(
            (
                one.kernel.strip("_").removesuffix("_kernel"),
                one.variant,
                one.num_warps,
                "/".join(str(each.registers) for each in group),
                "/".join(str(each.spill_bytes) for each in group),
                "/".join(str(each.shared_bytes) for each in group),
                f"{one.moved_bytes:.3f}",
                f"{one.least_bytes:.3f}",
                f"{one.moved_bytes / one.least_bytes:.3f}",
            )
        )
    return lines


HEADER = "kernel,variant,warps,registers,spilled bytes,shared bytes,bytes,least,ratio".split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", action="store_true", help="one variant a kernel; nothing is written")
    arguments = parser.parse_args()
    specs = all_specs()
    compiled = compile_all(specs, first_only=arguments.first)
    targets = "/".join(f"sm_{capability}" for capability in TARGETS)
    text = f"{targets} side by side\n{table(HEADER, rows(compiled))}"
    summary = {
        "kernels": len(specs),
        "spills": sum(one.spill_bytes for one in compiled),
        "worst_bytes_ratio": round(max(one.moved_bytes / one.least_bytes for one in compiled), 3),
    }
    if arguments.first:
        print(text, json.dumps(summary), sep="\n")
    else:
        publish("kernels", text=text, summary=summary, details=[asdict(one) for one in compiled])
    for fault in (found := faults(compiled)):
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
