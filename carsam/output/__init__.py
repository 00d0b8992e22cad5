"""The place a run writes to: checked before, locked during the run, replaced whole or not at all."""
