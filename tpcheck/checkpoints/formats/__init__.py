"""One file or package per format; reached through entry points alone."""
