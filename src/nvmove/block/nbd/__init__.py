"""Disks that somebody else opens: the client of an NBD server, QEMU's own for every other format."""
