#!/usr/bin/env bash
# Install Debian packages in an image that is being built:  packages.sh PACKAGE...
# Uses the build machine's mirror, proxy and certificates, and does not leave them behind.
set -euo pipefail

# Written by containers/settings.py, if the build machine has such settings.
readonly settings=/mnt

options=(-o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 -o APT::Install-Recommends=0
  -o Acquire::Retries=3 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30)
# shellcheck disable=SC1091
codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME-}")
# A mirror is for one release: on a base of another, the base's own sources are used.
readonly mirror=$settings/apt/$codename
if [[ -f $mirror/apt.conf ]]; then export APT_CONFIG=$mirror/apt.conf; fi
if compgen -G "$mirror/host.*" >/dev/null; then
  options+=(-o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$mirror")
fi

export DEBIAN_FRONTEND=noninteractive
apt-get -qq "${options[@]}" update
apt-get -qq "${options[@]}" install --yes "$@"

# Remove what differs from build to build, or reveals the build machine.
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/ldconfig/aux-cache /var/log/apt
rm -f /var/log/dpkg.log /var/log/alternatives.log /var/log/bootstrap.log
