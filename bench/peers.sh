#!/usr/bin/env bash
# Builds the tunnels that bench/tunnel.sh compares with, from their published sources.
#
#   bench/peers.sh        wireguard-go and Tailscale's fork of it (Go modules), boringtun-cli and
#                         gotatun-cli (published crates)
#
# They go to ${SELVEDGE_CACHE:-$HOME/.cache/selvedge}/bin; what is there is not built again.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
cache=${SELVEDGE_CACHE:-$HOME/.cache/selvedge}
bin=$cache/bin
tailscale=v0.0.0-20260928213032-417aef361226
boringtun=0.7.1
gotatun=0.10.2

mkdir -p "$bin"
"$here"/../lab/build.sh wireguard-go

if [[ ! -x $bin/tailscale-wireguard-go ]]; then
  tmp=$(mktemp -d "$bin/.tmp.XXXXXX")
  trap 'rm -rf "$tmp"' EXIT
  (cd / && CGO_ENABLED=0 GOBIN=$tmp go install "github.com/tailscale/wireguard-go@$tailscale")
  mv "$tmp/wireguard-go" "$bin/tailscale-wireguard-go"
fi

crate() { # CRATE VERSION PROGRAM
  [[ -x $bin/$3 ]] && return
  # Outside of any workspace, whose toolchain and lock file are none of theirs.
  (cd / && cargo install --quiet --locked --root "$cache" "$1@$2")
}
crate boringtun-cli "$boringtun" boringtun-cli
crate gotatun-cli "$gotatun" gotatun
ls -l "$bin"/{wireguard-go,tailscale-wireguard-go,boringtun-cli,gotatun}
