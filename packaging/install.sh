#!/bin/sh
# Lays the built program and its files out as they are installed: install.sh DESTDIR
set -eu
dest=${1:?directory} here=$(cd "$(dirname "$0")/.." && pwd)
put() { install -D -m "$1" "$2" "$dest$3"; }
for program in ftvm ftvm-lock; do
    put 755 "$here/target/release/$program" "/usr/bin/$program"
    strip --strip-unneeded --remove-section=.comment --remove-section=.note "$dest/usr/bin/$program"
done
for page in "$here"/man/*.[1-8]; do
    name=${page##*/}
    put 644 "$page" "/usr/share/man/man${name##*.}/$name"
    gzip -9n "$dest/usr/share/man/man${name##*.}/$name"
done
put 644 "$here/packaging/ftvm.bash" /usr/share/bash-completion/completions/ftvm
put 644 "$here/packaging/apparmor/ftvm" /etc/apparmor.d/abstractions/ftvm
