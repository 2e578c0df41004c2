"""QEMU's option syntax and the options of its `nvme` devices and drives, as typed configuration."""
