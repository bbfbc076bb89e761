"""The library from the shell: dsd-generate draws images of classes, dsd-image works on image files."""
