#!/bin/sh
# From a folder of images to an image of one of its classes: your_own_images.sh FOLDER CLASS [section.key=value ...]
# FOLDER holds a folder of images for each class. Leaves NAME.toml, runs/NAME, NAME-model and image.png here.
set -eu
images=$1 class=$2
shift 2
name=$(basename "$images")
[ -e "$name.toml" ] || dsd-train init "$images" --start-from demo -o "$name.toml"
dsd-train "$name.toml" "$@"
dsd-export "runs/$name/checkpoint.pt" -o "$name-model" --force
dsd-serve --model "$name-model" --port 8123 &
server=$!
trap 'kill $server' EXIT
curl --silent --fail --retry 60 --retry-delay 1 --retry-connrefused localhost:8123/health/ready >/dev/null
curl --silent --show-error --fail --get --data-urlencode "class=$class" localhost:8123/generate -o image.png
echo "image.png shows $class"
