"""The jobs, one thin module each, and the command line."""
