"""The population engine: many small growing networks trained as one tensor program."""
