"""Where rows come from: files, folders, data sets."""
