"""Everything with a process group: classes, rows or the batch divided over its ranks."""
