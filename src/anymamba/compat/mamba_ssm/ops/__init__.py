"""See `anymamba.compat`."""
