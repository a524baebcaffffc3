"""From a store to batches on a device."""
