"""The library from the shell: dsd-generate draws images, dsd-image works on image files, dsd-verify checks them."""
