"""The recurrences and the contract that every backend implements for them (see `lasp.recurrence.stages`)."""
