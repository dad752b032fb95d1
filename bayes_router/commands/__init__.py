"""`parsers` has what each command takes, without torch; one file a command has its `run(options)`.

`cli` joins them.
"""
