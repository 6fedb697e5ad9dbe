"""Everything that comes in from outside is read here: one reader for each kind of file, used by all modules.

Each raises a one-line UserError that names the file (and the line, record or member), and bounds what it allocates by
the size of the file. tests/test_readers.py keeps other modules from opening files themselves.
"""
