"""Where bytes lie: reading, atomic writing, locks, threads."""
