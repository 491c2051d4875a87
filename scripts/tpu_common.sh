#!/usr/bin/env bash
# What tpu_vm.sh, tpu_pod.sh and tpu_multislice.sh have in common; sourced by them, not to be run.
# shellcheck disable=SC2034
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
script="$(basename "$0")"
worker_script=tpu_worker.sh

# Options of all three, with their defaults.
name="" dry_run=no project="" zone="" type="" spot=no tries=5 ignore_changes=no
create_flags=() mila=()

fail() { echo "error: $script: $*" >&2; exit 2; }  # a mistake that the user can put right
give_up() { echo "error: $script: $*" >&2; exit 1; }
say() { echo "$script: $*" >&2; }

# Shell-quotes each argument, as Python's shlex.quote does.
quoted() {
  local word separator=""
  for word in "$@"; do
    case "$word" in
      ''|*[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/\'\"\'\"\'}'" ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
  echo
}

# Runs a command, or prints it.
run() {
  if [ "$dry_run" = yes ]; then quoted "$@"; else "$@"; fi
}

# Prints the comment at the head of the script.
usage() { sed -n '2,/^[^#]/{/^# shellcheck/d;/^#/s/^# \{0,1\}//p}' "$0"; }

is_number() { case "$1" in ''|*[!0-9]*) return 1 ;; esac; }

# Names of TPUs, queued resources, clusters and workloads.
check_name() { [[ "$2" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "$1 '$2': lower-case letters, digits and -, a letter first, at most 40"; }

# Reads COMMAND [NAME] [options] [-- mila command]; `option` (of the script) takes what is not common, as a name and a value.
parse() {
  local argument flag value
  [ $# -gt 0 ] || { usage >&2; exit 2; }
  if [ "$1" = -h ] || [ "$1" = --help ]; then usage; exit 0; fi
  command="$1"
  shift
  while [ $# -gt 0 ]; do
    argument="$1"
    shift
    case "$argument" in
      --) mila=("$@"); break ;;
      -h|--help) usage; exit 0 ;;
      --dry-run) dry_run=yes; continue ;;
      --spot) spot=yes; continue ;;
      --ignore-changes) ignore_changes=yes; continue ;;
      --*=*) flag="${argument%%=*}" value="${argument#*=}" ;;
      --*)
        flag="$argument" value=""
        if ! switch "$flag"; then
          [ $# -gt 0 ] || fail "$flag needs a value"
          value="$1"
          shift
        else
          continue
        fi
        ;;
      *)
        [ -z "$name" ] || fail "unexpected argument '$argument'; the mila command comes after --"
        name="$argument"
        continue
        ;;
    esac
    case "$flag" in
      --project) project="$value" ;;
      --zone) zone="$value" ;;
      --type) type="$value" ;;
      --tries) tries="$value" ;;
      --create-flag) create_flags+=("$value") ;;
      *) option "$flag" "$value" || fail "unknown option $flag; bash scripts/$script --help lists them" ;;
    esac
  done
  if [ "${mila[0]:-}" = mila ]; then mila=("${mila[@]:1}"); fi
  if ! is_number "$tries" || [ "$tries" = 0 ]; then fail "--tries takes a number of at least 1, not '$tries'"; fi
}

need_command() { [ ${#mila[@]} -gt 0 ] || fail "no mila command; write it at the end: -- train --config=…"; }

need_tool() {  # name, where to get it
  if [ "$dry_run" = no ] && ! command -v "$1" >/dev/null 2>&1; then fail "$1 is not installed ($2); --dry-run shows the commands without it"; fi
}

# Sets `project` and `zone` from the flags, gcloud's environment variables or its configuration. A dry run asks nobody.
find_project() {
  project="${project:-${CLOUDSDK_CORE_PROJECT:-}}"
  zone="${zone:-${CLOUDSDK_COMPUTE_ZONE:-}}"
  if [ "$dry_run" = yes ]; then
    project="${project:-PROJECT}" zone="${zone:-ZONE}"
    return
  fi
  [ -n "$project" ] || project="$(gcloud config get-value core/project 2>/dev/null || true)"
  [ -n "$project" ] || fail "no project; pass --project=ID, or: gcloud config set project ID"
  [ -n "$zone" ] || zone="$(gcloud config get-value compute/zone 2>/dev/null || true)"
  [ -n "$zone" ] || fail "no zone; pass --zone=ZONE, or: gcloud config set compute/zone ZONE"
}

# Sets `commit`, the state of this checkout that is copied; changes that no commit holds would be left behind.
find_commit() {
  commit="$(git -C "$root" rev-parse --verify --quiet --short=12 'HEAD^{commit}' 2>/dev/null)" \
    || fail "$root is no git checkout with a commit; workers get the files of a commit"
  if [ "$ignore_changes" = no ] && [ -n "$(git -C "$root" status --porcelain --untracked-files=no)" ]; then
    if [ "$dry_run" = no ]; then fail "changed files are in no commit and would not be copied; commit them, or pass --ignore-changes"; fi
    say "warning: changed files are in no commit and would not be copied"
  fi
}

# By its number of cores (v2 … v5p) or chips (v5e, v6e); a type that is not given may have any number, and so may several slices.
several_workers() { [ -z "$type" ] || [ "${slices:-1}" -gt 1 ] || { is_number "${type##*-}" && [ "${type##*-}" -gt 8 ]; }; }

# Any other command knows nothing of the other workers: each would do all of the work by itself, and all write to one place. $1: what to do.
need_command_for_all() {
  case "${mila[0]}" in train|prepare) return ;; esac
  if several_workers; then fail "mila ${mila[0]} is for one worker, only train and prepare work on several together; $1"; fi
}

# `mila train` whose workers cannot find each other must fail, not run once on each of them.
train_as_one() {
  local argument
  [ "${mila[0]}" = train ] || return 0
  for argument in "${mila[@]}"; do
    case "$argument" in --config.distributed.initialize=*) return 0 ;; esac
  done
  mila+=(--config.distributed.initialize=always)
}

# Extras of pyproject.toml that a worker gets: gcs whether or not the command names a bucket, since its config file may, and since `setup` by
# itself knows no command.
extras() {
  printf '%s\n' --extra=tpu --extra=gcs
  case " ${mila[*]:-} " in *train.wandb=*) printf '%s\n' --extra=wandb ;; esac
}

# Disks of workers go with them; only a bucket (or a mounted disk of the user's) survives a pre-emption.
warn_of_local_runs() {
  local argument folder=""
  for argument in "${mila[@]}"; do
    case "$argument" in --config.train.dir=*) folder="${argument#*=}" ;; esac
  done
  if [ "${mila[0]}" = train ]; then
    case "$folder" in gs://*|/mnt/*) ;; *) say "warning: config.train.dir is not on gs:// or under /mnt: it is lost with the workers' disks" ;; esac
  fi
}
