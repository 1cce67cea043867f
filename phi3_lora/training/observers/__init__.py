"""The observers that write the files of a run."""
