#!/usr/bin/env bash
# The part that runs on a TPU worker: installs a copy of the repository and keeps one `mila` command going. tpu_vm.sh and tpu_pod.sh
# copy this file into the home folder of every worker and call it; tpu_multislice.sh calls it inside the container.
#   bash tpu_worker.sh setup [--extra=NAME …] ARCHIVE         unpacks ARCHIVE into ~/mila_jax and sets it up
#   bash tpu_worker.sh start [--tries=N] -- train …           `mila train …`, detached from this terminal
#   bash tpu_worker.sh status       one line: none, running, done, failed CODE, stopped CODE (by stop), interrupted CODE (by the
#                                   system), or lost (the machine was restarted, or the process killed)
#   bash tpu_worker.sh logs [--follow] [--lines=N]
#   bash tpu_worker.sh stop                                   SIGTERM to the command, which saves; waits for it
#   bash tpu_worker.sh run [--tries=N] [--extra=NAME …] [--python=PYTHON] -- train …       in the foreground, for containers
#
# Exit codes of the command: 0 is done. 75 means that it was pre-empted after a save: it is started again (`run` leaves with 75, so that
# whoever runs the container starts all of them again). Anything else is a failure, tried again after 10, 20, 40 … 600 seconds until N
# (default 5) failures came one after another; a run of an hour, or one that ended in 75, sets the count back.
# MILA_RETRY_SECONDS: the first of these pauses. Log, process and state are in runs/launcher of the repository.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
self="$here/$(basename "${BASH_SOURCE[0]}")"
if [ -f "$here/setup.sh" ]; then root="$(dirname "$here")"; else root="$HOME/mila_jax"; fi  # in the repository, or beside its copy
launcher="$root/runs/launcher"
log="$launcher/log.txt"
tries=5
retry="${MILA_RETRY_SECONDS:-10}"
healthy=3600  # seconds
patience=600  # seconds that `stop` leaves for the last save

fail() { echo "error: tpu_worker.sh: $*" >&2; exit 2; }
note() { echo "tpu_worker: $(date -u +%FT%TZ) $*"; }
write_state() { echo "$*" > "$launcher/state.new" && mv "$launcher/state.new" "$launcher/state"; }
is_running() { [ -f "$launcher/lock" ] && ! flock --nonblock "$launcher/lock" true; }

# Sets the options, and what is left in `rest`.
parse() {
  extras=() follow=no lines=40 python="" rest=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --tries=*) tries="${1#*=}" ;;
      --extra=*) extras+=("$1") ;;
      --lines=*) lines="${1#*=}" ;;
      --python=*) python="${1#*=}" ;;
      --follow) follow=yes ;;
      --) shift; rest+=("$@"); break ;;
      --*) fail "unknown option $1" ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  case "$tries" in ''|*[!0-9]*|0) fail "--tries takes a number of at least 1, not '$tries'" ;; esac
}

# Sets PYTHON for setup.sh if the image's own Python is too old and there is no .venv that setup.sh keeps: Python 3.12 from uv.
find_python() {
  if "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1 || bash "$root/scripts/setup.sh" --which-python >/dev/null 2>&1; then return; fi
  note "no Python 3.11 or newer here; getting 3.12 with uv"
  export PATH="$HOME/.local/bin:$PATH"
  if ! command -v uv >/dev/null 2>&1; then
    python3 -m pip install --quiet --user uv || curl -LsSf https://astral.sh/uv/install.sh | sh
  fi
  uv python install 3.12
  PYTHON="$(uv python find 3.12)"
  export PYTHON
}

install() {
  find_python
  bash "$root/scripts/setup.sh" ${extras[@]+"${extras[@]}"}
}

setup() {
  local archive="$1"
  [ "$root" = "$HOME/mila_jax" ] || fail "setup is for a copy in the home folder; here, bash scripts/setup.sh does it"
  [ -f "$archive" ] || fail "no file $archive"
  if is_running; then fail "a run is going on; stop it first"; fi
  mkdir -p "$root"
  # Files of the copy before this one that are gone from the repository must not be imported by accident; all others are left alone.
  if [ -f "$root/.source.tar.gz" ]; then
    (cd "$(dirname "$root")" && tar -tzf "$root/.source.tar.gz" | grep -v '/$' | tr '\n' '\0' | xargs -0 rm -f --)
  fi
  tar -xzf "$archive" -C "$(dirname "$root")"
  mv "$archive" "$root/.source.tar.gz"
  install
}

# Runs `mila "${rest[@]}"` until it is done, ended or failed for good; `again`: whether 75 is started again here.
supervise() {
  local again="$1" failures=0 attempt=0 code began
  stopped=no child="" interrupted=no
  trap 'stopped=yes interrupted=yes; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi' TERM INT
  cd "$root"
  while :; do
    attempt=$((attempt + 1))
    note "attempt $attempt: mila ${rest[*]}"
    began=$SECONDS
    "$python" -m mila_jax "${rest[@]}" &
    child=$!
    if [ "$stopped" = yes ]; then kill -TERM "$child" 2>/dev/null || true; fi  # the signal came before there was a child
    await "$child"
    child=""
    note "exit code $code"
    if [ "$code" = 0 ]; then write_state "done"; return 0; fi
    if [ "$stopped" = yes ]; then ended; return "$code"; fi
    if [ "$code" = 75 ]; then
      failures=0
      if [ "$again" = no ]; then ended; return 75; fi
    else
      if [ $((SECONDS - began)) -ge "$healthy" ]; then failures=0; fi
      failures=$((failures + 1))
      if [ "$failures" -ge "$tries" ]; then
        note "failed $failures times one after another; giving up"
        write_state "failed $code"
        return "$code"
      fi
    fi
    pause "$failures"
    if [ "$stopped" = yes ]; then ended; return 75; fi  # nothing was running: all that is saved is saved
  done
}

# By `stop`, which the user wants to last, or by the system, after which the command is wanted again.
ended() { if [ -f "$launcher/stop" ]; then write_state "stopped $code"; else write_state "interrupted $code"; fi; }

# Waits for process $1 and sets `code`; a signal that is trapped ends `wait` early, so it waits again.
await() {
  local last
  code=0
  wait "$1" || code=$?
  while [ "$interrupted" = yes ]; do
    interrupted=no last=$code code=0
    wait "$1" || code=$?
    if [ "$code" = 127 ]; then code=$last; fi
  done
}

# The pause after failure number $1 (0: after a pre-emption); a signal ends it.
pause() {
  local seconds="$retry" i
  for ((i = 1; i < $1 && seconds < 600; i++)); do seconds=$((seconds * 2)); done
  sleep $((seconds < 600 ? seconds : 600)) 9>&- &  # without the lock: it may outlive this script
  wait $! || true
}

start() {
  [ ${#rest[@]} -gt 0 ] || fail "no command; write it after --"
  [ -x "$root/.venv/bin/python" ] || fail "nothing is set up here"
  mkdir -p "$launcher"
  exec 9> "$launcher/lock"  # held by the detached process and its children for as long as they live
  flock --nonblock 9 || fail "a run is going on; stop it first"
  rm -f "$launcher/stop"
  write_state running
  setsid nohup bash "$self" supervise "--tries=$tries" -- "${rest[@]}" >> "$log" 2>&1 < /dev/null &
  echo $! > "$launcher/pid"
}

status() {
  local state=none
  if [ -f "$launcher/state" ]; then state="$(cat "$launcher/state")"; fi
  if is_running; then state=running; elif [ "$state" = running ]; then state=lost; fi
  echo "mila-worker ${HOSTNAME:-worker} $state"
}

stop() {
  if is_running; then
    touch "$launcher/stop"
    kill -TERM "$(cat "$launcher/pid")" 2>/dev/null || true
    if ! flock --timeout "$patience" "$launcher/lock" true; then
      kill -KILL -- "-$(cat "$launcher/pid")" 2>/dev/null || true
      flock --timeout 10 "$launcher/lock" true || fail "process $(cat "$launcher/pid") cannot be ended"
      write_state "stopped 137"
    fi
    # The signal may come before there is anything that could write this.
    if [ "$(cat "$launcher/state")" = running ]; then write_state "stopped 143"; fi
  fi
  status
}

logs() {
  [ -f "$log" ] || fail "no log yet"
  if [ "$follow" = yes ] && is_running; then
    tail --lines="$lines" --follow --pid="$(cat "$launcher/pid")" "$log"
  else
    tail --lines="$lines" "$log"
  fi
}

main() {
  [ $# -gt 0 ] || fail "no command; the head of this file lists them"
  local command="$1"
  shift
  parse "$@"
  case "$command" in
    setup)
      [ ${#rest[@]} = 1 ] || fail "setup takes one archive"
      setup "${rest[0]}"
      ;;
    start) start ;;
    supervise)
      python="$root/.venv/bin/python"
      supervise yes
      ;;
    run)
      [ ${#rest[@]} -gt 0 ] || fail "no command; write it after --"
      mkdir -p "$launcher"
      if [ -z "$python" ]; then
        install
        python="$root/.venv/bin/python"
      fi
      supervise no
      ;;
    status) status ;;
    logs) logs ;;
    stop) stop ;;
    *) fail "unknown command '$command'; the head of this file lists them" ;;
  esac
}

main "$@"; exit  # on one line: this file may be replaced while it runs, and bash reads line by line
