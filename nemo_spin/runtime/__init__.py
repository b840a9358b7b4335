"""Processes: collectives, watchdog, stopping, locks, progress."""
