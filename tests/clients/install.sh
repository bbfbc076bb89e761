#!/usr/bin/env bash
# Installs what tests/clients drives: Python clients that conflict with ours, a Node, and npm packages; and axe-core, with
# which tests/ui checks the page. The rest comes
# from the system, as far as it is there: apt-get install chromium curl default-jdk-headless netcat-openbsd nginx-light prometheus wget
set -euo pipefail
cd "$(dirname "$0")"
venv=../../.clients
if ! cmp -s requirements.txt "$venv/.installed"; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$venv/.installed"
fi
if ! cmp -s package-lock.json node_modules/.installed; then
  # Node trusts a list of its own; this machine may trust more, such as the certificate of a company's proxy.
  system=/etc/ssl/certs/ca-certificates.crt
  if [ -z "${NODE_EXTRA_CA_CERTS:-}" ] && [ -e $system ]; then export NODE_EXTRA_CA_CERTS=$system; fi
  if PATH="$PWD/$venv/bin:$PATH" npm ci --ignore-scripts --loglevel=error; then
    cp package-lock.json node_modules/.installed
  else
    rm -rf node_modules
    echo "install.sh: npm could not install its packages; the tests of clients in Node are skipped" >&2
  fi
fi
