"""What of a controller is saved: plain data, how it is read from a live one and put back, and how it travels."""
