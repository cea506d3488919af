"""Command line: parse, make a config, call the library."""
