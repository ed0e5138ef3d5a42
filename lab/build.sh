#!/usr/bin/env bash
# Builds the real programs that the lab and the end-to-end tests run, from Go modules fetched the
# way `go env GOPROXY` says. Nothing here is ours except controlplane/main.go, which dispatches.
#
#   lab/build.sh [PART...]      parts (default: all three):
#     labcp          etcd, kube-apiserver, controller-manager, scheduler, kube-proxy and kubectl
#     flanneld       flannel's daemon
#     wireguard-go   WireGuard in userspace, the reference peer for interoperability
#
# The programs go to ${SELVEDGE_CACHE:-$HOME/.cache/selvedge}/bin. A part is skipped when it is
# there and was built from the same inputs, so keeping that directory makes this free; keeping
# GOCACHE and GOMODCACHE makes it cheap. From nothing, two cores need about six minutes.
# Needs Go 1.26 (Go fetches that toolchain itself where GOTOOLCHAIN allows it) and, for flanneld,
# a C compiler.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
bin=${SELVEDGE_CACHE:-$HOME/.cache/selvedge}/bin
wireguard_go=v0.0.0-20260522210424-ecfc5a8d5446
# Only what changes the result may be an input: GOFLAGS of the caller must not.
export CGO_ENABLED=0 GOFLAGS='-trimpath -buildvcs=false'
# No debugging information: a fifth less to compile, write and link.
lean=-gcflags=all=-dwarf=false

die() { echo "lab/build.sh: $*" >&2; exit 1; }

command -v go >/dev/null || die "Go is missing: install Go 1.26 or newer (https://go.dev/dl)"
mkdir -p "$bin"
bin=$(cd "$bin" && pwd)
# Two builds at once, by two test runs, would waste each other's time.
exec 9>"$bin/.lock"
flock 9

version_of() { (cd "$here/$1" && go list -m -f '{{.Version}}' "$2"); } # MODULE-DIRECTORY MODULE

inputs() { # PART: all that the part is built from, as one checksum
  {
    (cd "$here/controlplane" && go version)
    case $1 in
      labcp) cat "$here"/controlplane/{go.mod,go.sum,main.go} ;;
      flanneld) cat "$here"/flannel/{go.mod,go.sum} ;;
      wireguard-go) echo "$wireguard_go" ;;
    esac
  } | sha256sum | cut -d' ' -f1
}

labcp() {
  local version package=k8s.io/component-base/version
  version=$(version_of controlplane k8s.io/kubernetes)
  (cd "$here/controlplane" && go build "$lean" -o "$bin/labcp.new" -ldflags \
    "-s -w -X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=$(cut -d. -f2 <<<"$version")" .)
}

flanneld() { # its udp backend needs cgo; the tags leave labcp's compiled packages usable
  local module=github.com/flannel-io/flannel
  (cd "$here/flannel" && CGO_ENABLED=1 go build -tags netgo,osusergo "$lean" -o "$bin/flanneld.new" \
    -ldflags "-s -w -X $module/pkg/version.Version=$(version_of flannel $module)" $module)
}

wireguard-go() {
  local tmp
  tmp=$(mktemp -d "$bin/.tmp.XXXXXX")
  (cd / && GOBIN=$tmp go install "$lean" -ldflags '-s -w' "golang.zx2c4.com/wireguard@$wireguard_go")
  mv "$tmp"/* "$bin/wireguard-go.new"
  rmdir "$tmp"
}

[[ $# -gt 0 ]] || set -- labcp flanneld wireguard-go
for part; do
  case $part in labcp | flanneld | wireguard-go) ;; *) die "no part is called $part: labcp, flanneld, wireguard-go" ;; esac
  sum=$(inputs "$part")
  if [[ -x $bin/$part && $(cat "$bin/.$part.inputs" 2>/dev/null) == "$sum" ]]; then
    echo "lab/build.sh: $part is up to date"
    continue
  fi
  echo "lab/build.sh: building $part"
  start=$SECONDS
  "$part"
  mv "$bin/$part.new" "$bin/$part"
  echo "$sum" > "$bin/.$part.inputs"
  echo "lab/build.sh: $part took $((SECONDS - start)) s, $(stat -c %s "$bin/$part") bytes"
done
