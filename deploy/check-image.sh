#!/usr/bin/env bash
# Builds the image's file system as deploy/Dockerfile does, without a container engine, and runs the
# lab with agents inside it: read-only, with the DaemonSet's capabilities and volumes only, without
# privilege escalation. Needs root; `make image-check`.
#
# nft and its libraries are this system's, not Alpine's; everything else is as in the image.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

target=$(uname -m)-unknown-linux-musl
targets=${CARGO_TARGET_DIR:-$PWD/target}
[[ $(id -u) = 0 ]] || { echo "check-image: this needs root, because the lab does" >&2; exit 1; }
command -v musl-gcc >/dev/null || { echo "check-image: musl-gcc is missing: install musl-tools" >&2; exit 1; }
rustup target add "$target" >/dev/null 2>&1 || true

RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$PWD=. --remap-path-prefix=$HOME/.cargo=cargo" \
  cargo build --quiet --locked --release --target "$target" --package selvedge --bin selvedge
cargo build --quiet --workspace --bins
cargo build --quiet --example lab

image=$(mktemp -d)
trap 'rm -rf "$image" "$image.run"' EXIT
mkdir -p "$image/usr/sbin" "$image/usr/bin"
nft=$(command -v nft)
cp "$nft" "$image/usr/sbin/nft"
ldd "$nft" | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^\//) print $i }' | sort -u |
  while read -r lib; do mkdir -p "$image$(dirname "$lib")"; cp -L "$lib" "$image$lib"; done
chroot "$image" /usr/sbin/nft --version
cp "$targets/$target/release/selvedge" "$image/usr/bin/selvedge"
if ldd "$image/usr/bin/selvedge" 2>&1 | grep -q '=>'; then
  echo "check-image: the program is not static" >&2; exit 1
fi
size() { awk "BEGIN { printf \"%.1f MiB\", $1 / 1048576 }"; }
echo "check-image: $(size "$(du -sb "$image" | cut -f1)") in all, $(size "$(tar -C "$image" -c . | gzip -9 | wc -c)") compressed;" \
  "the program $(size "$(stat -c %s "$image/usr/bin/selvedge")")"

cat >"$image.run" <<END
#!/bin/sh
PATH=/usr/bin:/usr/sbin exec "$targets/debug/selvedge-lab-confine" "$image" "$PWD/deploy/selvedge-k3s.yaml" /usr/bin/selvedge "\$@"
END
chmod +x "$image.run"
"$image.run" agent --help >/dev/null
# The init container, on a host whose /etc and /var/lib are empty.
output=$(unshare --mount sh -c "mount -t tmpfs none /etc && mount -t tmpfs none /var/lib &&
  exec '$image.run' guard --install --unit=k3s.service --unit=k3s-agent.service")
for path in /var/lib/selvedge/bin/selvedge /etc/systemd/system/k3s{,-agent}.service.d/50-selvedge-guard.conf; do
  grep -qx "wrote $path" <<<"$output" || { echo "check-image: $path was not installed: $output" >&2; exit 1; }
done
SELVEDGE_BIN=$image.run "$targets/debug/examples/lab" "$@"
echo "check-image: the lab works with agents inside the image"
