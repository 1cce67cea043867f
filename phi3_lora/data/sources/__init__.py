"""Sources of rows: files, folders, data sets and rows in memory."""
