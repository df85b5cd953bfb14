"""The suite's invariants, asked of what others ship or do: subjects that are not megastow, and the table of it all."""
