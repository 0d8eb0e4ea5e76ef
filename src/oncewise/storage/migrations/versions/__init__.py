"""One file per revision, named by its ordinal."""
