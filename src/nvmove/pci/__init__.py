"""The PCI function: configuration space (`config`), interrupt lines (`interrupts`) and their saved state."""
