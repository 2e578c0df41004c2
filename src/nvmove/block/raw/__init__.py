"""Raw images, opened by nvmove itself: a file or a block device, with QEMU's locks."""
