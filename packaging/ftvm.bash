# bash completion of ftvm; made by "cargo run --example generate": do not edit.
_ftvm() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    case $prev in
        -machine | -M) COMPREPLY=($(compgen -W 'pc pc-i440fx-7.2 q35 pc-q35-7.2 none help' -- "$cur")) ;;
        -device) COMPREPLY=($(compgen -W 'ICH9-LPC PIIX4_PM VGA e1000 ide-cd ide-hd isa-debug-exit isa-debugcon isa-serial pc-testdev pcie-root-port piix3-usb-uhci ich9-usb-uhci1 ich9-usb-uhci2 ich9-usb-uhci3 ich9-usb-ehci1 ich9-usb-ehci2 usb-ehci qemu-xhci ich9-intel-hda intel-hda hda-duplex hda-micro hda-output scsi-cd scsi-hd usb-storage usb-kbd usb-mouse usb-tablet virtconsole virtio-balloon-pci virtio-blk-pci virtio-gpu-pci virtio-net-pci virtio-rng-pci virtio-scsi-pci virtio-serial-pci virtio-vga virtserialport pvpanic help' -- "$cur")) ;;
        -accel) COMPREPLY=($(compgen -W 'tcg kvm kvm:tcg help' -- "$cur")) ;;
        -cpu) COMPREPLY=($(compgen -W "$("$1" -cpu help 2>/dev/null | sed -n 's/^x86 \([^ ]*\).*/\1/p') help" -- "$cur")) ;;
        -ft) COMPREPLY=($(compgen -W 'primary backup,peer=' -- "$cur")) ;;
        -display) COMPREPLY=($(compgen -W 'none vnc=' -- "$cur")) ;;
        -d) COMPREPLY=($(compgen -W 'ft disk net cpu all' -- "$cur")) ;;
        -hda | -hdb | -hdc | -hdd | -cdrom | -kernel | -initrd | -bios | -L | -pidfile | -D) COMPREPLY=($(compgen -f -- "$cur")) ;;
        -machine | -M | -cpu | -accel | -smp | -m | -boot | -name | -uuid | -device | -global | -object | -rtc | -icount | -hda | -hdb | -hdc | -hdd | -cdrom | -drive | -blockdev | -netdev | -nic | -net | -chardev | -serial | -monitor | -qmp | -qmp-pretty | -mon | -debugcon | -kernel | -initrd | -append | -bios | -L | -display | -vnc | -vga | -incoming | -loadvm | -gdb | -pidfile | -D | -d | -sandbox | -overcommit | -audiodev | -msg | -ft) COMPREPLY=() ;;
        *)
            if [[ $cur == -* ]]; then
                COMPREPLY=($(compgen -W '-help -h -version -machine -M -cpu -accel -enable-kvm -smp -m -boot -name -uuid -device -global -object -rtc -icount -hda -hdb -hdc -hdd -cdrom -drive -blockdev -snapshot -netdev -nic -net -chardev -serial -monitor -qmp -qmp-pretty -mon -debugcon -kernel -initrd -append -bios -L -nographic -display -vnc -vga -no-reboot -no-shutdown -incoming -loadvm -s -gdb -S -daemonize -pidfile -D -d -nodefaults -no-user-config -no-hpet -sandbox -overcommit -audiodev -msg -ft' -- "$cur"))
            else
                COMPREPLY=($(compgen -f -- "$cur"))
            fi
            ;;
    esac
}
complete -o filenames -o bashdefault -F _ftvm ftvm
