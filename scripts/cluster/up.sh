#!/usr/bin/env bash
# Makes this machine a node of a Ray cluster for `baton serve --address`; docs/cluster.md tells the whole way.
#   up.sh head [--port 6379] [--ip ADDRESS] [--foreground] [-- ARGUMENTS OF ray start]
#   up.sh join HOST:PORT     [--ip ADDRESS] [--foreground] [-- ARGUMENTS OF ray start]
# Returns when the node is up. A keeper stays behind that starts Ray again when it ends; down.sh ends both.
# With --foreground this is the keeper itself: for systemd or a container.
#   BATON_VENV=/path          uses that environment instead of building .venv
#   BATON_CLUSTER_DIR=/path   where the keeper's log and process id lie; default .run/cluster
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
state=${BATON_CLUSTER_DIR:-$root/.run/cluster}
log=$state/node.log
most_pause_s=30

say() { echo "up.sh: $*" >&2; }
die() { say "$*"; exit 1; }
usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

role=${1:-}
shift || usage
case $role in
  head) address= ;;
  join)
    address=${1:-}
    [[ $address =~ ^[^:]+:[0-9]+$ ]] || die "join: give HOST:PORT of the head, which its up.sh printed"
    shift
    ;;
  *) usage ;;
esac
given=("$@")
port=6379 ip= foreground=
while [ $# -gt 0 ]; do
  case $1 in
    --port=* | --ip=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --port) port=${2:?--port needs a number}; [ $role = head ] || die "--port: only for the head"; shift 2 ;;
    --ip) ip=${2:?--ip needs an address}; shift 2 ;;
    --foreground) foreground=1; shift ;;
    --) shift; break ;;
    *) die "unknown option $1; options of ray start come after --" ;;
  esac
done

# One secret for the whole cluster: who has it may run anything on every node.
token=$(realpath -m "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}")
prepare_token() {
  [ -s "$token" ] && return
  [ $role = head ] || die "no token at $token: copy it from the head with the command that its up.sh printed"
  (
    umask 077
    mkdir -p "$(dirname "$token")"
    od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token"
  )
  say "made the cluster's token: $token"
}

# UCX looks at every interface of the host. Without RDMA, one is right: the one by which Ray reaches the other nodes.
prepare_ucx() {
  local towards device
  [ -z "$(ls /sys/class/infiniband 2>/dev/null)" ] || return 0
  export UCX_TCP_TX_SEG_SIZE=${UCX_TCP_TX_SEG_SIZE:-64k}
  [ -z "${UCX_NET_DEVICES:-}" ] && command -v ip >/dev/null || return 0
  if [ -n "$ip" ]; then
    device=$(ip -o addr show to "$ip" | awk '{print $2; exit}') || return 0
  else
    towards=${address%:*}
    towards=$(getent ahostsv4 "${towards:-8.8.8.8}" | awk '{print $1; exit}') || return 0
    device=$(ip -o route get "$towards" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || return 0
  fi
  # lo: the node reaches the head on this same machine, so there is nothing to choose.
  if [ -n "$device" ] && [ "$device" != lo ]; then export UCX_NET_DEVICES=$device; fi
}

# Also the mark by which all that Ray started is found again: its agents and workers may outlive it.
mark=node-$$-$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
start_ray() {
  local arguments=(--block --log-style=record --log-color=false --disable-usage-stats)
  # Nothing is put into the object store; without a bound Ray sets a third of the memory aside.
  arguments+=(--object-store-memory=268435456)
  if [ -n "$ip" ]; then arguments+=(--node-ip-address="$ip"); fi
  if [ $role = head ]; then
    # Ray notices a lost machine after a minute unless told otherwise; here after five to ten seconds. Workers at nice 15,
    # its default, would let any other process of the machine stop the tokens.
    arguments+=(--head --port="$port" --system-config='{"health_check_initial_delay_ms": 1000,
      "health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 5,
      "worker_niceness": 0}')
  else
    arguments+=(--address="$address")
  fi
  # SPT_NOENV: Ray's processes rename themselves and would write the new name over the mark.
  exec env BATON_DEPLOYMENT="$mark" SPT_NOENV=1 "$venv/bin/ray" start "${arguments[@]}" "$@"
}

sweep() { PYTHONPATH=$root "$venv/bin/python" -c "from cluster import guard; guard.sweep('$mark')" || true; }

keep() {
  local child= stopping= begun pause_s=1 status
  trap 'stopping=1; [ -z "$child" ] || kill "$child" 2>/dev/null || true' TERM INT HUP
  cd /
  while [ -z "$stopping" ]; do
    begun=$SECONDS
    (start_ray "$@") &
    child=$!
    status=0
    wait $child || status=$?
    if [ -n "$stopping" ]; then
      # That wait was cut short by the signal.
      for _ in {1..100}; do
        kill -0 $child 2>/dev/null || break
        sleep 0.2
      done
      break
    fi
    child=
    [ $((SECONDS - begun)) -lt 60 ] || pause_s=1
    say "Ray ended with status $status after $((SECONDS - begun)) s; starting it again in $pause_s s"
    sweep
    sleep $pause_s &
    wait $! || true
    pause_s=$((2 * pause_s < most_pause_s ? 2 * pause_s : most_pause_s))
  done
  sweep
  say "stopped"
}

tell_next() {
  local self
  if [ $role = join ]; then
    echo "This machine has joined the Ray cluster at $address. Log: $log. End it: $root/scripts/cluster/down.sh"
    return
  fi
  self=$(sed -n "s/.*ray start --address='\([^']*\)'.*/\1/p" "$log" | tail -n 1)
  cat <<NEXT
The Ray head runs at $self. Log: $log. End it: $root/scripts/cluster/down.sh
On each other machine, in a checkout of the same release:
  mkdir -p -m 700 ~/.ray && scp -p ${self%:*}:$token ~/.ray/auth_token && scripts/cluster/up.sh join $self
Then, here:
  RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token $venv/bin/baton serve --address $self [CONFIG.yaml]
NEXT
}

wait_until_up() {
  for _ in {1..600}; do
    if grep -q "Ray runtime started" "$log"; then tell_next; return; fi
    if grep -q "up.sh: Ray ended" "$log" || ! kill -0 "$1" 2>/dev/null; then
      "$root/scripts/cluster/down.sh" >/dev/null 2>&1 || true
      tail -n 15 "$log" | sed 's/^/  | /' >&2
      die "Ray did not start; its log ends as above"
    fi
    sleep 0.2
  done
  "$root/scripts/cluster/down.sh" >/dev/null 2>&1 || true
  die "Ray did not start within 120 s; see $log"
}

venv=${BATON_VENV:-$root/.venv}
if [ -z "$foreground" ]; then
  # By its command line too: the number may have come to be someone else's.
  if [ -s "$state/pid" ] && grep -qs "up.sh" "/proc/$(cat "$state/pid")/cmdline"; then
    die "this machine is a node already (process $(cat "$state/pid")); end it with scripts/cluster/down.sh"
  fi
  [ -n "${BATON_VENV:-}" ] || "$root/scripts/setup"
  prepare_token
  mkdir -p "$state"
  : >"$log"
  # Before the --: what comes after it is Ray's.
  setsid "${BASH_SOURCE[0]}" "$role" ${address:+"$address"} --foreground "${given[@]}" \
    >>"$log" 2>&1 </dev/null &
  echo $! >"$state/pid"
  wait_until_up $!
  exit
fi

[ -n "${BATON_VENV:-}" ] || "$root/scripts/setup"
prepare_token
prepare_ucx
ulimit -n 65536 2>/dev/null || true
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
# Workers find this checkout even in an environment where it is not installed; jobs find its python.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PATH=$venv/bin:$PATH
keep "$@"
