"""The VM's run state, and what becomes of it in a snapshot or a migration."""
