"""A real guest on a real QEMU, driven from Python: what `nvmove demo`, the guest tests and the bench have in common."""
