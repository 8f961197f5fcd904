#!/usr/bin/env bash
# The steps of the container image that need nothing of NVIDIA's base image. The Dockerfile calls them; so does a test,
# in a clean Debian.
#
#   install_image.sh wheel CHECKOUT DIRECTORY    build the wheel of a checkout into a directory
#   install_image.sh install DIRECTORY           install it, and those pins of requirements.lock that the base lacks
#   install_image.sh check                       refuse a base whose packages do not satisfy ours
#
# Whatever version of a package the base has, it keeps: everything is installed with --no-deps, and only packages that
# the base has no version of are added. PyTorch and its parts are never added. PYTHON is the interpreter (default
# python3).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python=${PYTHON:-python3}
# A base may hold its own packages in place through constraints; they may not hold ours back, which it does not have.
export PIP_CONSTRAINT="" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
pins="$(mktemp)"
trap 'rm -f "$pins"' EXIT

wheel() {
    local checkout=$1 directory=$2
    "$python" "$here/lock_requirements.py" pins build >"$pins"
    "$python" -m pip install --quiet --no-cache-dir --no-deps --requirement "$pins"
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$directory" "$checkout"
}

install() {
    local directory=$1
    "$python" "$here/lock_requirements.py" missing build runtime donor >"$pins"
    "$python" -m pip install --quiet --no-cache-dir --no-deps --requirement "$pins"
    "$python" -m pip install --quiet --no-cache-dir --no-deps "$directory"/megatron_graft-*.whl
    "$python" -P -c "import megatron_graft._native" # -P: the installed one, not one that lies here
}

check() { # `pip check` alone would also complain about the base's own affairs
    local complaints
    complaints="$("$python" -m pip check | grep '^megatron-graft ' || true)"
    if [ -n "$complaints" ]; then
        printf 'error: this base image does not satisfy the requirements:\n%s\n' "$complaints" >&2
        return 1
    fi
}

case "${1:-} $#" in
    "wheel 3" | "install 2" | "check 1") "$@" ;;
    *)
        sed -n '5,7s/^#  *//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
