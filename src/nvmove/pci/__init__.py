"""The PCI function: configuration space (`config`) and interrupt lines (`interrupts`)."""
