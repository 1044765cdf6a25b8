#!/bin/sh
# Make .qemu: QEMU, busybox and two kernels of Debian 12, for the tests with real memory nodes and emulated CXL
# devices (marker qemu). Running it again is harmless. Called by `make test`.
#
# Nothing is installed and no root is needed: apt downloads with lists of its own, and what it downloads is
# unpacked into .qemu/root. From backports come QEMU, for CXL memory devices that are volatile (8.1), and a
# kernel with weighted interleave (6.9); the kernel of Debian 12 itself (6.1) is one without.
set -eu
cd "$(dirname "$0")/.."
TARGET=.qemu
MIRROR=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg

refuse() {
    echo "no $TARGET, and tests marked qemu are skipped: $1" >&2
    exit 1
}
[ "$(uname -m)" = x86_64 ] || refuse "this is no x86-64"
command -v apt-get >/dev/null || refuse "there is no apt-get"
# What is not downloaded is the system's: its libraries must be those that QEMU was built with.
grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release || refuse "this is not Debian 12"
[ -e "$KEYS" ] || refuse "$KEYS is missing"

mkdir -p "$TARGET/apt/lists/partial" "$TARGET/apt/archives/partial"
apt="$PWD/$TARGET/apt"
for suite in bookworm bookworm-backports; do
    echo "deb [signed-by=$KEYS] $MIRROR $suite main"
done >"$apt/sources.list"
cat >"$apt/apt.conf" <<EOF
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt";
Dir::Cache::archives "$apt/archives";
APT::Sandbox::User "$(id -un)";
Debug::NoLocking "true";
EOF
export APT_CONFIG="$apt/apt.conf"
apt-get -q update
apt-get -q install -y --no-install-recommends --download-only -t bookworm-backports qemu-system-x86
cd "$apt/archives"
for suite in bookworm bookworm-backports; do
    kernel=$(apt-cache show "linux-image-amd64/$suite" | sed -n 's/^Depends: \([^ ]*\).*/\1/p' | head -n 1)
    apt-get -q download "$kernel"
done
apt-get -q download busybox-static

# Of a kernel's 500 MB only what the tests load.
modules='netfs|fscache|9p|9pnet|9pnet_virtio|virtio|virtio_ring|virtio_pci|virtio_pci_modern_dev|virtio_pci_legacy_dev'
modules="$modules|cxl_acpi|cxl_pci|cxl_mem|dax_cxl|device_dax|kmem"
rm -rf ../../root
mkdir ../../root
for package in *.deb; do
    case $package in
    linux-image-*)
        dpkg-deb --fsys-tarfile "$package" >image.tar
        tar -tf image.tar | grep -E "/vmlinuz-|/($modules)\.ko(\.xz)?$" >wanted
        tar -xf image.tar -C ../../root -T wanted
        rm image.tar wanted
        ;;
    *) dpkg-deb -x "$package" ../../root ;;
    esac
done
rm -rf "$apt"
