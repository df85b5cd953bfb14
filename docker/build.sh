#!/usr/bin/env bash
# Builds the GPU image of a row of matrix.toml.
#
#   docker/build.sh [OPTION...] ROW [-- ENGINE-ARGUMENT...]
#   docker/build.sh --list
#
#   --list              print every row, with its base image and its Megatron
#   --print             print the command instead of running it
#   --base-image IMAGE  build from this image instead of the row's (a mirror of it, say)
#   --help              print this
#
# What follows -- goes to the engine's "build": --no-cache, --network host, ...
#
#   CONTAINER_ENGINE  docker or podman (default: the first of them that is there)
#   MEGASTOW_IMAGE    the image's name without its tag, which is the row (default: megastow)
#   PYTHON            a Python 3.11 or later, which reads the matrix (default: python3)
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

base=
row=
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --list) rows list; exit ;;
    --print) print=1 ;;
    --base-image) base=$(value "$@"); shift ;;
    --) shift; break ;;
    -*) fail "there is no option $1 (see build.sh --help)" ;;
    *) [[ -z $row ]] || fail "one row at a time: $row or $1?"; row=$1 ;;
  esac
  shift
done
[[ -n $row ]] || fail "which row? build.sh --list prints them all"

fields=$(rows get "$row" image adapter megatron source)
{ read -r row_image && read -r adapter && read -r megatron && read -r source; } <<<"$fields"
base=${base:-$row_image}
[[ -n $base ]] || fail "row $row has no image in matrix.toml; pass --base-image"
[[ $base =~ (:[^/]+|@sha256:[0-9a-f]{64})$ && $base != *:latest ]] ||
  fail "$base does not say which image: it needs a tag other than latest, or a digest"
revision=$(git -C "$root" describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)
name=$(engine)

finish "$name" build \
  --file "$root/docker/Dockerfile" \
  --tag "$(image "$row")" \
  --build-arg "BASE_IMAGE=$base" \
  --build-arg "ROW=$row" \
  --build-arg "ADAPTER=$adapter" \
  --build-arg "MEGATRON=$megatron ($source)" \
  --build-arg "REVISION=$revision" \
  "$@" \
  "$root"
