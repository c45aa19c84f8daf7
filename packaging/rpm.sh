#!/bin/sh
# Makes build/ftvm-VERSION-1.x86_64.rpm of the release build, and shows what rpmlint says of it.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/Cargo.toml" | head -n 1)
work=$here/build/rpm
rm -rf "$work" && mkdir -p "$work"
date=$(LC_ALL=C date -u +'%a %b %d %Y')
sed -e "s/@VERSION@/$version/; s/@DATE@/$date/; s|@SOURCE@|$here|" "$here/packaging/rpm/ftvm.spec.in" > "$work/ftvm.spec"
rpmbuild -bb --quiet --define "_topdir $work" --define "_rpmdir $work/out" "$work/ftvm.spec"
mv "$work"/out/*/ftvm-"$version"-1.*.rpm "$here/build/"
echo build/ftvm-"$version"-1.*.rpm
rpmlint -c "$here/packaging/rpm/rpmlint.toml" "$here/build/ftvm-$version-1.x86_64.rpm"
