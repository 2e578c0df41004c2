"""A QEMU command line, read: what is lifted from it, what is added, and the plan of what is to run."""
