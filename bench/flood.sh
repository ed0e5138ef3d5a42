#!/usr/bin/env bash
# What a tunnel carries under 100,000 handshake initiations per second from strangers, sent on the same
# CPUs: prints one line for a flood from one address and one for 65,536 made-up ones. Needs root.
set -euo pipefail

cd "$(dirname "$(readlink -f "$0")")/.."
exec cargo test --quiet --release --test tunnel -- --nocapture handshake_flood
