"""Saved state: VMStateDescriptions, QEMU's migration stream, and the D-Bus service through which QEMU carries it."""
