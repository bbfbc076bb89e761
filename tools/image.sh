#!/bin/sh
# Builds an image of the Dockerfile: tools/image.sh [cpu|gpu|triton|train [NAME:TAG]]
#
#   ENGINE      docker, podman or buildah; by default the first that works
#   BASE        the base image. `debian` builds one from Debian's packages with mmdebstrap, for machines that reach a
#               package mirror but no image registry; it is buildah's default. RUN lines then see pip's configuration and
#               the certificates of this machine, which are mounted and not copied.
#   BUILD_ARGS  further arguments of the build, such as `--build-arg EXTRAS=cpu --no-cache`
#   BASE_ARGS   further arguments of mmdebstrap, such as `--aptopt=/etc/apt/apt.conf.d/99mirror`
#
# The image's SBOM, /usr/share/sbom/dsd.cdx.json, is copied to build/dsd-TARGET.cdx.json.
set -eu
cd "$(dirname "$0")/.."

target=${1:-cpu}
tag=${2:-dsd:$target}
engine=${ENGINE:-}
base=${BASE:-}

if [ -z "$engine" ]; then
  if docker info >/dev/null 2>&1; then engine=docker
  elif podman info >/dev/null 2>&1; then engine=podman
  elif command -v buildah >/dev/null; then engine=buildah
  else
    echo "image.sh: docker with a running daemon, podman or buildah is needed: apt-get install buildah mmdebstrap" >&2
    exit 1
  fi
fi
case $engine in
  docker) ;;
  podman) set -- --format docker ;;  # the OCI format has no HEALTHCHECK
  buildah)
    # Without user namespaces or mounts of its own, so that it works inside most containers too.
    export STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}" BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"
    set -- --format docker
    base=${base:-debian}
    ;;
  *) echo "image.sh: ENGINE must be docker, podman or buildah, got '$engine'" >&2; exit 1 ;;
esac
if [ "$engine" = docker ]; then set --; fi

if [ "$base" = debian ]; then
  base=localhost/dsd-base:bookworm
  if [ "$engine" = docker ]; then
    echo "image.sh: BASE=debian works with podman and buildah" >&2; exit 1
  fi
  if ! command -v mmdebstrap >/dev/null; then
    echo "image.sh: BASE=debian needs mmdebstrap: apt-get install mmdebstrap" >&2; exit 1
  fi
  if ! $engine image exists "$base" 2>/dev/null && ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Leaves out mmdebstrap's own configuration, manuals and translations.
    # shellcheck disable=SC2016,SC2086
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
      --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
      --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
      --customize-hook='cd "$1/etc" && rm -f apt/apt.conf.d/99mmdebstrap dpkg/dpkg.cfg.d/99mmdebstrap hostname resolv.conf' \
      ${BASE_ARGS:-} bookworm "$work/base.tar"
    printf 'FROM scratch\nADD base.tar /\n' > "$work/Dockerfile"
    $engine build "$@" -q -t "$base" "$work" >/dev/null
    rm -rf "$work"
  fi
  for file in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    if [ -e "$file" ]; then set -- "$@" -v "$file:$file:ro"; fi
  done
fi
if [ -n "$base" ]; then set -- "$@" --build-arg "BASE=$base"; fi

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
# shellcheck disable=SC2086
$engine build "$@" --target "$target" -t "$tag" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
  ${BUILD_ARGS:-} .
echo "built $tag with $engine"

if [ "$target" = triton ]; then exit 0; fi  # NVIDIA publishes an SBOM of its image; locks/ lists what is added
mkdir -p build
sbom=build/dsd-$target.cdx.json
if [ "$engine" = buildah ]; then
  made=$(buildah from --pull-never "$tag")
  cp "$(buildah mount "$made")/usr/share/sbom/dsd.cdx.json" "$sbom"
  buildah rm "$made" >/dev/null
else
  made=$($engine create "$tag")
  $engine cp "$made:/usr/share/sbom/dsd.cdx.json" "$sbom"
  $engine rm "$made" >/dev/null
fi
echo "wrote $sbom"
