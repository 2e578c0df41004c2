"""Who runs the queues: takes commands from submission queues and runs them, off the vfio-user control thread."""
