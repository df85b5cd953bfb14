"""The images, without an engine: what docker/*.sh would run, and what they refuse."""

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megastow_conformance.rows import parse_trees, read_matrix

ROOT = Path(__file__).parents[1]
ROWS = read_matrix(ROOT / "matrix.toml")
TREE_ROWS = [row for row in ROWS.values() if row.source == "tree"]
OTHER_ROWS = [row for row in ROWS.values() if row.source != "tree"]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()

each_row = pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.id)
each_tree_row = pytest.mark.parametrize("row", TREE_ROWS, ids=lambda row: row.id)


def call(script, *arguments, **variables):
    """Runs a script, with nothing from outside that changes what it does."""
    outside = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.run(
        [ROOT / "docker" / script, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHON": sys.executable, "CONTAINER_ENGINE": "docker", **outside, **variables},
    )


def printed(script, *arguments, **variables):
    """The command that a script would run."""
    result = call(script, "--print", *arguments, **variables)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return shlex.split(result.stdout)


def values(command, option):
    return [value for name, value in pairwise(command) if name == option]


def mounts(command):
    """The ``--mount`` options, by their target."""
    parsed = [dict(part.partition("=")[::2] for part in mount.split(",")) for mount in values(command, "--mount")]
    return {mount["target"]: mount for mount in parsed}


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "a tree" / "megatron").mkdir(parents=True)
    return tmp_path / "a tree"


@pytest.fixture
def engine(tmp_path):
    """A container engine that has the images named in a file, and writes down what it is told to run."""
    script = tmp_path / "docker"
    script.write_text(
        "#!/bin/sh\n"
        f'[ "$1 $2" = "image inspect" ] && exec grep -qxF "$3" {tmp_path}/images\n'
        f'printf "%s\\n" "$@" >{tmp_path}/told\n'
    )
    script.chmod(0o755)
    (tmp_path / "images").write_text("megastow:mcore-0.16\n")
    return script


@each_row
def test_every_row_has_an_image_that_never_changes_under_its_name(row):
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", row.image)


@each_row
def test_an_image_is_built_from_its_row(row):
    command = printed("build.sh", row.id)
    assert command[:2] == ["docker", "build"]
    assert command[-1] == str(ROOT)
    assert values(command, "--file") == [str(ROOT / "docker/Dockerfile")]
    assert values(command, "--tag") == [f"megastow:{row.id}"]
    arguments = dict(argument.split("=", 1) for argument in values(command, "--build-arg"))
    assert arguments.pop("REVISION")
    assert arguments == {
        "BASE_IMAGE": row.image,
        "ROW": row.id,
        "ADAPTER": row.adapter,
        "MEGATRON": f"{row.megatron} ({row.source})",
    }


def test_the_arguments_of_the_dockerfile_are_those_that_are_passed():
    passed = {argument.split("=")[0] for argument in values(printed("build.sh", "mcore-0.16"), "--build-arg")}
    assert set(re.findall(r"^ARG (\S+)$", DOCKERFILE, re.MULTILINE)) == passed


def test_the_dockerfile_builds_on_nothing_but_the_base_image():
    assert re.findall(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE) == ["${BASE_IMAGE}"]
    assert "latest" not in DOCKERFILE


def test_an_image_takes_in_only_what_is_ours():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    taken = [line[1:] for line in lines if line.startswith("!")]
    assert [name for name in taken if not (ROOT / name).exists()] == []
    assert {"core", "adapters", "conformance", "docker", "matrix.toml", "noxfile.py", "pyproject.toml"} == set(taken)


def test_more_arguments_go_to_the_engine():
    command = printed("build.sh", "--base-image", "mirror.example:5000/pytorch:1.0", "v3-0.6", "--", "--no-cache")
    assert "BASE_IMAGE=mirror.example:5000/pytorch:1.0" in values(command, "--build-arg")
    assert command[-2:] == ["--no-cache", str(ROOT)]


@pytest.mark.parametrize("image", ["pytorch", "mirror.example:5000/pytorch", "pytorch:latest"])
def test_a_base_that_is_not_pinned_is_refused(image):
    result = call("build.sh", "--print", "--base-image", image, "v3-0.6")
    assert result.returncode == 2
    assert f"{image} does not say which image" in result.stderr


def test_the_list_has_every_row_with_its_image_and_megatron():
    lines = call("build.sh", "--list").stdout.splitlines()[1:]
    assert [line.split() for line in lines] == [
        [row.id, row.image, row.megatron, f"({row.source})"] for row in ROWS.values()
    ]


def test_a_command_runs_in_the_image_of_its_row():
    command = printed("run.sh", "mcore-0.16", "--", "nox", "-t", "gpu", "--", "-k", "a or b")
    assert command[:2] == ["docker", "run"]
    assert command[command.index("megastow:mcore-0.16") :] == [
        *("megastow:mcore-0.16", "nox", "-t", "gpu", "--", "-k", "a or b")
    ]
    assert values(command, "--gpus") == ["all"]
    assert values(command, "--ulimit") == ["memlock=-1", "stack=67108864"]
    assert values(command, "--user") == [f"{os.getuid()}:0"]
    assert mounts(command) == {}


def test_without_a_command_the_gpu_sessions_run():
    assert printed("run.sh", "mcore-0.16")[-4:] == ["megastow:mcore-0.16", "nox", "-t", "gpu"]


@each_tree_row
def test_a_source_tree_is_mounted_read_only_where_its_row_looks(row, tree):
    command = printed("run.sh", row.id, "--megatron-path", tree)
    assert mounts(command) == {
        "/opt/megatron": {"type": "bind", "source": str(tree), "target": "/opt/megatron", "readonly": ""}
    }
    ((name, value),) = (variable.split("=", 1) for variable in values(command, "--env"))
    assert name == "MEGASTOW_MEGATRON"
    assert parse_trees([value]) == {row.id: Path("/opt/megatron")}


@each_tree_row
def test_a_row_with_a_source_tree_asks_for_it(row, tmp_path):
    result = call("run.sh", "--print", row.id)
    assert result.returncode == 2
    assert "pass --megatron-path FOLDER" in result.stderr
    result = call("run.sh", "--print", row.id, "--megatron-path", tmp_path)
    assert result.returncode == 2
    assert f"{tmp_path}: there is no package 'megatron' in it" in result.stderr


@pytest.mark.parametrize("row_id", ["mcore-0.16", "v4-double"])
def test_no_other_megatron_can_pass_for_that_of_a_row(row_id, tree):
    result = call("run.sh", "--print", row_id, "--megatron-path", tree)
    assert result.returncode == 2
    assert f"row {row_id} does not run on a source tree" in result.stderr


def test_results_and_sources_are_mounted_when_asked_for(tmp_path):
    command = printed("run.sh", "--results", tmp_path / "new", "--source", "mcore-0.16")
    assert {target: mount["source"] for target, mount in mounts(command).items()} == {
        "/results": str(tmp_path / "new"),
        "/opt/megastow": str(ROOT),
    }
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("docker", "all", ["--gpus", "all"]),
        ("docker", "0,1", ["--gpus", '"device=0,1"']),
        ("docker", "none", []),
        ("podman", "all", ["--device", "nvidia.com/gpu=all"]),
        ("podman", "0,1", ["--device", "nvidia.com/gpu=0", "--device", "nvidia.com/gpu=1"]),
        ("podman", "none", []),
    ],
)
def test_gpus_are_given_as_the_engine_takes_them(name, gpus, expected):
    command = printed("run.sh", "--gpus", gpus, "mcore-0.16", CONTAINER_ENGINE=name)
    assert command[0] == name
    given = [part for pair in pairwise(command) if pair[0] in ("--gpus", "--device") for part in pair]
    assert given == expected


def test_the_engine_is_told_what_was_printed(engine, tmp_path):
    command = printed("run.sh", "--results", tmp_path / "new", "mcore-0.16", CONTAINER_ENGINE=str(engine))
    result = call("run.sh", "--results", tmp_path / "new", "mcore-0.16", CONTAINER_ENGINE=str(engine))
    assert result.returncode == 0, result.stderr
    assert [str(engine), *(tmp_path / "told").read_text().splitlines()] == command
    assert (tmp_path / "new").is_dir()


def test_an_image_that_is_not_there_is_an_error_that_says_how_to_make_it(engine, tmp_path):
    result = call("run.sh", "v3-0.6", CONTAINER_ENGINE=str(engine))
    assert result.returncode == 2
    assert "docker/build.sh v3-0.6 makes it" in result.stderr
    assert not (tmp_path / "told").exists()


def test_an_engine_that_is_not_there_is_an_error():
    result = call("build.sh", "mcore-0.16", CONTAINER_ENGINE="no-such-engine")
    assert result.returncode == 2
    assert "no-such-engine" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "which row?"),
        (["mcore-0.16", "v3-0.6"], "one row at a time"),
        (["--no-such-option", "mcore-0.16"], "there is no option --no-such-option"),
        (["mcore-0.00"], "the matrix has no row 'mcore-0.00'"),
    ],
)
@pytest.mark.parametrize("script", ["build.sh", "run.sh"])
def test_a_wrong_call_is_refused(script, arguments, error):
    result = call(script, "--print", *arguments)
    assert result.returncode != 0
    assert error in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("script", ["build.sh", "run.sh", "native.sh"])
def test_help_is_the_comment_at_the_top(script):
    result = call(script, "--help")
    assert result.returncode == 0
    assert f"docker/{script}" in result.stdout
    assert "set -euo pipefail" not in result.stdout


def test_a_workflow_has_a_job_for_each_row_that_can_run():
    jobs = json.loads(call("rows.py", "workflow").stdout)["include"]
    assert jobs == [{"row": row.id, "tree": ""} for row in OTHER_ROWS]


def test_a_workflow_runs_a_source_tree_that_lies_on_the_runners():
    jobs = json.loads(call("rows.py", "workflow", MEGASTOW_MEGATRON="v4-fork=/srv/fork").stdout)["include"]
    assert {"row": "v4-fork", "tree": "/srv/fork"} in jobs
    assert len(jobs) == len(OTHER_ROWS) + 1


def test_a_workflow_that_asks_for_a_source_tree_that_nobody_has_fails():
    result = call("rows.py", "workflow", "mcore-0.16", "v4-fork")
    assert result.returncode != 0
    assert "v4-fork" in result.stderr


def test_an_installation_without_a_torch_is_refused(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # with no packages at all
    python.chmod(0o755)
    variables = {
        "MEGASTOW_ROW": "mcore-0.16",
        "MEGASTOW_ENVIRONMENTS": str(tmp_path),
        "PIP_CONSTRAINT": str(tmp_path / "constraints.txt"),
    }
    result = call("install.sh", PYTHON=str(python), **variables)
    assert result.returncode != 0
    assert "this Python has no torch" in result.stderr
    assert not (tmp_path / "nox").exists()


def test_an_image_is_looked_at_where_nox_makes_environments():
    """`install.sh` ends with a look at each: which torch the tests import there."""
    made = re.search(r'parent / f"(\w+){version}"', (ROOT / "noxfile.py").read_text())
    assert made is not None
    assert f'"$MEGASTOW_ENVIRONMENTS"/{made[1]}*; do' in (ROOT / "docker" / "install.sh").read_text()
