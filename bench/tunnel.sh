#!/usr/bin/env bash
# Compares tunnels in userspace on this machine: both ends of each in two network namespaces, one
# after the other within each repetition, so that ratios hold although the load of the machine changes.
#
#   bench/tunnel.sh [-r REPETITIONS=5] [-t SECONDS=3] [-m MODES=veth,nic,nogro] [-i NAMES] [-T TESTS]
#                   [-o RESULTS.jsonl]            runs, and prints a report in Markdown
#   bench/tunnel.sh report RESULTS.jsonl          prints it again
#
# NAMES out of selvedge,wireguard-go,tailscale,boringtun,gotatun (default: those that are built; see
# peers.sh), and LABEL=PROGRAM for another build of selvedge, to compare the two. TESTS out of
# ping,tcp1,tcp1r,tcp4,bidir,load,udp64,rate64,rss (default: all with veth; ping,tcp1,tcp1r,tcp4,bidir,
# rate64 with the other modes).
#
# MODES, the link between the namespaces:
#   veth    bundles of datagrams cross it as they are, as within one host
#   nic     the kernel cuts bundles up and joins them again on receipt, as a good network card does
#   nogro   every datagram arrives on its own, the worst case
#
# A result is one JSON object per line: {tunnel, mode, repetition, metric, value}. Metrics end in
# their unit; *_cpu_s_per_gb is processor time of both daemons per 10^9 bytes carried. The metrics of
# the tunnel `limit` are what no tunnel on this machine can avoid, see README.md.
# Needs root, ip, wg, ethtool, iperf3, ping and python3. Nothing leaves the namespaces.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
bin=${SELVEDGE_CACHE:-$HOME/.cache/selvedge}/bin
report() { python3 "$here/report.py" "$1"; }
if [[ ${1:-} = report ]]; then report "$2"; exit; fi

repetitions=5 seconds=3 modes=veth,nic,nogro names= out= asked=
while getopts r:t:m:i:T:o: option; do
  case $option in
    r) repetitions=$OPTARG ;; t) seconds=$OPTARG ;; m) modes=$OPTARG ;; i) names=$OPTARG ;;
    T) asked=$OPTARG ;; o) out=$OPTARG ;; *) sed -n '2,24p' "$0" >&2; exit 64 ;;
  esac
done
[[ $(id -u) = 0 ]] || { echo "bench/tunnel.sh needs root, because it makes network namespaces" >&2; exit 1; }
missing=
for program in ip wg ethtool iperf3 ping python3; do command -v $program >/dev/null || missing+=" $program"; done
[[ -z $missing ]] || { echo "bench: missing:$missing (scripts/setup.sh bench installs them)" >&2; exit 1; }

declare -A command=(
  [selvedge]="$here/../target/release/selvedge tunnel {}"
  [wireguard-go]="env WG_PROCESS_FOREGROUND=1 LOG_LEVEL=error $bin/wireguard-go -f {}"
  [tailscale]="env WG_PROCESS_FOREGROUND=1 LOG_LEVEL=error $bin/tailscale-wireguard-go -f {}"
  [boringtun]="$bin/boringtun-cli -f --disable-drop-privileges {}"
  [gotatun]="$bin/gotatun -f --disable-drop-privileges {}"
)
for name in ${names//,/ }; do
  if [[ $name = *=* ]]; then
    command[${name%%=*}]="${name#*=} tunnel {}"
    names=${names/"$name"/${name%%=*}}
  fi
done
if [[ -z $names ]]; then
  for name in selvedge wireguard-go tailscale boringtun gotatun; do
    program=$(tr ' ' '\n' <<<"${command[$name]}" | grep -m1 ^/)
    [[ -x $program ]] && names+=$name, || echo "bench: $name is not built, and left out" >&2
  done
fi
out=${out:-$(mktemp --suffix .jsonl)}

# Unique, so that two runs do not meet.
prefix=b$(printf %x $$)
left=$prefix-l right=$prefix-r
dir=$(mktemp -d)
pids=()
stop() { # PID...
  local pid
  for pid; do kill "$pid" 2>/dev/null || true; done
  for pid; do wait "$pid" 2>/dev/null || true; done
}
clean() {
  stop "${pids[@]}"
  ip netns del $left 2>/dev/null || true
  ip netns del $right 2>/dev/null || true
  rm -rf "$dir" /var/run/wireguard/"$prefix"{a,b}.sock
}
trap clean EXIT
trap 'exit 130' INT TERM

emit() { # METRIC VALUE
  printf '{"tunnel":"%s","mode":"%s","repetition":%s,"metric":"%s","value":%s}\n' \
    "$name" "$mode" "$repetition" "$1" "$2" >>"$out"
}
in_left() { ip netns exec $left "$@"; }
in_right() { ip netns exec $right "$@"; }
wants() { [[ ,$tests, = *,$1,* ]]; }

link() { # the two namespaces and the wire between them
  ip netns del $left 2>/dev/null || true
  ip netns del $right 2>/dev/null || true
  ip netns add $left
  ip netns add $right
  ip link add wire mtu 1500 netns $left type veth peer name wire mtu 1500 netns $right
  ip -n $left address add 192.0.2.1/30 dev wire
  ip -n $right address add 192.0.2.2/30 dev wire
  local space
  for space in $left $right; do
    ip -n $space link set lo up
    ip -n $space link set wire up
    case $mode in
      nic) ip netns exec $space ethtool -K wire tx-udp-segmentation off tso off gro on ;;
      nogro) ip netns exec $space ethtool -K wire tx-udp-segmentation off ;;
    esac >/dev/null
  done
}

processor_ns() { # of all threads of the daemons
  local pid file sum=0 time
  for pid in "${daemons[@]}"; do
    for file in /proc/"$pid"/task/*/schedstat; do
      read -r time _ <"$file" && sum=$((sum + time))
    done 2>/dev/null || true
  done
  echo $sum
}

machine_ticks() { # of all processors, but for what they idled
  awk '$1 == "cpu" { print $2 + $3 + $4 + $7 + $8 }' /proc/stat
}

iperf() { # METRIC IPERF3-FLAGS...
  local metric=$1 before after machine
  shift
  before=$(processor_ns) machine=$(machine_ticks)
  timeout $((seconds + 20)) ip netns exec $left iperf3 -c "$target" -t "$seconds" -J "$@" >"$dir/iperf" 2>/dev/null || true
  after=$(processor_ns) machine=$(($(machine_ticks) - machine))
  python3 - "$dir/iperf" "$metric" $((after - before)) "$machine" "$(getconf CLK_TCK)" <<'PYTHON' | while read -r key value; do emit "$key" "$value"; done
import json, sys
path, metric, cpu = sys.argv[1], sys.argv[2], int(sys.argv[3]) / 1e9
machine = int(sys.argv[4]) / int(sys.argv[5])
try:
    end = json.load(open(path))["end"]
    if metric.startswith("tcp"):
        got = [end[key] for key in ("sum_received", "sum_received_bidir_reverse") if key in end]
        moved = sum(part["bytes"] for part in got)
        print(metric + "_gbit_per_s", round(sum(part["bits_per_second"] for part in got) / 1e9, 4))
        if moved and metric == "tcp1":
            print(metric + "_machine_s_per_gb", round(machine / (moved / 1e9), 4))
        if moved and cpu:
            print(metric + "_cpu_s_per_gb", round(cpu / (moved / 1e9), 4))
    else:
        total = end["sum"]
        got = total["packets"] - total["lost_packets"]
        print(metric + "_received_kpps", round(got / total["seconds"] / 1e3, 3))
        if got and cpu:
            print(metric + "_cpu_us_per_packet", round(cpu * 1e6 / got, 4))
except Exception:
    print(metric + "_failed", 1)
PYTHON
}

rtts() { # METRIC, from ping's output
  python3 - "$1" "$dir/ping" <<'PYTHON' | while read -r key value; do emit "$key" "$value"; done
import re, sys
times = sorted(float(time) * 1000 for time in re.findall(r"time=([\d.]+)", open(sys.argv[2]).read()))
if times:
    print(sys.argv[1] + "_p50_us", round(times[len(times) // 2], 1))
    print(sys.argv[1] + "_p99_us", round(times[min(len(times) - 1, int(len(times) * 0.99))], 1))
PYTHON
}

resident_kib() { # the larger of the daemons
  local pid
  for pid in "${daemons[@]}"; do awk '$1 == "VmRSS:" { print $2 }' "/proc/$pid/status"; done | sort -n | tail -1
}

measure() {
  local server loader
  # Not by the function: its shell would be what is stopped, and not the server.
  ip netns exec $right iperf3 -s >/dev/null 2>&1 &
  server=$!
  pids+=($server)
  if ! in_left ping -q -c 3 -i 0.2 -W 10 "$target" >/dev/null; then
    emit failed 1
    stop $server
    return
  fi
  if wants rss && [[ ${#daemons[@]} -gt 0 ]]; then emit rss_idle_kib "$(resident_kib)"; fi
  if wants ping; then
    in_left ping -c 100 -i 0.01 "$target" >"$dir/ping" || true
    rtts rtt_idle
  fi
  wants tcp1 && iperf tcp1
  wants tcp1r && iperf tcp1_reverse -R
  wants tcp4 && iperf tcp4 -P 4
  wants bidir && iperf tcp_both_ways --bidir
  if wants load; then
    ip netns exec $left iperf3 -c "$target" -t $((seconds + 1)) >/dev/null 2>&1 &
    loader=$!
    sleep 0.7
    in_left ping -c $((seconds * 40)) -i 0.02 -w "$seconds" "$target" >"$dir/ping" 2>/dev/null || true
    rtts rtt_loaded
    wait $loader || true
  fi
  wants udp64 && iperf flood64 -u -b 0 -l 64
  wants rate64 && iperf rate64 -u -b 20480000 -l 64
  if wants rss && [[ ${#daemons[@]} -gt 0 ]]; then emit rss_loaded_kib "$(resident_kib)"; fi
  stop $server
}

tunnel() { # NAME: both ends, configured, measured, stopped
  local name=$1 a=${prefix}a b=${prefix}b key_a key_b i
  daemons=()
  link
  # Not every tunnel removes its socket, and one that is left over says that the next is ready.
  rm -f "/var/run/wireguard/$a.sock" "/var/run/wireguard/$b.sock"
  if [[ $name = none ]]; then
    target=192.0.2.2
    measure
    return
  fi
  key_a=$(wg genkey) key_b=$(wg genkey)
  (
    umask 077
    printf '[Interface]\nPrivateKey=%s\nListenPort=51820\n[Peer]\nPublicKey=%s\nEndpoint=192.0.2.2:51820\nAllowedIPs=10.77.0.2/32\n' \
      "$key_a" "$(wg pubkey <<<"$key_b")" >"$dir/a"
    printf '[Interface]\nPrivateKey=%s\nListenPort=51820\n[Peer]\nPublicKey=%s\nEndpoint=192.0.2.1:51820\nAllowedIPs=10.77.0.1/32\n' \
      "$key_b" "$(wg pubkey <<<"$key_a")" >"$dir/b"
  )
  # Unquoted: a command and its arguments.
  ip netns exec $left ${command[$name]//\{\}/$a} >"$dir/log.a" 2>&1 &
  daemons+=($!)
  ip netns exec $right ${command[$name]//\{\}/$b} >"$dir/log.b" 2>&1 &
  daemons+=($!)
  pids+=("${daemons[@]}")
  for i in {1..100}; do
    [[ -S /var/run/wireguard/$a.sock && -S /var/run/wireguard/$b.sock ]] && break
    sleep 0.05
  done
  if wg setconf $a "$dir/a" && wg setconf $b "$dir/b"; then
    ip -n $left address add 10.77.0.1/24 dev $a
    ip -n $right address add 10.77.0.2/24 dev $b
    ip -n $left link set $a mtu 1420 up
    ip -n $right link set $b mtu 1420 up
    target=10.77.0.2
    measure
  else
    emit failed 1
    cat "$dir/log.a" "$dir/log.b" >&2
  fi
  stop "${daemons[@]}"
  daemons=()
}

limit() { # what no tunnel can avoid, measured on this machine; bare TCP is measured as `none`
  local name=limit mode=veth
  local program
  # Not built here, because that takes minutes of all processors.
  program=$(find "$here/../target/release/deps" "$bin" -name 'aead*' -type f -executable 2>/dev/null | head -1)
  if [[ -z $program ]]; then
    echo "bench: the limit of the machine is left out: build it with cargo bench --no-run --bench aead" >&2
    return 0
  fi
  "$program" |
    python3 -c 'import json, sys; [print(*pair) for pair in json.loads(sys.stdin.read() or "{}").items()]' |
    while read -r key value; do emit "$key" "$value"; done
}

for ((repetition = 1; repetition <= repetitions; repetition++)); do
  case ,$modes, in *,veth,*) limit ;; esac
  for mode in ${modes//,/ }; do
    tests=$asked
    if [[ -z $tests ]]; then
      tests=ping,tcp1,tcp1r,tcp4,bidir,rate64
      [[ $mode != veth ]] || tests+=,load,udp64,rss
    fi
    for name in none ${names//,/ }; do tunnel "$name"; done
    echo "bench: repetition $repetition of $repetitions, $mode" >&2
  done
done
report "$out"
echo "bench: the results are in $out" >&2
