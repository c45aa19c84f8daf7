#!/bin/sh
# Makes build/ftvm_VERSION-1_ARCH.deb of the release build, and shows what lintian says of it.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/Cargo.toml" | head -n 1)
arch=$(dpkg --print-architecture) work=$here/build/deb
rm -rf "$work" && mkdir -p "$work/tree/DEBIAN" "$work/debian"
tree=$work/tree
"$here/packaging/install.sh" "$tree"
doc=$tree/usr/share/doc/ftvm
install -D -m 644 "$here/packaging/debian/copyright" "$doc/copyright"
install -m 644 "$here/README.md" "$doc/README.md"
cp "$here/CHANGELOG.md" "$doc/changelog" && gzip -9n "$doc/changelog"
printf 'ftvm (%s-1) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- ftvm developers <developers@ftvm.org>  %s\n' \
    "$version" "$(LC_ALL=C date -u -R -r "$here/CHANGELOG.md")" | gzip -9n > "$doc/changelog.Debian.gz"
install -D -m 644 "$here/packaging/debian/lintian-overrides" "$tree/usr/share/lintian/overrides/ftvm"
echo /etc/apparmor.d/abstractions/ftvm > "$tree/DEBIAN/conffiles"
install -m 755 "$here/packaging/debian/postinst" "$here/packaging/debian/prerm" \
    "$here/packaging/debian/postrm" "$tree/DEBIAN/"
# dpkg-shlibdeps wants a source package around it.
printf 'Source: ftvm\n\nPackage: ftvm\nArchitecture: any\n' > "$work/debian/control"
depends=$(cd "$work" && dpkg-shlibdeps -O -e tree/usr/bin/ftvm -e tree/usr/sbin/ftvmd -e tree/usr/bin/ftctl 2>/dev/null | sed 's/^shlibs:Depends=//')
size=$(du -k -s "$tree/usr" | cut -f1)
sed -e "s/@VERSION@/$version/; s/@ARCH@/$arch/; s/@SIZE@/$size/; s/@DEPENDS@/$depends/" \
    "$here/packaging/debian/control.in" > "$tree/DEBIAN/control"
(cd "$tree" && find usr etc -type f -print0 | sort -z | xargs -0 md5sum > DEBIAN/md5sums)
chmod -R u=rwX,go=rX "$tree"
dpkg-deb --root-owner-group --build "$tree" "$here/build/ftvm_${version}-1_$arch.deb" >/dev/null
echo "build/ftvm_${version}-1_$arch.deb"
lintian --fail-on error,warning "$here/build/ftvm_${version}-1_$arch.deb"
