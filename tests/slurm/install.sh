#!/usr/bin/env bash
# What the tests on a SLURM and on two hosts of their own need, from Debian's packages: as root, where apt works. Ends well
# wherever it cannot; the tests say then what is missing.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin
packages=(slurm-wlm munge iproute2)
programs=(slurmctld slurmd srun munged ip)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

skip() {
  echo "SKIPPED installing ${packages[*]}: $1"
  exit 0
}

missing=()
for program in "${programs[@]}"; do command -v "$program" >/dev/null || missing+=("$program"); done
[ ${#missing[@]} -gt 0 ] || { echo "${packages[*]}: installed already"; exit 0; }
[ "$(id -u)" = 0 ] || skip "not root, and ${missing[*]} missing"
command -v apt-get >/dev/null || skip "no apt-get, and ${missing[*]} missing"

# A mirror that does not answer, or another apt at work, must not hold up a build.
bounded() {
  DEBIAN_FRONTEND=noninteractive timeout --kill-after=10 "$1" apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=10 \
    -o Acquire::https::Timeout=10 -o DPkg::Lock::Timeout=60 "${@:2}" >"$log" 2>&1 </dev/null
}
bounded 120 update || true # old lists may do
bounded 300 install --yes --no-install-recommends "${packages[@]}" || skip "apt-get: $(tail -n 1 "$log")"
echo "${packages[*]}: installed"
