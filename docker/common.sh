# What build.sh and run.sh share; sourced by them.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
print=0 # whether to print the command instead of running it

fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Prints the comment at the top of the script that was called.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# The value of an option, or an error that says that there is none: value OPTION "${@:2}"
value() {
  (($# > 1)) || fail "$1 needs a value (see ${0##*/} --help)"
  printf '%s\n' "$2"
}

rows() {
  "${PYTHON:-python3}" "$root/docker/rows.py" "$@"
}

# The name of a row's image.
image() {
  printf '%s:%s\n' "${MEGASTOW_IMAGE:-megastow}" "$1"
}

# The container engine: $CONTAINER_ENGINE, or the first that is there. A command that is only printed needs none.
engine() {
  local candidate
  for candidate in ${CONTAINER_ENGINE:-docker podman}; do
    if command -v "$candidate" >/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  ((print)) || fail "found no ${CONTAINER_ENGINE:-docker or podman} on the PATH; set CONTAINER_ENGINE to the one to use"
  printf '%s\n' "${CONTAINER_ENGINE:-docker}"
}

# Runs a command in place of the script, or prints it so that a shell can read it.
finish() {
  if ((print)); then
    printf '%q ' "$@"
    printf '\n'
  else
    exec "$@"
  fi
}
