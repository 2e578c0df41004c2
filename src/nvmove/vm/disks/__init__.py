"""The VM's disks as its monitors and QEMU's block layer have them."""
