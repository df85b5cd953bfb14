#!/usr/bin/env bash
# Runs a command in the image of a row of matrix.toml; build.sh makes the image.
#
#   docker/run.sh [OPTION...] ROW [-- COMMAND...]
#   docker/run.sh mcore-0.16 -- nox -t gpu
#
# Without a command: nox -t gpu, the conformance suite on the row's Megatron.
#
#   --megatron-path FOLDER  the source tree of a row that has one: the folder that holds the package "megatron". It is
#                           mounted, read-only; no image ever holds such a tree
#   --gpus all|none|LIST    which GPUs the container sees, such as 0,1 (default: all)
#   --results FOLDER        mount a folder, made if need be, as /results: the place for reports
#   --source                mount this repository over the image's copy of it: what is changed is what runs
#   --print                 print the command instead of running it
#   --help                  print this
#
#   CONTAINER_ENGINE  docker or podman (default: the first of them that is there)
#   MEGASTOW_IMAGE    the image's name without its tag, which is the row (default: megastow)
#   PYTHON            a Python 3.11 or later, which reads the matrix (default: python3)
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

row=
tree=
gpus=all
results=
with_source=0
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --print) print=1 ;;
    --megatron-path) tree=$(value "$@"); shift ;;
    --gpus) gpus=$(value "$@"); shift ;;
    --results) results=$(value "$@"); shift ;;
    --source) with_source=1 ;;
    --) shift; break ;;
    -*) fail "there is no option $1 (see run.sh --help)" ;;
    *) [[ -z $row ]] || fail "one row at a time: $row or $1? A command comes after --"; row=$1 ;;
  esac
  shift
done
[[ -n $row ]] || fail "which row? build.sh --list prints them all"
(($#)) || set -- nox -t gpu

fields=$(rows get "$row" source megatron)
{ read -r source && read -r megatron; } <<<"$fields"
if [[ $source == tree ]]; then
  [[ -n $tree ]] ||
    fail "row $row runs on a source tree ($megatron): pass --megatron-path FOLDER, which holds the package 'megatron'"
  [[ -d $tree/megatron ]] || fail "--megatron-path $tree: there is no package 'megatron' in it"
  tree=$(cd "$tree" && pwd)
elif [[ -n $tree ]]; then
  fail "row $row does not run on a source tree, its Megatron is $megatron ($source); --megatron-path is not for it"
fi

name=$(engine)
tag=$(image "$row")
if ! ((print)); then
  "$name" image inspect "$tag" >/dev/null || fail "$name gives no image $tag; docker/build.sh $row makes it"
fi

# Worker processes talk through shared memory, and host memory is page-locked: both need more than an engine's defaults.
arguments=(--rm --ipc host --ulimit memlock=-1 --ulimit stack=67108864)
if [[ -t 0 && -t 1 ]]; then
  arguments+=(--interactive --tty)
fi

# Files under /results must belong to who called. The image's folders can be written to by any user of group 0.
arguments+=(--user "$(id -u):0")

# Docker knows the NVIDIA runtime by --gpus, Podman by the devices of a CDI specification. By file name, since
# CONTAINER_ENGINE may be a path.
case ${name##*/}:$gpus in
  *:none) ;;
  podman*) for gpu in ${gpus//,/ }; do arguments+=(--device "nvidia.com/gpu=$gpu"); done ;;
  *:all) arguments+=(--gpus all) ;;
  *) arguments+=(--gpus "\"device=$gpus\"") ;; # the quotes are for the engine, which splits at commas
esac
# A rootless Podman maps the caller to root unless told otherwise.
if [[ ${name##*/} == podman* && $(id -u) != 0 ]]; then
  arguments+=(--userns keep-id)
fi

bind() {
  [[ $1 != *,* ]] || fail "$1: an engine cannot mount a folder with a comma in its name"
  arguments+=(--mount "type=bind,source=$1,target=$2${3:+,$3}")
}
if [[ -n $tree ]]; then
  bind "$tree" /opt/megatron readonly
  arguments+=(--env "MEGASTOW_MEGATRON=$row=/opt/megatron")
fi
if [[ -n $results ]]; then
  ((print)) || mkdir -p "$results"
  bind "$(realpath -m "$results")" /results
fi
if ((with_source)); then
  bind "$root" /opt/megastow
fi

finish "$name" run "${arguments[@]}" "$tag" "$@"
