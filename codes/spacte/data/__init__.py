"""Data sets by name; a split as batches on the device."""
