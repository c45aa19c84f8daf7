#!/bin/bash
# Builds the guests that the tests and the demo run, from Debian packages.
#   build.sh DIR tiny      DIR/vmlinuz (cloud kernel) and DIR/tiny.cpio.gz: busybox, drivers, ftload
#   build.sh DIR generic   DIR/generic-vmlinuz (the kernel for all machines) and DIR/generic.cpio.gz: the same with drivers for
#                          virtio-gpu, USB and sound
#   build.sh DIR debian    DIR/debian.qcow2: Debian 12 with systemd, sshd, nginx, sqlite, ftload; login root/root
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:?directory} what=${2:-tiny}
mkdir -p "$dir" && dir=$(cd "$dir" && pwd)
export SOURCE_DATE_EPOCH=1700000000 LC_ALL=C

say() { printf '%s\n' "guest: $*" >&2; }

ftload() {
    newer "$dir/ftload" "$here"/ftload*.rs && return
    rustc --edition 2021 -O -C target-feature=+crt-static -C strip=symbols -o "$dir/ftload.new" "$here/ftload.rs"
    mv "$dir/ftload.new" "$dir/ftload"
}

# kernel PACKAGE DIR: the kernel that a package of Debian's depends on, unpacked
kernel() {
    [ -e "$dir/$2/boot" ] && return
    say "fetching $1"
    mkdir -p "$dir/deb" && cd "$dir/deb"
    pkg=$(apt-cache depends "$1" | awk '/Depends: linux-image/{print $2; exit}')
    apt-get download -q "$pkg" >/dev/null
    rm -rf "$dir/$2.new" && dpkg-deb -x "$pkg"_*.deb "$dir/$2.new"
    rm -rf "${dir:?}/$2" && mv "$dir/$2.new" "$dir/$2"
}

# pack DIR FILE MODULE...: an initial RAM disk for the kernel in DIR
pack() {
    local from=$1 file=$2
    shift 2
    say "packing $file"
    root=$dir/root.$file && rm -rf "$root" && mkdir -p "$root"/{bin,dev,proc,sys,tmp,mnt,etc,lib/modules}
    cp "$(command -v busybox)" "$root/bin/busybox"
    cp "$dir/ftload" "$root/bin/"
    kver=$(ls "$dir/$from/lib/modules")
    src=$dir/$from/lib/modules/$kver dst=$root/lib/modules/$kver
    mkdir -p "$dst"
    cp "$src"/modules.{order,builtin,builtin.modinfo} "$dst/"
    [ -e "$src/modules.dep" ] || depmod -b "$dir/$from" "$kver"
    for m in "$@"; do
        { modprobe -S "$kver" -d "$dir/$from" --show-depends "$m" || true; } 2>/dev/null |
            awk '$1=="insmod"{print $2}'
    done | sort -u | while read -r ko; do
        rel=${ko#"$src"/}
        mkdir -p "$dst/$(dirname "$rel")" && cp "$ko" "$dst/$rel"
    done
    depmod -b "$root" "$kver"
    cp "$here/tiny-init" "$root/init" && chmod 755 "$root/init"
    (cd "$root" && find . | sort | cpio -o -H newc -R 0:0 --quiet --reproducible | gzip -9n) > "$dir/$file.new"
    mv "$dir/$file.new" "$dir/$file" && rm -rf "$root"
}

basic="ata_piix ata_generic sd_mod sr_mod virtio_pci virtio_blk virtio_net virtio_rng ext4 crc32c_generic"

tiny() {
    ftload
    if [ ! -e "$dir/vmlinuz" ]; then
        kernel linux-image-cloud-amd64 kernel
        cp "$dir"/kernel/boot/vmlinuz-* "$dir/vmlinuz.new" && mv "$dir/vmlinuz.new" "$dir/vmlinuz"
    fi
    pack kernel tiny.cpio.gz $basic
}

# The same with the kernel for all machines, which has drivers for screens, USB and sound.
generic() {
    ftload
    kernel linux-image-amd64 kernel-generic
    cp "$dir"/kernel-generic/boot/vmlinuz-* "$dir/generic-vmlinuz.new"
    mv "$dir/generic-vmlinuz.new" "$dir/generic-vmlinuz"
    pack kernel-generic generic.cpio.gz $basic virtio-gpu xhci-pci ehci-pci uhci-hcd usbhid hid-generic evdev \
        usb-storage uas snd-hda-intel snd-hda-codec-generic acpiphp shpchp pciehp
}

# newer FILE INPUT...: FILE exists and is newer than every input
newer() {
    local file=$1 input
    shift
    [ -e "$file" ] || return 1
    for input in "$@"; do [ "$file" -nt "$input" ] || return 1; done
}

debian() {
    ftload
    newer "$dir/debian.qcow2" "$here/build.sh" "$here/debian-customize" "$here/ftload.rs" && return
    uuid=f7f7f7f7-0000-4000-8000-000000000001
    root=$dir/rootfs
    if ! newer "$dir/rootfs.tar" "$here/build.sh" "$here/debian-customize" "$here/ftload.rs"; then
        say "installing Debian 12 into a directory (one to three minutes)"
        mmdebstrap --mode=root --format=tar --variant=minbase --include=systemd-sysv,udev,kmod,linux-image-amd64,linux-image-cloud-amd64,initramfs-tools,lz4,openssh-server,nginx-light,sqlite3,iproute2,curl,dbus,libpam-systemd,gcc,libc6-dev,xz-utils,openssl \
            --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
            --setup-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
            --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"; printf "MODULES=list\nCOMPRESS=lz4\n" > "$1/etc/initramfs-tools/conf.d/ftvm"; printf "%s\n" ata_piix ata_generic ahci sd_mod sr_mod virtio_pci virtio_blk virtio_scsi nvme ext4 crc32c_generic > "$1/etc/initramfs-tools/modules-ftvm"' \
            --customize-hook="copy-in $dir/ftload /usr/local/bin" \
            --customize-hook="$here/debian-customize \"\$1\" $uuid" \
            bookworm "$dir/rootfs.tar.new"
        mv "$dir/rootfs.tar.new" "$dir/rootfs.tar"
    fi
    say "making debian.qcow2"
    rm -rf "$root" && mkdir "$root" && tar -C "$root" -xf "$dir/rootfs.tar"
    img=$dir/debian.raw && rm -f "$img" && truncate -s 2G "$img"
    part=$dir/part.raw && rm -f "$part" && truncate -s 2047M "$part"
    mke2fs -q -t ext4 -O '^metadata_csum_seed,^orphan_file' -U $uuid -E hash_seed=$uuid,lazy_itable_init=0 -L root -d "$root" "$part"
    grub-mkimage -O i386-pc -o "$dir/core.img" -p '(hd0,msdos1)/boot/grub' biosdisk part_msdos ext2 normal linux serial terminal echo configfile search sleep reboot halt
    echo 'start=2048, type=83, bootable' | sfdisk -q "$img"
    dd if="$part" of="$img" bs=1M seek=1 conv=notrunc,sparse status=none
    dd if=/usr/lib/grub/i386-pc/boot.img of="$img" bs=440 count=1 conv=notrunc status=none
    dd if="$dir/core.img" of="$img" bs=512 seek=1 conv=notrunc status=none
    qemu-img convert -q -c -O qcow2 "$img" "$dir/debian.qcow2.new"
    mv "$dir/debian.qcow2.new" "$dir/debian.qcow2"
    cp "$root"/boot/vmlinuz-*-cloud-amd64 "$dir/debian-vmlinuz"
    cp "$root"/boot/initrd.img-*-cloud-amd64 "$dir/debian-initrd"
    rm -rf "$root" "$part" "$img"
}

case $what in
    tiny) tiny ;;
    generic) generic ;;
    debian) debian ;;
    all) tiny; generic; debian ;;
    *) say "unknown guest '$what': tiny, generic, debian or all"; exit 2 ;;
esac
