"""What a user's monitor is: one facade in front of QEMU's own, and all that clients reach it by."""
