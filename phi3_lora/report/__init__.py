"""Reports for people: progress, pages, pictures and the state of the machine."""
