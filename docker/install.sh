#!/usr/bin/env bash
# Installs what the tests of a row need beside a Python that has a torch, which stays as it is: nox, our distributions
# (editable), the test tools and the row's Megatron, all into environments of their own. The Dockerfile calls it, and so
# does native.sh.
#
#   MEGASTOW_ROW           the row of matrix.toml
#   MEGASTOW_ENVIRONMENTS  the folder for the environments; nox is bin/nox in the one of that name
#   PIP_CONSTRAINT         a file in that folder, which this script writes: what pip must not replace
#   PYTHON                 the Python that has the torch (default: python3)
set -euo pipefail
: "${MEGASTOW_ROW:?install.sh: say which row of matrix.toml}"
: "${MEGASTOW_ENVIRONMENTS:?install.sh: say where the environments go}"
: "${PIP_CONSTRAINT:?install.sh: say where the file with the constraints goes}"
python=${PYTHON:-python3}
NOX=2026.10.20

umask 0002 # a user of the same group may use what is made here, and add to it

# torch, and what its compiled parts were built against. NVIDIA's images have constraints of their own, for all that is
# in them; they would hold back the test tools, which live elsewhere.
"$python" - >"$PIP_CONSTRAINT" <<'EOF'
import importlib.metadata as metadata

for name in ("torch", "numpy", "triton"):
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        if name == "torch":
            raise SystemExit("install.sh: this Python has no torch, and megastow never brings one") from None
EOF

# An environment without a pip of its own: NVIDIA's images lack the part of Python that would put one there.
nox=$MEGASTOW_ENVIRONMENTS/nox
"$python" -m venv --without-pip "$nox"
"$python" -m pip --python "$nox/bin/python" install "nox==$NOX"

# Whoever runs nox lends its torch to the sessions (see noxfile.py). This is how it gets one itself.
folders_of_packages='import sys
print(*(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))), sep="\n")'
"$python" -c "$folders_of_packages" >"$(echo "$nox"/lib/python*/site-packages)/zz_torch_of_the_base.pth"

"$nox/bin/nox" --session prepare

torch='import importlib.util; print(importlib.util.find_spec("torch").origin)'
expected=$("$python" -c "$torch")
for environment in "$MEGASTOW_ENVIRONMENTS"/python*; do
  found=$("$environment/bin/python" -c "$torch")
  [[ $found == "$expected" ]] || {
    printf 'install.sh: %s uses %s, and not the torch that was here, %s\n' "$environment" "$found" "$expected" >&2
    exit 1
  }
done
