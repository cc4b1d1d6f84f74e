"""Fast versions of the functions in `reference/`, one op a file. They import nothing of the package."""
