#!/usr/bin/env bash
# Install what some tests use that no Python package brings, where that is possible without asking: as root on Debian
# or Ubuntu. Elsewhere say what to install. Those tests are skipped without it:
#   Slurm and munge   to run jobs; nothing is configured and no service is started, the tests start daemons of their own
#   debootstrap       to make a clean Debian for the steps of the container image
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge debootstrap)
PATH="$PATH:/usr/sbin:/sbin"

have_all() {
    local command
    for command in munged slurmctld slurmd sbatch srun scontrol debootstrap; do
        command -v "$command" >/dev/null || return 1
    done
}

install() {
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
        "${packages[@]}" >/dev/null 2>&1
}

if have_all; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # A machine's package lists may be missing or old.
    install || { apt-get -o DPkg::Lock::Timeout=300 update >/dev/null 2>&1 && install; } || true
    if have_all; then
        echo "installed ${packages[*]}"
        exit 0
    fi
fi
cat >&2 <<MESSAGE
note: not all is installed that tests of cluster jobs and of the container image use; those tests are skipped. It is
    Debian, Ubuntu:  apt-get install ${packages[*]}
    elsewhere:       Slurm's daemons and commands, munge, debootstrap
MESSAGE
