"""`nvmove run`: QEMU's arguments, QEMU's process, its monitor, snapshots."""
