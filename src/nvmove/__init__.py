"""NVMe disks for QEMU virtual machines that can be saved, moved and paused."""
