#!/usr/bin/env bash
# Installs what building and testing need beyond Rust and Go; safe to run again and again.
#
#   scripts/setup.sh [lab|bench|test]      default: test
#     lab     what `make lab` needs: ip, nft, iptables, wg
#     bench   that, and what `make bench` needs: iperf3, ethtool, python3, valgrind
#     test    what lab needs, and what the end-to-end tests and the real parts need
#
# As root on a system with apt it installs what is missing. Otherwise it says what is missing and
# fails.
set -euo pipefail

case ${1:-test} in lab | bench | test) what=${1:-test} ;; *) echo "usage: scripts/setup.sh [lab|bench|test]" >&2; exit 64 ;; esac

# PROGRAM:PACKAGE, as Debian and Ubuntu name them
programs=(ip:iproute2 bridge:iproute2 nft:nftables iptables:iptables wg:wireguard-tools
  ping:iputils-ping sysctl:procps cc:gcc)
[[ $what != bench ]] || programs+=(iperf3:iperf3 ethtool:ethtool python3:python3 valgrind:valgrind)
[[ $what != test ]] || programs+=(iptables-legacy:iptables conntrack:conntrack tcpdump:tcpdump iperf3:iperf3
  ethtool:ethtool openssl:openssl flock:util-linux /usr/lib/cni/bridge:containernetworking-plugins)

# Programs for administrators are not on every user's path.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing=() names=()
for entry in "${programs[@]}"; do
  program=${entry%%:*} package=${entry##*:}
  command -v "$program" >/dev/null && continue
  # CNI plugins have no agreed place.
  [[ $program = */cni/bridge && -x /opt/cni/bin/bridge ]] && continue
  names+=("$(basename "$program")")
  [[ " ${missing[*]-} " = *" $package "* ]] || missing+=("$package")
done

if [[ ${#missing[@]} -gt 0 ]]; then
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "setup: missing: ${names[*]}; install (Debian's names): ${missing[*]}" >&2
    exit 1
  fi
  echo "setup: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

command -v cargo >/dev/null || { echo "setup: Rust is missing: https://rustup.rs" >&2; exit 1; }
if [[ $what != lab ]]; then
  command -v go >/dev/null || { echo "setup: Go is missing: https://go.dev/dl (1.26 or newer)" >&2; exit 1; }
fi
echo "setup: all there"
