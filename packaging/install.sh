#!/bin/sh
# Lays the built program and its files out as they are installed: install.sh DESTDIR
set -eu
dest=${1:?directory} here=$(cd "$(dirname "$0")/.." && pwd)
put() { install -D -m "$1" "$2" "$dest$3"; }
for program in bin/ftvm bin/ftvm-lock bin/ftctl sbin/ftvmd; do
    put 755 "$here/target/release/${program##*/}" "/usr/$program"
    strip --strip-unneeded --remove-section=.comment --remove-section=.note "$dest/usr/$program"
done
for page in "$here"/man/*.[1-8]; do
    name=${page##*/}
    put 644 "$page" "/usr/share/man/man${name##*.}/$name"
    gzip -9n "$dest/usr/share/man/man${name##*.}/$name"
done
put 644 "$here/packaging/ftvm.bash" /usr/share/bash-completion/completions/ftvm
put 644 "$here/packaging/apparmor/ftvm" /etc/apparmor.d/abstractions/ftvm
put 644 "$here/packaging/ftctl.bash" /usr/share/bash-completion/completions/ftctl
put 644 "$here/packaging/ftctl.zsh" /usr/share/zsh/vendor-completions/_ftctl
put 644 "$here/packaging/ftctl.fish" /usr/share/fish/vendor_completions.d/ftctl.fish
for interface in "$here"/packaging/dbus/org.ftvm.*1.xml; do
    put 644 "$interface" "/usr/share/dbus-1/interfaces/${interface##*/}"
done
put 644 "$here/packaging/dbus/org.ftvm.conf" /usr/share/dbus-1/system.d/org.ftvm.conf
put 644 "$here/packaging/dbus/org.ftvm.service" /usr/share/dbus-1/system-services/org.ftvm.service
put 644 "$here/packaging/dbus/org.ftvm.policy" /usr/share/polkit-1/actions/org.ftvm.policy
put 644 "$here/packaging/systemd/ftvmd.service" /usr/lib/systemd/system/ftvmd.service
put 644 "$here/packaging/systemd/tmpfiles.conf" /usr/lib/tmpfiles.d/ftvm.conf
put 644 "$here/packaging/systemd/sysusers.conf" /usr/lib/sysusers.d/ftvm.conf
put 755 "$here/packaging/ocf/ftvm" /usr/lib/ocf/resource.d/ftvm/ftvm
