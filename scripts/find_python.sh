#!/usr/bin/env bash
# Print the path of an interpreter that can run this project, or say what to install.
#
# Candidates, in this order: $PYTHON if set; python3.12 and python3.13 on PATH; plain python3 on PATH;
# every version under pyenv. 3.12 comes before 3.13 because most wheels are tested with it; newer ones are
# passed over, because megatron-core 0.19 publishes wheels for 3.12 and 3.13 only.
set -euo pipefail

usable() { # path -> succeeds if it is CPython 3.12 or 3.13 with the venv module
    [ -x "$1" ] && "$1" -c '
import sys
import venv, ensurepip
raise SystemExit(not ((3, 12) <= sys.version_info[:2] <= (3, 13)))
' >/dev/null 2>&1
}

candidates() {
    local version root
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" || true
        return
    fi
    for version in 3.12 3.13; do
        type -aP "python$version" || true # all on PATH, not only the first: that may be a shim that fails
    done
    type -aP python3 || true
    for root in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || true)" "${HOME:-}/.pyenv"; do
        [ -d "$root/versions" ] || continue
        for version in 3.12 3.13; do
            # Newest patch release first.
            find "$root/versions" -maxdepth 1 -name "$version.*" | sort -rV | sed 's|$|/bin/python3|'
        done
    done
}

while IFS= read -r candidate; do
    if usable "$candidate"; then
        # The real path: a pyenv shim may stop working when the selected version changes.
        "$candidate" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done < <(candidates)

cat >&2 <<EOF
error: no usable Python: ${PYTHON:+PYTHON=$PYTHON is not CPython 3.12 or 3.13 with the venv module, or does not exist. }\
megatron-core 0.19 needs Python 3.12 or 3.13 (with venv and ensurepip), and none was found on PATH or under pyenv.
Install one and run make again, for example:
    Debian 13, Ubuntu 24.04:  apt-get install python3 python3-venv python3-dev
    Fedora:                   dnf install python3.12 python3.12-devel
    pyenv:                    pyenv install 3.12
or name one: make PYTHON=<path> ...
EOF
exit 1
