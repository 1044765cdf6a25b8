"""A virtual machine with memory nodes that this machine does not have, in which our own code runs.

QEMU emulates the processor in software, so that it works wherever the tests do: speed means nothing there.
The guest is a Debian kernel, an initramfs made of busybox and a few modules, and this machine's file system,
read only; it runs one Python program with the interpreter of the tests, which writes a line of JSON a check.

    node 0     processor and 1 GiB
    node 1, 2  256 MiB each, no processor
    cxl        where asked for: two CXL memory devices of 256 MiB. One is /dev/dax0.0, the other is given to
               the kernel as system memory, and is node 3
"""

from __future__ import annotations

import ctypes
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROOT = REPOSITORY / ".qemu" / "root"
_CXL_MODULES = ("cxl_acpi", "cxl_pci", "cxl_mem", "device_dax", "dax_cxl")
_MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("netfs", "fscache", "9pnet", "9pnet_virtio", "9p"),
)
"""In the order of their needs; a kernel that has one built in has no file of it."""

_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "no $module"; done
{cxl}
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host
mkdir /dev/shm
for place in proc sys dev; do mount -o bind /$place /host/$place; done
export HOME=/dev/shm TMPDIR=/dev/shm OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={repository}
chroot /host {python} -W error {program} {arguments} >/dev/ttyS1
echo "exit $?" >/dev/ttyS1
poweroff -f
"""

# As `cxl create-region` and `daxctl reconfigure-device` do (drivers/cxl/core/region.c, drivers/dax/bus.c).
_INIT_CXL = """\
cd /sys/bus/cxl/devices
for decoder in endpoint*/decoder*.0; do
    region=$(cat decoder0.0/create_ram_region)
    echo $region >decoder0.0/create_ram_region
    echo 256 >$region/interleave_granularity
    echo 1 >$region/interleave_ways
    echo ram >$decoder/mode
    echo 0x10000000 >$decoder/dpa_size
    echo 0x10000000 >$region/size
    basename $decoder >$region/target0
    echo 1 >$region/commit
    echo $region >/sys/bus/cxl/drivers/cxl_region/bind
done
echo dax0.0 >/sys/bus/dax/drivers/device_dax/new_id
insmod /modules/kmem.ko
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the guest said."""

    results: dict[str, str]
    """By check: empty where it passed, or the traceback."""
    exit_code: int | None
    """Of the program; None where the guest ended before it."""
    seconds: float
    console: str

    def describe(self) -> str:
        """For whoever reads why a test failed."""
        ended = f"exit {self.exit_code} after {self.seconds:.0f} s"
        return f"{ended}; the guest's console ends:\n{self.console[-4000:]}"


def missing() -> str:
    """Why there can be no guest; empty where there can."""
    if (ROOT / "usr/bin/qemu-system-x86_64").exists():
        return ""
    return "there is no .qemu; make it with: sh scripts/setup_qemu.sh"


def kernels() -> list[str]:
    """The versions of the kernels, oldest first."""
    names = [path.name.removeprefix("vmlinuz-") for path in (ROOT / "boot").glob("vmlinuz-*")]
    return sorted(names, key=lambda name: [int(part) for part in name.split("-")[0].split("+")[0].split(".")])


def run_in_guest(
    kernel: str, program: Path, arguments: str, folder: Path, *, cxl: bool, timeout_seconds: float
) -> Outcome:
    """Boot ``kernel``, run ``program``, and read its results. ``folder`` takes the guest's files."""
    initramfs, results, console = (folder / name for name in ("initramfs", "results", "console"))
    results.write_text("")
    initramfs.write_bytes(_initramfs(kernel, program, arguments, cxl=cxl))
    start = time.monotonic()
    with console.open("wb") as output:
        machine = subprocess.Popen(
            _command(kernel, initramfs, results, cxl=cxl),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
            env=os.environ
            | {"LD_LIBRARY_PATH": f"{ROOT}/usr/lib/x86_64-linux-gnu:{ROOT}/lib/x86_64-linux-gnu"},
        )
        try:
            machine.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            pass  # what it has said so far says how far it came
        finally:
            machine.kill()
            machine.wait()
    lines = results.read_text(errors="replace").splitlines()
    checks = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    exits = [int(line.split()[1]) for line in lines if line.startswith("exit ")]
    return Outcome(
        results={check["check"]: check["error"] for check in checks},
        exit_code=exits[0] if exits else None,
        seconds=time.monotonic() - start,
        console=console.read_text(errors="replace"),
    )


def _die_with_parent() -> None:
    """A killed test would leave the machine running."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _command(kernel: str, initramfs: Path, results: Path, *, cxl: bool) -> list[str]:
    options = {
        "-accel": "tcg",
        # Linux makes no CXL region where it sees that it is a guest: it cannot be sure of the caches there.
        "-cpu": "max,-hypervisor",
        "-m": "1536M,maxmem=8G,slots=8",
        "-display": "none",
        "-kernel": str(ROOT / "boot" / f"vmlinuz-{kernel}"),
        "-initrd": str(initramfs),
        # The kernel tries its timer for some milliseconds, in which a busy machine may not run QEMU at all.
        "-append": "console=ttyS0 quiet panic=-1 no_timer_check",
        "-fsdev": "local,id=files,path=/,security_model=none,readonly=on,multidevs=remap",
    }
    several = [
        *(("-L", f"{ROOT}/usr/share/{part}") for part in ("qemu", "seabios")),
        ("-serial", "stdio"),
        ("-serial", f"file:{results}"),
        ("-device", "virtio-9p-pci,bus=pcie.0,fsdev=files,mount_tag=host"),
        *(
            ("-object", f"memory-backend-ram,id=ram{node},size={size}")
            for node, size in enumerate(("1G", "256M", "256M"))
        ),
        ("-numa", "node,nodeid=0,cpus=0,memdev=ram0"),
        *(("-numa", f"node,nodeid={node},memdev=ram{node}") for node in (1, 2)),
        *(("-numa", f"dist,src={a},dst={b},val={far}") for a, b, far in ((0, 1, 30), (0, 2, 30), (1, 2, 40))),
    ]
    machine = "q35"
    if cxl:
        machine += ",cxl=on,cxl-fmw.0.targets.0=bridge,cxl-fmw.0.size=4G"
        several.append(("-device", "pxb-cxl,bus_nr=12,bus=pcie.0,id=bridge"))
        for index in range(2):
            several += [
                ("-object", f"memory-backend-ram,id=far{index},size=256M"),
                ("-device", f"cxl-rp,port={index},bus=bridge,id=port{index},chassis=0,slot={2 + index}"),
                (
                    "-device",
                    f"cxl-type3,bus=port{index},volatile-memdev=far{index},id=memory{index},sn={1 + index}",
                ),
            ]
    words = [word for pair in (("-machine", machine), *options.items(), *several) for word in pair]
    return [str(ROOT / "usr/bin/qemu-system-x86_64"), "-nodefaults", "-no-reboot", *words]


def _module(kernel: str, name: str) -> bytes | None:
    for path in (ROOT / "lib/modules" / kernel).rglob(f"{name}.ko*"):
        packed = path.read_bytes()
        return lzma.decompress(packed) if path.suffix == ".xz" else packed
    return None


def _initramfs(kernel: str, program: Path, arguments: str, *, cxl: bool) -> bytes:
    """What the kernel finds at first: an archive in cpio's format "newc"."""
    init = _INIT.format(
        cxl=_INIT_CXL if cxl else "",
        repository=REPOSITORY,
        python=sys.executable,
        program=program,
        arguments=arguments,
    )
    files = {"init": init.encode(), "bin/busybox": (ROOT / "bin/busybox").read_bytes()}
    order = []
    for name in (*_MODULES, *(_CXL_MODULES if cxl else ())):
        if (content := _module(kernel, name)) is not None:
            files[f"modules/{name}.ko"] = content
            order.append(name)
    if cxl:
        files["modules/kmem.ko"] = _module(kernel, "kmem")
    files["modules/order"] = " ".join(order).encode()
    entries = [(name, 0o40755, b"") for name in ("bin", "modules", "host", "proc", "sys", "dev")]
    entries += [(name, 0o100755, content) for name, content in files.items()]
    archive = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        # inode, mode, uid, gid, links, mtime, size, four of devices, length of the name, checksum
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += content + bytes(-len(content) % 4)
    return bytes(archive)
