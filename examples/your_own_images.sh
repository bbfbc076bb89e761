#!/bin/sh
# From a folder of images to an image of one of its classes: your_own_images.sh FOLDER CLASS [section.key=value ...]
# FOLDER holds a folder of images for each class. Leaves NAME.toml, runs/NAME, NAME-model and image.png here.
# The server listens on PORT of the environment, 8123 by default, and ends with this script.
set -eu
usage="usage: your_own_images.sh FOLDER CLASS [section.key=value ...]"
images=${1:?"$usage"} class=${2:?"$usage"} port=${PORT:-8123}
shift 2
[ -d "$images/$class" ] || { echo "your_own_images.sh: there is no folder $images/$class" >&2; exit 1; }
name=$(basename "$(cd "$images" && pwd)")
[ -e "$name.toml" ] || dsd-train init "$images" --start-from demo -o "$name.toml"
dsd-train "$name.toml" "$@"
dsd-export "runs/$name/checkpoint.pt" -o "$name-model" --force
if curl --silent --output /dev/null "localhost:$port"; then
    echo "your_own_images.sh: port $port is in use; PORT=N takes another" >&2
    exit 1
fi
dsd-serve --model "$name-model" --port "$port" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
trap 'exit 1' INT TERM # without it some shells leave the server behind
until curl --silent --fail "localhost:$port/health/ready" >/dev/null; do
    kill -0 "$server" 2>/dev/null || exit 1 # it said why
    sleep 1
done
curl --silent --show-error --fail --get --data-urlencode "class=$class" "localhost:$port/generate" -o image.png
echo "image.png shows $class"
