"""Other programs that read the same models, and whether they agree with this one; each run by hand."""
