"""vfio-user: the server side that stock QEMU attaches to, guest memory, and a host-side driver for tests."""
