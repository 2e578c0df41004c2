"""The NVMe controller: registers, queues, commands and their state; no sockets and no threads of its own."""
