#!/usr/bin/env bash
# Installs what tests/clients drives: Python clients that conflict with ours, a Node, and npm packages. The rest comes
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
  PATH="$PWD/$venv/bin:$PATH" npm ci --ignore-scripts --silent
  cp package-lock.json node_modules/.installed
fi
