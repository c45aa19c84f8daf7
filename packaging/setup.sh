#!/bin/sh
# Installs, by package name, what is missing to build, test and demonstrate ftvm on Debian 12.
set -eu
missing=
need() { # need PACKAGE COMMAND-OR-FILE
    case $2 in
        /*) [ -e "$2" ] && return ;;
        *) command -v "$2" >/dev/null 2>&1 && return
           [ -x "/usr/sbin/$2" ] || [ -x "/sbin/$2" ] && return ;;
    esac
    missing="$missing $1"
}
need gcc cc
need gdb gdb
need libc6-dev /usr/include/stdlib.h
need pkg-config pkg-config
need libslirp-dev /usr/include/slirp/libslirp.h
need libglib2.0-dev /usr/include/glib-2.0/glib.h
need protobuf-compiler protoc
need libprotobuf-dev /usr/include/google/protobuf/descriptor.proto
need seabios /usr/share/seabios/bios-256k.bin
need qemu-utils qemu-img
need qemu-system-x86 qemu-system-x86_64
# The choice below keeps a machine without systemd without it.
if [ -d /run/systemd/system ]; then
    need libvirt-daemon-system /usr/sbin/libvirtd
else
    need "libvirt-daemon-system libvirt-daemon-system-sysv" /usr/sbin/libvirtd
fi
need libvirt-daemon-driver-qemu /usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so
need libvirt-clients virsh
need virtinst virt-install
need python3 python3
need python3-pip pip3
need mmdebstrap mmdebstrap
need busybox-static /usr/share/doc/busybox-static
need kmod depmod
need cpio cpio
need e2fsprogs mke2fs
need fdisk sfdisk
need grub-common grub-mkimage
need grub-pc-bin /usr/lib/grub/i386-pc/boot.img
need iproute2 ip
need openssh-client ssh
need dbus dbus-daemon
need etcd-server etcd
need polkitd /usr/lib/polkit-1/polkitd
need man-db man
need lintian lintian
need rpm rpmbuild
need rpmlint rpmlint
need ipxe /usr/lib/ipxe/ipxe.lkrn
need memtest86+ /boot/memtest86+x64.bin
# Servers for the storage tests.
need nfs-ganesha ganesha.nfsd
need nfs-ganesha-vfs /usr/lib/x86_64-linux-gnu/ganesha/libfsalvfs.so
need rpcbind rpcbind
need tgt tgtd
need libnbd-bin nbdcopy
need qemu-block-extra /usr/lib/x86_64-linux-gnu/qemu/block-nfs.so
[ -z "$missing" ] && exit 0
echo "setup: installing$missing"
as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
$as_root apt-get update -qq
# None of the servers is to start by itself: the tests start their own.
for unit in nfs-ganesha rpcbind tgt etcd; do
    case $missing in
        *" $unit"*) [ -e "/etc/systemd/system/$unit.service" ] || $as_root ln -s /dev/null "/etc/systemd/system/$unit.service" ;;
    esac
done
case $missing in
    *" rpcbind"*) [ -e /etc/systemd/system/rpcbind.socket ] || $as_root ln -s /dev/null /etc/systemd/system/rpcbind.socket ;;
esac
# QEMU's packages must be of one version. A qemu-utils from elsewhere (backports) gives way to the one beside qemu-system-x86.
case $missing in
    *" qemu-"*)
        qemu=$(apt-cache policy qemu-system-x86 | sed -n 's/^  Candidate: //p')
        utils=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true)
        [ -z "$utils" ] || [ "$utils" = "$qemu" ] || missing="$missing qemu-utils=$qemu" ;;
esac
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends --allow-downgrades $missing
