# shellcheck shell=bash
# Sourced by run.sh and test.sh: makes .venv/ in the current folder and installs what is missing. Bash 3.2 will do.

VENV_PYTHON=.venv/bin/python

die() {
  echo "error: $1" >&2
  exit 2
}

# Print a Python of 3.10 or newer that can make virtual environments.
find_python() {
  local candidate without_venv=""
  for candidate in python3.13 python3.12 python3.11 python3.10 python3 python; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    without_venv=$candidate
  done
  [ -z "$without_venv" ] || die "$without_venv has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
  die "no Python 3.10 or newer found; install one from https://www.python.org/downloads/ or your system's packages"
}

# prepare_environment FILE...: install these requirement files, each once until it changes.
prepare_environment() {
  local python file stamp
  if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version); the packages take some minutes and, on Linux, about 8 GB"
    "$python" -m venv --clear .venv
  fi
  for file in "$@"; do
    stamp=.venv/installed-$file
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$(cat "$file")" ]; then
      echo "Installing $file into .venv"
      "$VENV_PYTHON" -m pip install --disable-pip-version-check -r "$file"
      cp "$file" "$stamp"
    fi
  done
}
