#!/usr/bin/env bash
# Does what building and running the image of a row does, without an engine and without a GPU: in a folder of its own,
# from exactly the files that an image is built from, with the same install.sh and the same nox. Two things differ: the
# base is a fresh environment of the row's Python with the row's CPU build of torch, and the session is "conformance",
# which is "gpu" on a CPU. Everything is removed at the end.
#
#   docker/native.sh ROW [-- PYTEST-ARGUMENT...]
#   docker/native.sh mcore-0.16 -- -k "bitexact and w1-toy_plainopt"
#
#   PYTHON  a Python 3.11 or later, which reads the matrix (default: python3)
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1-} in
  --help | -h) usage; exit ;;
  '' | -*) fail "which row? build.sh --list prints them all" ;;
esac
row=$1
shift
[[ ${1-} != -- ]] || shift

fields=$(rows get "$row" python torch)
{ read -r version && read -r torch; } <<<"$fields"
command -v "python$version" >/dev/null ||
  fail "row $row is tested with Python $version, and there is no python$version here"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/megastow" "$work/environments"
sed -n 's/^!//p' "$root/.dockerignore" |
  tar --create --directory "$root" --exclude __pycache__ --exclude '*.egg-info' --files-from - |
  tar --extract --directory "$work/megastow"
"python$version" -m venv "$work/base"
"$work/base/bin/python" -m pip install --quiet "torch==$torch"

unset PYTHONPATH VIRTUAL_ENV
export MEGASTOW_ROW=$row MEGASTOW_ENVIRONMENTS=$work/environments PIP_CONSTRAINT=$work/environments/constraints.txt
cd "$work/megastow"
PYTHON=$work/base/bin/python docker/install.sh
"$work/environments/nox/bin/nox" --session "conformance($row)" -- "$@"
